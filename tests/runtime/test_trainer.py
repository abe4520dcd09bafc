"""The training loop with a task that is not about classes."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import mean_colour
from support.mean_colour import MeanColour, MeanColourConfig
from support.ranks import run_ranks

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.recipe import OptimConfig
from vrwkv.runtime.trainer import Trainer, run

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture
def config(tmp_path) -> Callable[..., MeanColourConfig]:
    def make(output="output", epochs=3, optim=None, **keys):
        optim = OptimConfig(**{"lr": 0.05, "ema_decay": 0.5, **(optim or {})})
        return MeanColourConfig(output=str(tmp_path / output), epochs=epochs, optim=optim, device="cpu", **keys)

    return make


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_task_is_short():
    assert len(Path(mean_colour.__file__).read_text().splitlines()) < 60


def test_it_learns_and_leaves_its_files(config, tmp_path, capsys):
    assert run(MeanColour, config(epochs=10)) == tmp_path / "output" / "best.pth"
    assert {path.name for path in (tmp_path / "output").iterdir()} == {
        "best.pth",
        "curves.png",
        "last.pth",
        "summary.csv",
    }
    with open(tmp_path / "output" / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    names = [f"{part}_{name}" for part in ("train", "eval") for name in ("loss", "error", "near")]
    assert list(rows[0]) == ["epoch", *names[:3], "train_images_per_second", *names[3:], "lr"]
    assert float(rows[-1]["eval_loss"]) < 0.5 * float(rows[0]["eval_loss"])
    content = load(tmp_path / "output" / "last.pth")
    assert content["inputs"] == 48
    assert content["metrics"] == {name: float(rows[-1][f"eval_{name}"]) for name in ("loss", "error", "near")}
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("epoch 10/10: training loss 0.0")
    for text in ("largest error 0.", "near "):
        assert said[-1].count(text) == 2
    assert "accuracy" not in said[-1]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    write = Trainer._write

    def write_then_stop(self, *args):
        write(self, *args)
        if self.epoch == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_write", write_then_stop)


@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_run_has_the_bits_of_an_unbroken_one(stop, config, tmp_path, monkeypatch):
    run(MeanColour, config("unbroken"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, stop)
        run(MeanColour, config("broken"))
    run(MeanColour, config("broken"), resume="auto")
    for name in ("last.pth", "best.pth"):
        one, other = load(tmp_path / "unbroken" / name), load(tmp_path / "broken" / name)
        assert one["epoch"] == other["epoch"]
        assert one["metrics"] == other["metrics"]
        assert one["best_metric"] == other["best_metric"]
        for key in ("state_dict", "state_dict_ema"):
            assert all(torch.equal(value, other[key][name]) for name, value in one[key].items())


def test_lowest_error_is_best(config, tmp_path, monkeypatch):
    """The judge's value decides, a later epoch of the same value is better, and the averaged weights are judged."""
    errors, judged = iter([0.5, 0.3, 0.4, 0.3, 0.31]), []

    def evaluate(self, model):
        judged.append((model is not self.model, model.training))
        return {"loss": 0.0, "error": next(errors), "near": 0.0}

    monkeypatch.setattr(MeanColour, "evaluate", evaluate)
    best = load(run(MeanColour, config(epochs=5)))
    assert (best["epoch"], best["best_metric"]) == (4, 0.3)
    last = load(tmp_path / "output" / "last.pth")
    assert (last["epoch"], last["best_metric"]) == (5, 0.3)
    assert judged == [(True, False)] * 5


def test_without_averages_the_weights_are_judged(config, monkeypatch):
    judged = []
    evaluate = MeanColour.evaluate
    monkeypatch.setattr(
        MeanColour, "evaluate", lambda self, model: judged.append(model is self.model) or evaluate(self, model)
    )
    run(MeanColour, config(epochs=1, optim={"ema_decay": None}))
    assert judged == [True]


def test_highest_share_is_best(config, monkeypatch):
    shares = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(MeanColour, "judge", MeanColour.measures[2])
    monkeypatch.setattr(MeanColour, "evaluate", lambda self, model: {"loss": 0, "error": 0, "near": next(shares)})
    best = load(run(MeanColour, config()))
    assert (best["epoch"], best["best_metric"]) == (2, 30.0)


def test_best_of_another_folder_does_not_count(config, tmp_path, monkeypatch):
    """Resumed into a new folder, the next epoch is the best there."""
    errors = iter([0.1, 0.5])
    monkeypatch.setattr(MeanColour, "evaluate", lambda self, model: {"loss": 0, "error": next(errors), "near": 0})
    run(MeanColour, config("one", epochs=1))
    best = load(run(MeanColour, config("other", epochs=2), resume=str(tmp_path / "one" / "last.pth")))
    assert (best["epoch"], best["best_metric"]) == (2, 0.5)


def test_best_of_the_same_folder_counts(config, monkeypatch):
    errors = iter([0.1, 0.5])
    monkeypatch.setattr(MeanColour, "evaluate", lambda self, model: {"loss": 0, "error": next(errors), "near": 0})
    run(MeanColour, config(epochs=1))
    best = load(run(MeanColour, config(epochs=2), resume="auto"))
    assert (best["epoch"], best["best_metric"]) == (1, 0.1)


def test_resume_of_another_content(config, tmp_path):
    run(MeanColour, config(epochs=1))
    path = tmp_path / "output" / "last.pth"
    torch.save({**load(path), "inputs": 12}, path)
    with pytest.raises(UserError, match=f"checkpoint {path} is of another run: inputs"):
        run(MeanColour, config(), resume="auto")


def test_resume_with_more_processes(config, tmp_path):
    run(MeanColour, config(epochs=1))
    with pytest.raises(RuntimeError, match=r"UserError.*the number of processes was 1, is 2"):
        run_ranks(lambda: run(MeanColour, config(), resume="auto"))


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


def test_loss_that_is_not_finite(config, tmp_path):
    with pytest.raises(UserError, match=r"the loss became (nan|inf) in epoch 1: .*last.pth holds the state before"):
        run(MeanColour, config(optim={"lr": 1e30}))
    assert load(tmp_path / "output" / "last.pth")["epoch"] == 0


def test_too_few_samples_for_an_update(config):
    with pytest.raises(UserError, match="the training data fill batches of 16 samples; one update needs 20"):
        run(MeanColour, config(optim={"accumulate": 5}))


def test_min_lr_above_lr(config):
    from vrwkv.runtime.recipe import ScheduleConfig

    with pytest.raises(UserError, match=r"min_lr must not be above the learning rate of 0\.05, not 0\.5"):
        run(MeanColour, config(schedule=ScheduleConfig(min_lr=0.5)))


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_amp(amp, config, monkeypatch):
    dtypes = set()
    step = MeanColour.training_step

    def training_step(self, model, batch):
        dtypes.add(model(batch[0]).dtype)
        return step(self, model, batch)

    monkeypatch.setattr(MeanColour, "training_step", training_step)
    content = load(run(MeanColour, config(amp=amp)))
    assert dtypes == {getattr(torch, amp)}
    assert bool(content["scaler"]) == (amp == "float16")
