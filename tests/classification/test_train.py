"""Training: what it leaves, resuming, and its options."""

import csv
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import timm
import torch
from support.colours import write_images
from support.ranks import Forked

pytestmark = pytest.mark.usefixtures("no_curves")


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same(one: object, other: object) -> None:
    """Bit equality of nested states."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


TRAINED = ("state_dict", "state_dict_ema", "optimizer", "scaler", "epoch", "metrics", "best_metric")


def test_output_files(run):
    names = {"best.pth", "config.yaml", "curves.png", "last.1.pth", "last.pth", "summary.csv"}
    assert {path.name for path in run.iterdir()} == names
    with open(run / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["eval_top1"]) <= 100
    assert float(rows[1]["lr"]) < float(rows[0]["lr"])


def test_checkpoint_content(run):
    content = load(run / "best.pth")
    assert content["arch"] == "test_vrwkv"
    assert content["class_names"] == ["blue", "green", "red"]
    assert content["data_config"]["input_size"] == (3, 16, 16)
    assert load(run / "last.pth")["epoch"] == 2


def test_checkpoint_loads_with_timm(run):
    content = load(run / "best.pth")
    model = timm.create_model(content["arch"], checkpoint_path=str(run / "best.pth"), **content["model_args"])
    assert_same(dict(model.state_dict()), dict(content["state_dict_ema"]))


STOCHASTIC = [
    "data.workers=2",
    "data.batch_size=4",
    "epochs=3",
    "optim.accumulate=2",
    "optim.ema_decay=0.9",
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "augment.erase_prob=0.5",
    "augment.auto_augment=rand-m9-mstd0.5-inc1",
]
"""All that draws random numbers, and all that has a state."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, train, train_args):
    """The output folder of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("unbroken") / "output"
    assert train(train_args(output, *STOCHASTIC)) == 0
    return output


def assert_same_run(one, other):
    a, b = load(one / "last.pth"), load(other / "last.pth")
    for key in TRAINED:
        assert_same(a[key], b[key])
    assert (one / "summary.csv").read_bytes() == (other / "summary.csv").read_bytes()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_number_of_workers_does_not_matter(workers, unbroken, tmp_path, train, train_args):
    assert train(train_args(tmp_path, *STOCHASTIC, f"data.workers={workers}")) == 0
    assert_same_run(unbroken, tmp_path)


def wait_for_states(path, count):
    """Until a file was written so many times."""
    for _ in range(count):
        before = path.exists() and path.stat().st_mtime_ns
        while (path.exists() and path.stat().st_mtime_ns) == before:
            time.sleep(1e-3)


def test_killed_at_any_moment(unbroken, tmp_path, train, train_args):
    """After some steps, in the middle of accumulation, of an update or of a file; each time it is resumed."""
    argv = [*train_args(tmp_path, *STOCHASTIC, "save.minutes=1e-9"), "--resume", "auto"]
    generator, resumed = random.Random(0), []
    for _ in range(4):
        process = Forked(lambda: train(argv))
        for line in process.stderr:
            if line.startswith(("resuming from", "no ")):
                resumed.append(line)
                break
        wait_for_states(tmp_path / "last.pth", generator.randint(1, 2))
        time.sleep(generator.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert train(argv) == 0
    assert any(" steps" in line for line in resumed)
    assert_same_run(unbroken, tmp_path)


def test_resume_auto_without_checkpoint_starts_anew(tmp_path, train, train_args, capsys):
    assert train([*train_args(tmp_path, "epochs=1"), "--resume"]) == 0
    assert "starting anew" in capsys.readouterr().err


def test_resume_path_writes_to_own_output(run, tmp_path, train, train_args):
    assert train([*train_args(tmp_path, "epochs=3"), "--resume", str(run / "last.pth")]) == 0
    assert load(tmp_path / "last.pth")["epoch"] == load(tmp_path / "best.pth")["epoch"] == 3
    assert load(run / "last.pth")["epoch"] == 2


def test_finished_run_is_left_alone(run, train, train_args, capsys):
    before = (run / "last.pth").stat().st_mtime_ns
    assert train([*train_args(run), "--resume"]) == 0
    assert (run / "last.pth").stat().st_mtime_ns == before
    assert str(run / "best.pth") in capsys.readouterr().out


def test_fine_tuning_takes_all_but_the_head(run, tmp_path, train, train_args, data_root):
    two_classes = tmp_path / "data"
    for split in ("train", "val"):
        for name in ("blue", "red"):
            (two_classes / split).mkdir(parents=True, exist_ok=True)
            (two_classes / split / name).symlink_to(data_root / split / name)
    settings = [
        f"data.root={two_classes}",
        f"model.checkpoint={run / 'best.pth'}",
        "optim.lr=0",
        "schedule.warmup_lr=0",
    ]
    assert train(train_args(tmp_path / "output", *settings, "epochs=1")) == 0
    before, after = load(run / "best.pth")["state_dict_ema"], load(tmp_path / "output" / "last.pth")["state_dict"]
    assert [key for key in after if not torch.equal(before[key], after[key])] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    "settings",
    [
        ["amp=bfloat16", "model.grad_checkpointing=true"],
        ["model.grad_checkpointing=2", "model.channels_last=true", "model.args.drop_path_rate=0.5"],
        ["optim.clip_grad=1.0", "augment.auto_augment=rand-m5", "optim.ema_decay=null", "optim.lr_batch_size=16"],
        ["model.args.in_chans=1", "augment.cutmix=1.0", "data.img_size=24", "optim.name=sgd", "schedule.name=constant"],
    ],
    ids=lambda settings: settings[0],
)
def test_options(settings, tmp_path, train, validate, train_args):
    assert train(train_args(tmp_path, "epochs=1", *settings)) == 0
    assert validate(["--checkpoint", str(tmp_path / "best.pth"), "--workers", "0"]) == 0


def test_training_that_diverges_keeps_the_last_good_state(tmp_path, train, train_args, error):
    message = error(train, train_args(tmp_path, "optim.lr=1e30", "optim.ema_decay=null"))
    assert "loss became nan in epoch" in message
    assert all(value.isfinite().all() for value in load(tmp_path / "last.pth")["state_dict"].values())


def test_no_control_characters_where_stderr_is_no_terminal(tmp_path, train, train_args, capfd):
    assert train(train_args(tmp_path, "epochs=1")) == 0
    text = capfd.readouterr().err
    assert "epoch 1/1: training loss" in text
    assert not set(text) & {"\r", "\x1b"}


def test_resumed_with_another_learning_rate(run, tmp_path, train, train_args):
    """It is what all layers are then trained with, each with its scale."""
    layers = ["optim.layer_decay=0.5", "schedule.warmup_epochs=1", "epochs=3", "save.keep=2"]
    assert train(train_args(tmp_path / "one", *layers)) == 0
    other = [*layers, "optim.lr=1e-3"]
    assert train(train_args(tmp_path / "other", *other)) == 0
    argv = [*train_args(tmp_path / "resumed", *other), "--resume", str(tmp_path / "one" / "last.2.pth")]
    assert train(argv) == 0
    one, other, resumed = (load(tmp_path / name / "last.1.pth") for name in ("one", "other", "resumed"))
    groups = [
        [(group["lr"], group["initial_lr"], group["lr_scale"]) for group in each["optimizer"]["param_groups"]]
        for each in (one, other, resumed)
    ]
    assert groups[2] == groups[1] != groups[0]
    assert len({scale for *_, scale in groups[2]}) > 2
    assert min(lr for lr, *_ in groups[2]) > 0


def test_resumed_with_other_pictures(tmp_path, train, train_args, error):
    """Refused, with how many there were and are; a checkpoint that does not say is taken. Folders may become zips."""
    root = write_images(tmp_path / "data")
    settings = [f"data.root={root}", "epochs=1"]
    assert train(train_args(tmp_path / "one", *settings)) == 0
    last = tmp_path / "one" / "last.pth"
    argv = [*train_args(tmp_path / "other", f"data.root={root}"), "--resume", str(last)]
    for split in ("train", "val"):
        shutil.make_archive(str(tmp_path / "zips" / split), "zip", root / split)
    zipped = train_args(tmp_path / "zipped", f"data.root={tmp_path / 'zips'}")
    assert train([*zipped, "--resume", str(last)]) == 0
    (root / "val" / "red" / "0.png").rename(root / "val" / "red" / "00.png")
    assert "is of another run: the data were 36 pictures named " in error(train, argv)
    (root / "val" / "red" / "00.png").rename(root / "val" / "red" / "0.png")
    (root / "train" / "red" / "0.png").unlink()
    assert re.search(
        r"the data were 36 pictures .* for training, .*, are 35 pictures .* for training", error(train, argv)
    )
    content = load(last)
    del content["data"]
    torch.save(content, last)
    assert train(argv) == 0
