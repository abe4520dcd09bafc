"""Runs of `MeanColour`: what they leave, whether two are the same, and signals on the way."""

import itertools
import os
import signal
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from support.mean_colour import MeanColour


def load(path: Path) -> dict:
    """The content of a checkpoint."""
    return torch.load(path, weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """Two output folders hold the same bits."""
    assert (one / "summary.csv").read_bytes() == (other / "summary.csv").read_bytes()
    for name in ("last.pth", "best.pth"):
        a, b = load(one / name), load(other / name)
        for key in ("epoch", "step", "metrics", "best_metric"):
            assert a[key] == b[key]
        for key in ("state_dict", "state_dict_ema"):
            assert all(torch.equal(value, b[key][name]) for name, value in a[key].items())


def signal_at_step(monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """Sends this process a signal in a step, counted from 1, of the whole run."""
    steps, training_step = itertools.count(1), MeanColour.training_step

    def signalled(self, model, batch):
        if next(steps) == step:
            os.kill(os.getpid(), number)
        return training_step(self, model, batch)

    monkeypatch.setattr(MeanColour, "training_step", signalled)


def killed(task, model) -> NoReturn:
    """In place of `evaluate`: the process gets SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("the evaluation went on")
