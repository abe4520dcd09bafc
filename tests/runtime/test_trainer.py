"""The training loop with a task that is not about classes."""

import csv
import errno
import itertools
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import mean_colour
from support.mean_colour import MeanColour
from support.runs import assert_same_run, killed, load, signal_at_step

from vrwkv.runtime.errors import Interrupted, UserError
from vrwkv.runtime.progress import Meters
from vrwkv.runtime.recipe import WatchConfig
from vrwkv.runtime.state import TrainingState
from vrwkv.runtime.trainer import Trainer, run

pytestmark = pytest.mark.usefixtures("no_curves")


def test_task_is_short():
    assert len(Path(mean_colour.__file__).read_text().splitlines()) < 60


def test_it_learns_and_leaves_its_files(config, tmp_path, capsys):
    assert run(MeanColour, config(epochs=15)) == tmp_path / "output" / "best.pth"
    assert {path.name for path in (tmp_path / "output").iterdir()} == {
        "best.pth",
        "last.1.pth",
        "config.yaml",
        "curves.png",
        "last.pth",
        "summary.csv",
    }
    with open(tmp_path / "output" / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    names = [f"{part}_{name}" for part in ("train", "eval") for name in ("loss", "error", "near")]
    assert list(rows[0]) == ["epoch", *names, "lr"]
    assert float(rows[-1]["eval_loss"]) < 0.5 * float(rows[0]["eval_loss"])
    content = load(tmp_path / "output" / "last.pth")
    assert content["inputs"] == 48
    assert content["metrics"] == {name: float(rows[-1][f"eval_{name}"]) for name in ("loss", "error", "near")}
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("epoch 15/15: training loss 0.0")
    for text in ("largest error 0.", "near "):
        assert said[-1].count(text) == 2
    assert "accuracy" not in said[-1]


def measured(task: MeanColour, error: float = 0, near: float = 0) -> Meters:
    """Of an evaluation of one sample."""
    meters = Meters(task.measures, task.world)
    meters.update({"loss": torch.zeros(()), "error": torch.tensor(error), "near": torch.tensor(near)}, 1)
    return meters


@pytest.mark.parametrize("step", [1, 4, 6, 12])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_signal_ends_the_step_and_the_run_goes_on_with_the_same_bits(name, step, config, tmp_path, monkeypatch):
    """Also between two accumulated steps, of which the second is still done, and in the last step of the run."""
    optim = {"accumulate": 2}
    run(MeanColour, config("unbroken", optim=optim))
    done = step + step % 2
    epoch, within = (done - 1) // 4 + 1, (done - 1) % 4 + 1
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.Signals[name], step)
        with pytest.raises(Interrupted, match=f"^{name}: saved after {within} of 4 steps of epoch {epoch}$"):
            run(MeanColour, config("broken", optim=optim))
    last = load(tmp_path / "broken" / "last.pth")
    assert (last["epoch"], last["step"]) == (epoch - 1, within)
    run(MeanColour, config("broken", optim=optim), resume="auto")
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_signal_during_the_evaluation(config, tmp_path, monkeypatch):
    """Does not wait for its end; only the evaluation is repeated."""
    run(MeanColour, config("unbroken"))

    with monkeypatch.context() as patch:
        patch.setattr(MeanColour, "evaluate", killed)
        with pytest.raises(Interrupted, match=r"^SIGTERM: saved after 4 of 4 steps of epoch 1$"):
            run(MeanColour, config("broken"))
        patch.setattr(MeanColour, "training_step", lambda *_: 1 / 0)
        with pytest.raises(Interrupted):  # no step is repeated
            run(MeanColour, config("broken"), resume="auto")
    run(MeanColour, config("broken"), resume="auto")
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_signal_before_the_training(config, tmp_path, monkeypatch):
    def make(config, world):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the preparations went on")

    with pytest.raises(Interrupted, match=r"^SIGTERM$"):
        run(make, config())
    assert not (tmp_path / "output").exists()


def test_disk_that_fills_within_an_epoch(config, tmp_path, monkeypatch):
    run(MeanColour, config("unbroken"))
    writes, save = itertools.count(1), torch.save

    def fill(state, file):
        if next(writes) == 4:
            file.write(b"x" * 1000)
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    keys = {"save": {"minutes": 1e-9}}
    with monkeypatch.context() as patch:
        patch.setattr("vrwkv.runtime.checkpoint.torch.save", fill)
        with pytest.raises(UserError, match=r"cannot write .*last.pth: .*No space left on device"):
            run(MeanColour, config("broken", **keys))
    states = [load(tmp_path / "broken" / name)["step"] for name in ("last.pth", "last.1.pth")]
    assert states == [2, 1]
    assert not list((tmp_path / "broken").glob("*.tmp"))
    run(MeanColour, config("broken", **keys), resume="auto")
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_what_is_said_at_the_start_and_after_some_steps(config, monkeypatch, capsys):
    seconds_per_step(monkeypatch, 2)
    monkeypatch.setattr("vrwkv.runtime.trainer.ESTIMATE_AFTER", 10)
    run(MeanColour, config(epochs=6, optim={"accumulate": 2}))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "8 images per update, lr 0.05, 0.00 M parameters"
    assert "2 s per step: 0:00:48 for the whole run, 0:00:28 left" in lines


