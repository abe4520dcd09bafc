"""Training in processes of its own: interrupted, and in two processes at once."""

import csv
import os
import signal
import subprocess
import sys

import pytest
import torch
from support.ranks import Forked
from support.scripts import REPOSITORY

from vrwkv.classification import validate

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_interrupted_training_goes_on(name, tmp_path, train, train_args):
    """The signal goes to the whole process group, loader workers included, as a terminal or a job manager sends it."""
    settings = ["data.workers=1", "data.batch_size=2", "optim.accumulate=3"]
    process = Forked(lambda: train(train_args(tmp_path, "epochs=1000", *settings)))
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("epoch 2/"):
            os.killpg(process.pid, getattr(signal, name))
            break
    text = "".join(seen) + process.stderr.read()
    assert process.wait() == 75, text
    assert "Traceback" not in text
    assert f"interrupted by {name}: saved after" in text
    assert text.splitlines()[-1].endswith("--resume auto")
    done = torch.load(tmp_path / "last.pth", weights_only=True)["epoch"]
    assert done >= 1
    assert not list(tmp_path.glob("*.tmp"))
    assert train([*train_args(tmp_path, f"epochs={done + 1}", *settings), "--resume", "auto"]) == 0
    with open(tmp_path / "summary.csv") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == list(range(1, done + 2))


def test_two_processes(tmp_path, train_args, subprocess_environment):
    """Both see their share of the data, end with one set of files, and the metrics are those of one process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = train_args(tmp_path, "data.batch_size=4", "optim.accumulate=2")
    command = [*torchrun, str(REPOSITORY / "tools" / "train.py"), *argv]
    result = subprocess.run(command, env=subprocess_environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("epoch 2/2: training loss") == 1
    names = {"best.pth", "config.yaml", "curves.png", "last.1.pth", "last.pth", "summary.csv"}
    assert {path.name for path in tmp_path.iterdir()} == names
    content = torch.load(tmp_path / "best.pth", weights_only=True)
    measured = validate(tmp_path / "best.pth", workers=0, device="cpu")
    assert measured["top1"] == pytest.approx(content["metrics"]["top1"])
    assert measured["loss"] == pytest.approx(content["metrics"]["loss"], rel=1e-4)
