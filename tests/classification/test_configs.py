"""Every config names a model of that size, and trains a narrow one of its kind."""

import math

import pytest
import timm
import torch
import yaml
from support.scripts import REPOSITORY

import vrwkv  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_curves")
CONFIGS = sorted((REPOSITORY / "configs" / "classification").glob("*.yaml"))
PUBLISHED = [path for path in CONFIGS if "nano" not in path.stem]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains(path, data_root, tmp_path, train):
    args = yaml.safe_load(path.read_text())["model"]["args"] | dict(img_size=32, embed_dim=32, depth=2)
    if "vrwkv6" in path.stem:
        args["head_size"] = 16
    settings = [
        f"output={tmp_path / 'out'}",
        f"data.root={data_root}",
        f"model.args={args}",
        "epochs=1",
        "data.batch_size=8",
        "optim.lr_batch_size=8",
        "data.workers=0",
        "schedule.warmup_epochs=0",
    ]
    assert train(["--config", str(path), "--set", *settings]) == 0
    weights = torch.load(tmp_path / "out" / "last.pth", weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_config_of_a_published_model(path):
    config = yaml.safe_load(path.read_text())
    assert config["model"]["name"] == path.stem
    with torch.device("meta"):
        timm.create_model(config["model"]["name"], **config["model"]["args"])
    assert config["output"] == f"output/{path.stem}"
    assert 1024 % config["data"]["batch_size"] == 0 and math.isclose(config["optim"]["lr"], 1e-3)


def test_both_families_have_each_size():
    assert [path.stem for path in PUBLISHED] == [
        f"{family}_{size}_patch16_224" for family in ("vrwkv6", "vrwkv") for size in ("base", "small", "tiny")
    ]
