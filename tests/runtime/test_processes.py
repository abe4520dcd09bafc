"""The processes of a run."""

import pytest
from support.ranks import run_ranks

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.processes import is_primary, join_world

VARIABLES = ("RANK", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "1"}, False), ({"SLURM_PROCID": "3"}, False)],
)
def test_the_first_process_is_primary(environment, expected, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_primary() is expected


def test_cause_of_a_lost_connection():
    """What NCCL says of itself stands below its first line."""

    def fail():
        with pytest.raises(UserError) as caught, join_world("cpu"):
            raise RuntimeError(
                "NCCL error in: a.cpp:9, invalid usage\nncclInvalidUsage: ...\nLast error:\nDuplicate GPU"
            )
        return str(caught.value)

    one, other = run_ranks(fail)
    assert one.endswith("it has no answer from rank 1: NCCL error in: a.cpp:9, invalid usage; Duplicate GPU")
    assert other.startswith("rank 1 of 2 lost the connection to another; ")
