"""What training does to the weights, compared with the same written out in plain PyTorch."""

import csv
import random

import numpy as np
import pytest
import timm
import torch
import yaml
from support.ranks import run_ranks
from support.training import (
    MEAN,
    STD,
    learning_rate,
    numbers_of,
    recorded_batches,
    train_plainly,
    write_squares,
)

from vrwkv.classification import Config, load_config, train
from vrwkv.classification.evaluate import evaluate
from vrwkv.models.vrwkv import VisionRWKV

pytestmark = pytest.mark.usefixtures("no_curves")
PICTURES, EPOCHS, BATCH_SIZE = 16, 2, 2
ARGS = {"img_size": 16, "patch_size": 8, "depth": 2}
OPTIM = {"lr": 4e-3, "lr_batch_size": 16, "weight_decay": 0.1, "clip_grad": 0.5, "ema_decay": 0.6}
SCHEDULE = {"warmup_epochs": 1, "warmup_lr": 1e-4, "min_lr": 1e-5}
PLAIN = {"scale": [1, 1], "ratio": [1, 1], "hflip": 0.0, "color_jitter": 0.0, "label_smoothing": 0.1}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"), PICTURES)


@pytest.fixture
def make_config(squares, tmp_path):
    """A config without augmentation; keywords replace keys, or keys of sections."""

    def make(**changes):
        content = {
            "output": str(tmp_path / "output"),
            "epochs": EPOCHS,
            "seed": 3,
            "model": {"name": "test_vrwkv", "args": ARGS},
            "data": {"root": str(squares), "batch_size": BATCH_SIZE, "workers": 0, "mean": [*MEAN], "std": [*STD]},
            "augment": PLAIN,
            "optim": OPTIM,
            "schedule": SCHEDULE,
        }
        for name, value in changes.items():
            content[name] = {**content[name], **value} if isinstance(value, dict) else value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return load_config(Config, path)

    return make


def load(path):
    return torch.load(path, weights_only=True)


def initial_model(config):
    """The model as the run's first checkpoint would hold it: what `seed` gives."""
    for seeded in (torch.manual_seed, np.random.seed, random.seed):
        seeded(config.seed)
    return timm.create_model("test_vrwkv", num_classes=2, **config.model.args)


def expected_rates(updates_per_epoch, images_per_update):
    peak = OPTIM["lr"] * images_per_update / OPTIM["lr_batch_size"]
    total, warmup = EPOCHS * updates_per_epoch, updates_per_epoch
    return [learning_rate(i, peak, total, warmup, SCHEDULE["warmup_lr"], SCHEDULE["min_lr"]) for i in range(total + 1)]


def plainly(config, updates, rates):
    """The same training, by `support.training`."""
    return train_plainly(
        initial_model(config),
        updates,
        rates,
        weight_decay=OPTIM["weight_decay"],
        clip_grad=config.optim.clip_grad,
        optimizer_name=config.optim.name,
        decay=OPTIM["ema_decay"],
        ema_warmup=config.optim.ema_warmup,
        label_smoothing=PLAIN["label_smoothing"],
    )


