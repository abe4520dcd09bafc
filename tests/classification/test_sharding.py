"""Training with the weights in shards, in two processes at once."""

import csv
import os
import shutil
import signal
from collections import OrderedDict

import pytest
import torch
import torch._dynamo  # takes a while: not in each process
from support.ranks import run_ranks
from torch import nn

from vrwkv.classification import Config, UserError, load_config, train, validate
from vrwkv.classification.task import ClassificationTask
from vrwkv.runtime import sharding, state
from vrwkv.runtime.errors import Interrupted
from vrwkv.runtime.processes import join_world
from vrwkv.runtime.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_curves")
SETTINGS = [
    "epochs=1",
    "data.batch_size=2",
    "model.args.depth=2",
    "model.grad_checkpointing=2",
    "augment.mixup=0.8",
    "optim.accumulate=2",
    "optim.clip_grad=0.1",
]
"""Four updates."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def make_config(config_path, folder):
    return lambda output, *settings: load_config(
        Config, config_path, [f"output={folder / output}", *SETTINGS, *settings]
    )


@pytest.fixture(scope="module")
def shares(make_config):
    """Leaves the folders of two runs, `copies` and `shards`; the share of the weights that each process of it held."""
    found = {}
    for name, settings in (("copies", []), ("shards", ["fsdp=true"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vrwkv.runtime.run_folder.draw_curves", lambda summary, picture, measures: picture.touch())
            found[name] = in_two_ranks(make_config(name, *settings))
    return found


def load(path):
    return torch.load(path, weights_only=True)


def in_two_ranks(config, resume=None):
    """Trains, and returns the share of the parameters that each process held."""
    models, create_optimizer = [], state.create_optimizer

    def recorded(model, *rest):
        models.append(model)
        return create_optimizer(model, *rest)

    def run():
        torch.set_num_threads(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state, "create_optimizer", recorded)
            train(config, resume)
        held = sum(sharding.local_part(parameter).numel() for parameter in models[0].parameters())
        return held / sum(parameter.numel() for parameter in models[0].parameters())

    return run_ranks(run)


def assert_close_runs(one, other, rtol=1e-4, atol=1e-5):
    a, b = load(one / "last.pth"), load(other / "last.pth")
    for key in ("state_dict", "state_dict_ema"):
        torch.testing.assert_close(dict(a[key]), dict(b[key]), rtol=rtol, atol=atol)
    torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=rtol, atol=atol)
    rows = []
    for folder in (one, other):
        with open(folder / "summary.csv") as file:
            rows.append([{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)])
    for row, expected in zip(*rows, strict=True):
        assert row == pytest.approx(expected, rel=max(rtol, 1e-9))


def test_shards_give_what_copies_give(shares, folder):
    """The losses, the weights, their averages and the optimizer's states; one process reads the checkpoint."""
    assert shares["copies"] == [1, 1]
    assert sum(shares["shards"]) == pytest.approx(1)
    assert max(shares["shards"]) < 0.75  # small parameters lie in the first process
    assert_close_runs(folder / "shards", folder / "copies")
    metrics = load(folder / "shards" / "best.pth")["metrics"]
    measured = validate(folder / "shards" / "best.pth", workers=0, device="cpu")
    for name in ("top1", "loss"):
        assert measured[name] == pytest.approx(metrics[name], rel=1e-4)


def interrupt_at(step):
    """Sends this process a signal in a step of the run."""
    training_step, steps = ClassificationTask.training_step, iter(range(1, 1000))

    def interrupted(self, model, batch):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return training_step(self, model, batch)

    ClassificationTask.training_step = interrupted


def test_resumed_run(shares, make_config, folder):
    """Has the bits of an unbroken one; copies go on where shards stopped."""

    def interrupted():
        if os.environ["RANK"] == "1":
            interrupt_at(1)
        with pytest.raises(Interrupted):
            train(make_config("broken", "fsdp=true"))

    run_ranks(interrupted)
    stopped = folder / "stopped.pth"
    shutil.copy(folder / "broken" / "last.pth", stopped)
    assert (load(stopped)["epoch"], load(stopped)["step"]) == (0, 2)
    in_two_ranks(make_config("broken", "fsdp=true"), "auto")
    assert_close_runs(folder / "broken", folder / "shards", rtol=0, atol=0)
    in_two_ranks(make_config("resumed copies"), str(stopped))
    assert_close_runs(folder / "resumed copies", folder / "copies")


def test_signal_during_the_evaluation(make_config):
    """Waits for its end: to save, all processes must be at the same place. The model has buffers, which are whole."""
    network = ["model.name=test_resnet", "model.args={}", "model.grad_checkpointing=0"]
    config = make_config("signalled", "fsdp=true", "epochs=2", "data.batch_size=8", *network)

    def signalled():
        evaluate = ClassificationTask.evaluate

        def kill(self, model):
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(self, model)

        ClassificationTask.evaluate = kill
        with pytest.raises(Interrupted) as caught:
            train(config)
        return str(caught.value)

    stopped = "saved after 2 of 2 steps of epoch 2"
    assert run_ranks(signalled) == [f"signal to another process: {stopped}", f"SIGTERM: {stopped}"]


def test_trained_after_an_evaluation():
    """Which comes first where a run is resumed at the end of an epoch."""

    def gradient():
        with join_world("cpu") as world:
            model = nn.Sequential(OrderedDict(blocks=nn.Sequential(nn.Linear(3, 3, bias=False))))
            sharding.shard(model, world)
            with torch.inference_mode():
                model(torch.ones(1, 3))
            model(torch.ones(1, 3)).sum().backward()
            return model.blocks[0].weight.grad.full_tensor().tolist()

    assert run_ranks(gradient) == [[[1.0] * 3] * 3] * 2


def error_of(config):
    with pytest.raises(UserError) as caught:
        train(config, overwrite=True)
    return str(caught.value)


def test_one_process_has_nobody_to_share_with(make_config):
    assert error_of(make_config("out", "fsdp=true")).startswith("fsdp shards a model over several processes: torchrun ")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.channels_last=true", "fsdp shards parameters that are contiguous in memory: leave out "),
        ("optim.name=adafactor", "fsdp needs an optimizer that works on shards, which optim.name is not: "),
    ],
)
def test_what_is_refused(setting, message, make_config):
    """By both processes."""
    config = make_config("out", "fsdp=true", "optim.ema_decay=null", setting)
    assert all(error.startswith(message) for error in run_ranks(lambda: error_of(config)))


def test_weight_in_one_shard_that_is_not_finite(make_config):
    """Both processes notice."""
    config = make_config("out", "fsdp=true", "save.minutes=1e-9")

    def spoil():
        update = Trainer._update

        def spoiled(self):
            update(self)
            with torch.no_grad():
                sharding.local_part(self.task.model.pos_embed).fill_(torch.inf)  # has one row, in the first process

        Trainer._update = spoiled
        return error_of(config)

    assert all(error.startswith("weights became infinite in epoch 1") for error in run_ranks(spoil))
