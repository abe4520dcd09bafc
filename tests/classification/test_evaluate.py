"""What evaluation measures, compared with the same written out in plain PyTorch."""

import pytest
import timm
import torch
from support.ranks import run_ranks
from support.training import MEAN, STD, normalise, square, write_squares
from torch import nn

from vrwkv.classification.config import DataConfig
from vrwkv.classification.data import create_eval_loader
from vrwkv.classification.evaluate import evaluate
from vrwkv.classification.folder import ImageFolder
from vrwkv.runtime.processes import join_world

PICTURES, CLASSES = 8, 8
SETTINGS = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": MEAN,
    "std": STD,
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"), PICTURES, CLASSES)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = timm.create_model("test_vrwkv", img_size=16, patch_size=8, num_classes=CLASSES, drop_rate=0.5)
    nn.init.normal_(model.head.weight)
    return model.train()


@pytest.fixture(scope="module")
def expected(model):
    model.eval()
    with torch.no_grad():
        logits = model(torch.stack([normalise(square(i)) for i in range(PICTURES)]))
    target = torch.arange(PICTURES)
    order = logits.argsort(1, descending=True)
    return {
        "loss": nn.functional.cross_entropy(logits, target).item(),
        "top1": 100 * (order[:, 0] == target).float().mean().item(),
        "top5": 100 * (order[:, :5] == target[:, None]).any(1).float().mean().item(),
    }


def run(folder, model, batch_size, amp="none"):
    with join_world("cpu") as world:
        data = DataConfig(root="unused", batch_size=batch_size, workers=0)
        names = [f"class{i}" for i in range(CLASSES)]
        loader = create_eval_loader(ImageFolder(folder, "val"), names, SETTINGS, data, world)
        meters = evaluate(model.train(), loader, world, amp)
        return meters.values(meters.gather())


@pytest.mark.parametrize("batch_size", [3, 8])
def test_evaluate(batch_size, folder, model, expected):
    result = run(folder, model, batch_size)
    assert 0 < expected["top1"] < expected["top5"] < 100  # the comparison below can fail
    assert result == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("ranks", [2, 3])
def test_pictures_that_pad_a_share_do_not_count(ranks, folder, model, expected):
    for result in run_ranks(lambda: run(folder, model, 2), ranks):
        assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-4)


def test_amp(folder, model, expected):
    dtypes = set()
    handle = model.head.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    loss = run(folder, model, 8, amp="bfloat16")["loss"]
    handle.remove()
    assert dtypes == {torch.bfloat16}
    assert loss == pytest.approx(expected["loss"], rel=0.05)
    assert loss != pytest.approx(expected["loss"], rel=1e-5)