@pytest.mark.parametrize(
    ("accumulate", "name", "clip_grad", "ema_warmup"),
    [(1, "adamw", 0.5, True), (3, "sgd", 1e3, False)],
    ids=["adamw", "accumulated-sgd"],
)
def test_updates(accumulate, name, clip_grad, ema_warmup, make_config, tmp_path):
    """Accumulation, clipping, weight decay, learning rate and averaging; of 16 pictures in steps of 2, 3 steps make an
    update of 6 and leave 4 pictures out."""
    settings = {"accumulate": accumulate, "name": name, "clip_grad": clip_grad, "ema_warmup": ema_warmup}
    config = make_config(optim={**OPTIM, **settings})
    with recorded_batches(VisionRWKV) as batches:
        train(config)
    steps = PICTURES // BATCH_SIZE // accumulate * accumulate
    assert len(batches) == EPOCHS * steps
    images = [batch.images for batch in batches]
    updates = [images[i : i + accumulate] for i in range(0, len(images), accumulate)]
    rates = expected_rates(steps // accumulate, BATCH_SIZE * accumulate)
    weights, average = plainly(config, updates, rates[:-1])

    content = load(tmp_path / "output" / "last.pth")
    torch.testing.assert_close(dict(content["state_dict"]), dict(weights), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(content["state_dict_ema"]), dict(average), rtol=1e-4, atol=1e-5)
    with open(tmp_path / "output" / "summary.csv") as file:
        logged = [float(row["lr"]) for row in csv.DictReader(file)]
    assert logged == pytest.approx([rates[steps // accumulate * epoch] for epoch in (1, 2)])


def test_each_epoch_sees_every_picture_once_in_another_order(make_config):
    with recorded_batches(VisionRWKV) as batches:
        train(make_config())
    numbers = numbers_of(torch.cat([batch.images for batch in batches]))
    first, second = numbers[:PICTURES], numbers[PICTURES:]
    assert sorted(first) == sorted(second) == list(range(PICTURES))
    assert first != second


def test_two_ranks(make_config, tmp_path):
    """Each has its own half of the pictures and its own random numbers; both make the update of all."""
    config = make_config(optim={**OPTIM, "accumulate": 2})

    def run():
        torch.set_num_threads(1)
        with recorded_batches(VisionRWKV) as batches:
            train(config)
        return [batch.images.numpy() for batch in batches], [batch.seed for batch in batches]

    (images0, seeds0), (images1, seeds1) = run_ranks(run)
    assert len(images0) == len(images1) == EPOCHS * 4
    by_epoch = [numbers_of(torch.from_numpy(np.concatenate(images0[i : i + 4] + images1[i : i + 4]))) for i in (0, 4)]
    assert all(sorted(numbers) == list(range(PICTURES)) for numbers in by_epoch)
    assert by_epoch[0] != by_epoch[1]
    assert len({*seeds0, *seeds1}) == 16

    pairs = [list(map(torch.from_numpy, pair)) for pair in zip(images0, images1, strict=True)]
    updates = [pairs[i] + pairs[i + 1] for i in range(0, len(pairs), 2)]
    weights, average = plainly(config, updates, expected_rates(2, 8)[:-1])
    content = load(tmp_path / "output" / "last.pth")
    torch.testing.assert_close(dict(content["state_dict"]), dict(weights), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(content["state_dict_ema"]), dict(average), rtol=1e-4, atol=1e-5)


def test_channels_last(make_config, tmp_path):
    """Pictures and kernels lie like that in memory, and the result is that of a run without."""
    found = []
    for channels_last in (False, True):
        config = make_config(model={"channels_last": channels_last})
        with recorded_batches(VisionRWKV) as batches:
            train(config, overwrite=True)
        content = load(tmp_path / "output" / "last.pth")
        found.append(content)
        kernels = [content[key]["patch_embed.proj.weight"] for key in ("state_dict", "state_dict_ema")]
        for tensor in [*kernels, *(batch.images for batch in batches)]:
            assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
    for key in ("state_dict", "state_dict_ema"):
        torch.testing.assert_close(dict(found[0][key]), dict(found[1][key]), rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_change_no_bit(make_config, tmp_path):
    found = []
    for every in (0, 2):
        config = make_config(model={"grad_checkpointing": every, "args": {**ARGS, "drop_path_rate": 0.5}})
        train(config, overwrite=True)
        found.append(load(tmp_path / "output" / "last.pth")["state_dict"])
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_seeds(make_config, tmp_path):
    """Another seed gives other weights, and each step has random numbers of its own."""
    runs = []
    for seed in (3, 4):
        config = make_config(seed=seed, output=str(tmp_path / str(seed)))
        with recorded_batches(VisionRWKV) as batches:
            train(config)
        runs.append((load(f"{config.output}/last.pth")["state_dict"], [batch.seed for batch in batches]))
    (weights3, seeds3), (weights4, seeds4) = runs
    assert not torch.equal(weights3["head.weight"], weights4["head.weight"])
    assert len({*seeds3, *seeds4}) == 2 * EPOCHS * PICTURES // BATCH_SIZE


def test_without_clipping_or_scaled_rate(make_config, tmp_path):
    """None leaves the gradients and the learning rate alone."""
    config = make_config(optim={"lr": 4e-3, "lr_batch_size": None, "clip_grad": None, "ema_decay": None})
    with recorded_batches(VisionRWKV) as batches:
        train(config)
    rates = [learning_rate(i, 4e-3, 16, 8, SCHEDULE["warmup_lr"], SCHEDULE["min_lr"]) for i in range(len(batches))]
    weights, _ = train_plainly(
        initial_model(config),
        [[batch.images] for batch in batches],
        rates,
        weight_decay=0.1,
        clip_grad=float("inf"),
        decay=0.0,
        label_smoothing=0.1,
    )
    content = load(tmp_path / "output" / "last.pth")
    torch.testing.assert_close(dict(content["state_dict"]), dict(weights), rtol=1e-4, atol=1e-5)
    assert "state_dict_ema" not in content


def test_validation_computes_in_the_format_of_the_training(make_config, monkeypatch):
    formats = []
    monkeypatch.setattr("vrwkv.classification.task.evaluate", lambda *args: formats.append(args[3]) or evaluate(*args))
    train(make_config(amp="bfloat16", epochs=1))
    assert formats == ["bfloat16"]