def test_scalars_for_tensorboard(config, tmp_path, monkeypatch):
    """Interrupted and resumed, each update has one value."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr("vrwkv.runtime.trainer.WATCH_EVERY", 2)
    watched = {"watch": WatchConfig(tensorboard=True), "save": {"minutes": None}}
    with monkeypatch.context() as patch:
        patch.setattr(MeanColour, "training_step", count_down(7, MeanColour.training_step))
        with pytest.raises(ZeroDivisionError):
            run(MeanColour, config(**watched))
    run(MeanColour, config(**watched), resume="auto")
    events = accumulator.EventAccumulator(str(tmp_path / "output")).Reload()
    assert [each.step for each in events.Scalars("train_loss")] == [2, 4, 6, 8, 10, 12]
    assert [each.step for each in events.Scalars("eval_error")] == [4, 8, 12]
    with open(tmp_path / "output" / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    found = [each.value for each in events.Scalars("eval_error")]
    assert found == pytest.approx([float(row["eval_error"]) for row in rows])


def count_down(steps, training_step):
    left = iter(range(steps))

    def step(self, model, batch):
        if next(left, None) is None:
            1 / 0  # noqa: B018
        return training_step(self, model, batch)

    return step


def test_scalars_for_wandb(config, tmp_path, monkeypatch):
    logged, finished = [], []
    log = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: finished.append(1))
    fake = SimpleNamespace(init=lambda **keys: logged.append(keys["project"]) or log, __spec__=None)
    monkeypatch.setattr("vrwkv.runtime.watch.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(MeanColour, config(epochs=2, watch=WatchConfig(wandb="colours")))
    assert logged[0] == "colours"
    assert [step for step, values in logged[1:] if "eval_loss" in values] == [4, 8]
    assert finished == [1]


def test_each_run_has_a_name_at_wandb_that_resumptions_keep(config, tmp_path, monkeypatch):
    names = []
    run_there = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    fake = SimpleNamespace(init=lambda **keys: names.append(keys["id"]) or run_there, __spec__=None)
    monkeypatch.setattr("vrwkv.runtime.watch.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    watch = WatchConfig(wandb="colours")
    run(MeanColour, config(epochs=1, watch=watch))
    run(MeanColour, config(epochs=2, watch=watch), resume="auto")
    run(MeanColour, config(epochs=1, watch=watch), overwrite=True)
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_scalars_for_what_is_not_installed(name, config, tmp_path, monkeypatch):
    monkeypatch.setattr("vrwkv.runtime.watch.find_spec", lambda name: None)
    watch = WatchConfig(**{name: {"tensorboard": True, "wandb": "colours"}[name]})
    with pytest.raises(UserError, match=f"^watch.{name} needs {name}: pip install {name}$"):
        run(MeanColour, config(watch=watch))
    assert not (tmp_path / "output").exists()


def seconds_per_step(monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    now, training_step = [0], MeanColour.training_step

    def step(self, model, batch):
        now[0] += seconds
        return training_step(self, model, batch)

    monkeypatch.setattr(MeanColour, "training_step", step)
    monkeypatch.setattr("time.monotonic", lambda: now[0])


def test_saved_every_few_minutes(config, tmp_path, monkeypatch):
    """And after each epoch; as many earlier ones are kept as asked for."""
    saved = []
    content = TrainingState.content
    monkeypatch.setattr(
        TrainingState, "content", lambda self, *args: saved.append((self.epoch, self.step)) or content(self, *args)
    )
    seconds_per_step(monkeypatch, 20)
    run(MeanColour, config(epochs=2, save={"minutes": 1, "keep": 3}))
    assert [each for each in saved if each[1]] == [(0, 3), (1, 3)]
    names = ["last.pth", "last.1.pth", "last.2.pth", "last.3.pth"]
    states = [load(tmp_path / "output" / name) for name in names]
    assert [(each["epoch"], each["step"]) for each in states] == [(2, 0), (1, 3), (1, 0), (0, 3)]
    assert not (tmp_path / "output" / "last.4.pth").exists()


def test_without_minutes_only_epochs_are_saved(config, tmp_path, monkeypatch):
    seconds_per_step(monkeypatch, 1000)
    run(MeanColour, config(epochs=2, save={"minutes": None, "keep": 9}))
    states = [load(path) for path in (tmp_path / "output").glob("last*.pth")]
    assert sorted((each["epoch"], each["step"]) for each in states) == [(0, 0), (1, 0), (2, 0)]


def test_lowest_error_is_best(config, tmp_path, monkeypatch):
    """The judge's value decides, a later epoch of the same value is better, and the averaged weights are judged."""
    errors, judged = iter([0.5, 0.25, 0.375, 0.25, 0.28125]), []

    def evaluate(self, model):
        judged.append((model is not self.model, model.training))
        return measured(self, error=next(errors))

    monkeypatch.setattr(MeanColour, "evaluate", evaluate)
    best = load(run(MeanColour, config(epochs=5)))
    assert (best["epoch"], best["best_metric"]) == (4, 0.25)
    last = load(tmp_path / "output" / "last.pth")
    assert (last["epoch"], last["best_metric"]) == (5, 0.25)
    assert judged == [(True, False)] * 5


