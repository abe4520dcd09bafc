"""The detail backbone and its head: maps, the start from published weights, and mmseg's own numbers."""

import pytest
import timm
import torch
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmseg.registry import MODELS
from torch import nn

from vrwkv.segmentation import VRWKVDetail

ARGS = {"model": "test_vrwkv", "model_args": {"depth": 4, "embed_dim": 24}, "detail_width": 4}


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return VRWKVDetail(**ARGS)


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (33, 70), (96, 16)])
@torch.no_grad()
def test_shapes(backbone, size):
    maps = backbone.eval()(torch.randn(2, 3, *size))
    expected = [(2, c, -(-size[0] // s), -(-size[1] // s)) for c, s in ((8, 4), (16, 8), (24, 16))]
    assert [tuple(y.shape) for y in maps] == expected


@torch.no_grad()
def test_starts_as_the_published_weights_are(backbone, tmp_path):
    """Loaded by `init_cfg`, the tokens are those of the plain model, to the bit; with another vector they are not."""
    plain = timm.create_model("test_vrwkv", num_classes=5, **ARGS["model_args"]).eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    backbone = VRWKVDetail(**ARGS, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth")))
    backbone.init_weights()
    images = torch.randn(2, 3, 48, 64)
    expected = plain.forward_features(images).transpose(1, 2).unflatten(2, (3, 4))
    torch.testing.assert_close(backbone.eval()(images)[2], expected, rtol=0, atol=0)
    nn.init.ones_(backbone.detail_scale)
    assert (backbone(images)[2] - expected).abs().max() > 0.1


def test_every_parameter_has_a_gradient(backbone):
    nn.init.ones_(backbone.detail_scale)
    sum(y.square().sum() for y in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_the_vector_leaves_zero(backbone):
    sum(y.square().sum() for y in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert backbone.detail_scale.grad.abs().max() > 0


def test_own_weights_are_read_back(backbone, tmp_path):
    nn.init.normal_(backbone.detail_scale)
    other = VRWKVDetail(**ARGS)
    other.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(dict(other.state_dict()), dict(backbone.state_dict()), rtol=0, atol=0)


def test_layer_decay(backbone):
    model = nn.Module()
    model.backbone = backbone
    settings = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.01))
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get("VRWKVLayerDecay")
    groups = constructor(settings, dict(decay_rate=0.5))(model).optimizer.param_groups
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert of[id(backbone.detail_scale)]["lr"] == of[id(backbone.detail.fine[0].weight)]["lr"] == 1
    assert of[id(backbone.detail_scale)]["weight_decay"] == 0
    assert of[id(backbone.vrwkv.blocks[0].ln1.weight)]["lr"] == 0.5**4


def test_bad_width():
    with pytest.raises(ValueError, match="detail_width must be >= 1, got 0"):
        VRWKVDetail("test_vrwkv", detail_width=0)


@pytest.mark.parametrize("height", [33, 16, 5])
def test_lean_head_returns_what_segformers_returns(height):
    torch.manual_seed(0)
    settings = dict(in_channels=[8, 9, 10], in_index=[0, 1, 2], channels=6, num_classes=5, norm_cfg=dict(type="BN"))
    lean = MODELS.build(dict(type="LeanSegformerHead", **settings)).eval()
    plain = MODELS.build(dict(type="SegformerHead", **settings)).eval()
    plain.load_state_dict(lean.state_dict())
    maps = [torch.randn(2, 7 + i, -(-height // stride), 40 // stride) for i, stride in ((1, 1), (2, 2), (3, 4))]
    expected = plain(maps)
    torch.testing.assert_close(lean(maps), expected)
    with torch.no_grad():
        torch.testing.assert_close(lean(maps), expected)
