"""The training loop in several processes: they train one model, stop together, and say which of them is missing."""

import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from support.mean_colour import MeanColour
from support.ranks import run_ranks
from support.runs import assert_same_run, killed, load, signal_at_step

from vrwkv.runtime import checkpoint
from vrwkv.runtime.errors import Interrupted, UserError
from vrwkv.runtime.trainer import Trainer, run

pytestmark = pytest.mark.usefixtures("no_curves")


def test_signal_to_one_of_two_processes_stops_both(config, tmp_path):
    """After the same update; resumed, both have the bits of an unbroken run."""
    run_ranks(lambda: run(MeanColour, config("unbroken")) and None)

    def signalled():
        if os.environ["RANK"] == "1":
            signal_at_step(pytest.MonkeyPatch(), signal.SIGUSR1, 3)
        with pytest.raises(Interrupted) as interrupted:
            run(MeanColour, config("broken"))
        return str(interrupted.value)

    stopped = "saved after 1 of 2 steps of epoch 2"
    assert run_ranks(signalled) == [f"signal to another process: {stopped}", f"SIGUSR1: {stopped}"]
    run_ranks(lambda: run(MeanColour, config("broken"), resume="auto") and None)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_evaluation_that_ends_in_one_of_two_processes(config, tmp_path):
    """By a signal or a file that cannot be read: what both have trained is saved."""
    run_ranks(lambda: run(MeanColour, config("unbroken")) and None)

    def stopped(cause):
        def stop():
            if os.environ["RANK"] == "1":
                MeanColour.evaluate = cause
            with pytest.raises((Interrupted, UserError)) as caught:
                run(MeanColour, config("broken", save={"minutes": None}), resume="auto")
            return str(caught.value)

        said = run_ranks(stop)
        last = load(tmp_path / "broken" / "last.pth")
        assert (last["epoch"], last["step"]) == (0, 2)
        return said

    saved = "saved after 2 of 2 steps of epoch 1"
    assert stopped(killed) == [f"signal to another process: {saved}", f"SIGTERM: {saved}"]
    assert stopped(cannot_read) == ["another process could not evaluate, and says why", "no picture"]
    run_ranks(lambda: run(MeanColour, config("broken"), resume="auto") and None)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def cannot_read(task, model):
    raise UserError("no picture")


@pytest.mark.parametrize(("size", "dead"), [(2, 1), (3, 1)])
def test_process_that_dies(size, dead, config, tmp_path):
    """The others end and name it, of several perhaps with some that still wait; with all back, the run goes on."""

    def train():
        if os.environ["RANK"] == str(dead):
            signal_at_step(pytest.MonkeyPatch(), signal.SIGKILL, 2)
        try:
            run(MeanColour, config(save={"minutes": 1e-9}))
        except UserError as error:
            (tmp_path / os.environ["RANK"]).write_text(str(error))

    begin = time.monotonic()
    with pytest.raises(EOFError):  # no answer from the dead
        run_ranks(train, size)
    assert time.monotonic() - begin < 60
    for rank in {*range(size)} - {dead}:
        said = (tmp_path / str(rank)).read_text()
        expected = f"rank {rank} of {size} lost the connection to another; it has no answer from rank {dead}"
        assert said.startswith(expected)
        assert re.search(r"rank \d: .*(onnection|peer)", said)
    run_ranks(lambda: run(MeanColour, config(), resume="auto") and None, size)
    assert load(tmp_path / "output" / "last.pth")["epoch"] == 3


def test_resume_with_more_processes(config, tmp_path):
    run(MeanColour, config(epochs=1))
    with pytest.raises(RuntimeError, match=r"UserError.*the number of processes was 1, is 2"):
        run_ranks(lambda: run(MeanColour, config(), resume="auto"))


DIFFERENT = "processes found different states to start from; output must be a folder that all of them share: "


def test_processes_that_find_different_states(config, tmp_path):
    """None of them trains, and nothing is written, where one cannot read what the others can, or has its own folder."""
    run_ranks(lambda: run(MeanColour, config(epochs=1)) and None)
    before = {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir()}

    def resumed(output, broken):
        def resume():
            second, read = os.environ["RANK"] == "1", checkpoint.read

            def fail(path):
                if path.name in broken:
                    raise UserError(f"{path.name} is broken")
                return read(path)

            if second:
                checkpoint.read = fail
            with pytest.raises(UserError) as caught:
                run(MeanColour, config(output if second else "output"), resume="auto")
            return str(caught.value)

        one, other = run_ranks(resume)
        assert one == other
        return one.removeprefix(DIFFERENT)

    assert resumed("output", ["last.pth"]) == "epoch 1, step 0 (rank 0); epoch 0, step 0 (rank 1)"
    assert resumed("output", ["last.pth", "last.1.pth"]).startswith(
        "epoch 1, step 0 (rank 0); last.pth is broken; to go"
    )
    assert resumed("elsewhere", []) == "epoch 1, step 0 (rank 0); nothing (rank 1)"
    assert {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir()} == before


def test_processes_with_different_data(config, tmp_path):
    def train():
        if os.environ["RANK"] != "1":
            fewer = MeanColour.__init__

            def make(self, config, world):
                fewer(self, config, world)
                self.train_loader.batch_sampler.samples = 12

            MeanColour.__init__ = make
        with pytest.raises(UserError) as caught:
            run(MeanColour, config())
        return str(caught.value)

    expected = "all processes need the same data, and were given different ones: 12 samples for training (rank 0, 2); "
    assert run_ranks(train, 3) == [f"{expected}16 samples for training (rank 1)"] * 3
    assert not (tmp_path / "output").exists()


def test_ranks_end_with_the_same_weights(config, tmp_path):
    """And only the first of them writes and reports."""

    def train():
        trained = []
        start = Trainer.start
        Trainer.start = lambda self, *args: (start(self, *args), trained.append(self.task.model))
        run(MeanColour, config(optim={"accumulate": 2}))
        return [parameter.detach().numpy() for parameter in trained[0].parameters()]

    one, other = run_ranks(train)
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a, b)
    weights = load(tmp_path / "output" / "last.pth")["state_dict"]
    assert np.array_equal(one[0], weights["2.weight"])
    assert len((tmp_path / "output" / "summary.csv").read_text().splitlines()) == 4


def test_running_means_are_those_of_all_ranks(config, tmp_path, monkeypatch):
    """BatchNorm's statistics are averaged over the processes before they are judged and written."""
    make = MeanColour.__init__

    def with_norm(self, config, world):
        make(self, config, world)
        self.model.insert(1, torch.nn.BatchNorm1d(48))

    monkeypatch.setattr(MeanColour, "__init__", with_norm)
    monkeypatch.setattr(MeanColour, "content", lambda self: {})

    def train():
        seen = []
        evaluate = MeanColour.evaluate
        MeanColour.evaluate = lambda self, model: (
            seen.append(self.model[1].running_mean.clone()) or evaluate(self, model)
        )
        run(MeanColour, config(epochs=1, optim={"ema_decay": None}))
        return seen[0].numpy()

    one, other = run_ranks(train)
    assert np.array_equal(one, other)