def test_error_that_is_no_number_is_never_the_best(config, tmp_path, monkeypatch):
    """Whatever else there is is better; until then the run can be resumed, too."""
    errors = iter([float("nan"), float("nan"), 0.5, float("nan")])
    monkeypatch.setattr(MeanColour, "evaluate", lambda self, model: measured(self, error=next(errors)))
    path = run(MeanColour, config(epochs=1))
    assert load(path)["best_metric"] is None
    best = load(run(MeanColour, config(epochs=4), resume="auto"))
    assert (best["epoch"], best["best_metric"]) == (3, 0.5)


def test_without_averages_the_weights_are_judged(config, monkeypatch):
    judged = []
    evaluate = MeanColour.evaluate
    monkeypatch.setattr(
        MeanColour, "evaluate", lambda self, model: judged.append(model is self.model) or evaluate(self, model)
    )
    run(MeanColour, config(epochs=1, optim={"ema_decay": None}))
    assert judged == [True]


def test_highest_share_is_best(config, monkeypatch):
    shares = iter([0.125, 0.5, 0.25])
    monkeypatch.setattr(MeanColour, "judge", MeanColour.measures[2])
    monkeypatch.setattr(MeanColour, "evaluate", lambda self, model: measured(self, near=next(shares)))
    best = load(run(MeanColour, config()))
    assert (best["epoch"], best["best_metric"]) == (2, 50.0)


def test_best_of_another_folder_does_not_count(config, tmp_path, monkeypatch):
    """Resumed into a new folder, the next epoch is the best there."""
    errors = iter([0.125, 0.5])
    monkeypatch.setattr(MeanColour, "evaluate", lambda self, model: measured(self, error=next(errors)))
    run(MeanColour, config("one", epochs=1))
    best = load(run(MeanColour, config("other", epochs=2), resume=str(tmp_path / "one" / "last.pth")))
    assert (best["epoch"], best["best_metric"]) == (2, 0.5)


def test_best_of_the_same_folder_counts(config, monkeypatch):
    errors = iter([0.125, 0.5])
    monkeypatch.setattr(MeanColour, "evaluate", lambda self, model: measured(self, error=next(errors)))
    run(MeanColour, config(epochs=1))
    best = load(run(MeanColour, config(epochs=2), resume="auto"))
    assert (best["epoch"], best["best_metric"]) == (1, 0.125)


def test_resume_of_another_content(config, tmp_path):
    run(MeanColour, config(epochs=1))
    path = tmp_path / "output" / "last.pth"
    torch.save({**load(path), "inputs": 12}, path)
    with pytest.raises(UserError, match=f"checkpoint {path} is of another run: inputs"):
        run(MeanColour, config(), resume="auto")


def test_loss_that_is_not_finite(config, tmp_path):
    with pytest.raises(
        UserError, match=r"the loss became (nan|inf) in epoch 1: .*last.pth holds the last state before"
    ):
        run(MeanColour, config(optim={"lr": 1e30}))
    assert load(tmp_path / "output" / "last.pth")["epoch"] == 0


def test_advice_after_a_loss_that_is_not_finite(config, tmp_path, capsys):
    """Can be followed; what is changed is said."""
    with pytest.raises(UserError, match=r"try a lower optim.lr, or optim.clip_grad, with --resume; "):
        run(MeanColour, config(optim={"lr": 1e30}))
    run(MeanColour, config(epochs=4, optim={"clip_grad": 1.0}), resume="auto")
    changes = "epochs was 3, is 4; optim.lr was 1e+30, is 0.05; optim.clip_grad was None, is 1.0"
    said = capsys.readouterr().err
    assert f"changed since checkpoint {tmp_path / 'output' / 'last.pth'}: {changes}\n" in said
    assert "4 images per update, lr 0.05, " in said
    assert load(tmp_path / "output" / "last.pth")["epoch"] == 4


def test_weights_that_are_not_finite_are_not_saved(config, tmp_path, monkeypatch):
    """The next loss would not be finite: the state before is kept, and the run can go on from it."""
    run(MeanColour, config("unbroken"))
    update = Trainer._update

    def spoil(self):
        update(self)
        if self.state.updates == 6:
            self.task.model[2].bias.data[1] = float("inf")

    keys = {"save": {"minutes": 1e-9}}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", spoil)
        with pytest.raises(UserError, match=r"weights became infinite in epoch 2: try .*last.pth holds the last state"):
            run(MeanColour, config("broken", **keys))
    last = load(tmp_path / "broken" / "last.pth")
    assert (last["epoch"], last["step"]) == (1, 1)
    run(MeanColour, config("broken", **keys), resume="auto")
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


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
