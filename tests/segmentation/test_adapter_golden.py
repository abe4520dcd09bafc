"""The adapter returns what the authors' definition returns, and takes their files."""

import json

import pytest
import torch
from mmseg.registry import MODELS
from support.golden import GOLDEN, load_adapter_golden
from support.scripts import REPOSITORY

from vrwkv.segmentation import VRWKVAdapter, checkpoint_filter_fn
from vrwkv.segmentation.config import load_config

NAMES = ["vrwkv_adapter_pre_norm", "vrwkv_adapter_post_norm"]
# fp64 sees what fp32 would forgive, such as another eps in a norm; the files' pixel centres are rounded to fp32.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-6}
LAYOUTS = json.loads((GOLDEN / "checkpoint_layouts.json").read_text())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_golden(name, dtype):
    golden = load_adapter_golden(name)
    backbone = VRWKVAdapter(**golden.args).eval()
    backbone.load_state_dict(golden.weights)
    backbone.to(dtype)
    for images, expected in golden.cases:
        for actual, wanted in zip(backbone(images.to(dtype)), expected, strict=True):
            assert actual.shape == wanted.shape
            assert (actual - wanted).abs().max() <= TOLERANCES[dtype] * wanted.abs().max()


@pytest.mark.parametrize(("size", "millions"), [("tiny", 8.41), ("small", 29.27), ("base", 106.56), ("large", 351.90)])
def test_published_layout(size, millions):
    config = load_config(REPOSITORY / f"configs/segmentation/vrwkv_adapter_{size}_upernet_ade20k_512_160k.py")
    with torch.device("meta"):
        backbone = MODELS.build(config.model.backbone)
        layout = LAYOUTS[f"upernet_vrwkv_adapter_{size}_512_160k_ade20k"]
        weights = {name: torch.empty(shape) for name, shape in layout.items()}
    backbone.load_state_dict(weights, strict=True)
    assert len(weights) == len(backbone.state_dict())
    # The authors' count has the BatchNorms' running statistics in it.
    assert round(sum(tensor.numel() for tensor in backbone.state_dict().values()) / 1e6, 2) == millions


@pytest.mark.parametrize("name", NAMES)
def test_filter(name):
    golden = load_adapter_golden(name)
    backbone = VRWKVAdapter(**golden.args)
    expected = checkpoint_filter_fn(golden.weights, backbone)
    assert expected.keys() == backbone.state_dict().keys()
    prefixed = {f"backbone.{key}": value for key, value in golden.weights.items()}
    for content in (prefixed, {"state_dict": prefixed | {"decode_head.x": torch.zeros(1)}}, expected):
        torch.testing.assert_close(checkpoint_filter_fn(content, backbone), expected, rtol=0, atol=0)
