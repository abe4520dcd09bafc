"""Both backbones: shapes, gradients, checkpointing, deformable attention, pretrained weights, layer decay."""

import pytest
import timm
import torch
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmseg.registry import MODELS
from torch import nn

from vrwkv.runtime.errors import UserError
from vrwkv.segmentation import VRWKV, VRWKVAdapter
from vrwkv.segmentation.deformable import DeformableAttention, pixel_centres, sample_values

ARGS = {"model": "test_vrwkv", "model_args": {"depth": 4, "embed_dim": 24, "drop_path_rate": 0.1, "init_values": 1.0}}
GROUPS = {"interaction_indexes": [[0, 0], [1, 1], [2, 2], [3, 3]], "conv_inplane": 4, "deform_num_heads": 3}


def create(kind, model="test_vrwkv", **kwargs):
    torch.manual_seed(0)
    args = ARGS | dict(model=model, model_args=ARGS["model_args"] | heads(model))
    return VRWKV(**args, **kwargs) if kind == "VRWKV" else VRWKVAdapter(**args, **GROUPS, **kwargs)


def heads(model):
    return dict(head_size=12) if model == "test_vrwkv6" else {}


both = pytest.mark.parametrize("kind", ["VRWKV", "VRWKVAdapter"])
families = pytest.mark.parametrize("model", ["test_vrwkv", "test_vrwkv6"])


@both
@families
@pytest.mark.parametrize("size", [(64, 64), (1, 1), (33, 70), (96, 32)])
@torch.no_grad()
def test_shapes(kind, model, size):
    maps = create(kind, model).eval()(torch.randn(2, 3, *size))
    expected = [(2, 24, -(-size[0] // stride), -(-size[1] // stride)) for stride in (4, 8, 16, 32)]
    assert [tuple(y.shape) for y in maps] == expected


@pytest.mark.parametrize("strides", [(16,), (4, 16), (8, 32)])
@torch.no_grad()
def test_strides_that_are_asked_for(strides):
    """They are those of all four; what the others need is not there."""
    every, some = create("VRWKV").eval(), create("VRWKV", strides=strides).eval()
    parts = {4: "upsample_4x", 8: "upsample_2x"}
    assert {name for name, part in some.pyramid.named_children() if list(part.parameters())} == {
        part for stride, part in parts.items() if stride in strides
    }
    some.load_state_dict({name: tensor for name, tensor in every.state_dict().items() if name in some.state_dict()})
    images = torch.randn(1, 3, 50, 90)  # padded to 64 x 96 for each of them
    expected = dict(zip(every.strides, every(images), strict=True))
    torch.testing.assert_close(list(some(images)), [expected[stride] for stride in strides], rtol=0, atol=0)


@both
@families
def test_every_parameter_has_a_gradient(kind, model):
    backbone = create(kind, model)
    sum(y.square().sum() for y in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


@both
@families
def test_gradient_checkpointing(kind, model):
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for with_cp in (False, True):
        backbone = create(kind, model, with_cp=with_cp)
        assert backbone.vrwkv.grad_checkpointing is with_cp
        torch.manual_seed(1)  # of stochastic depth
        sum(y.square().mean() for y in backbone(images)).backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("wrong", [{"model": "vrwkv_tinny"}, {"model": "resnet18"}])
def test_other_models_are_refused(wrong):
    with pytest.raises(ValueError, match=r"model must be one of .*vrwkv_tiny_patch16_224"):
        VRWKV(**wrong)


def test_bad_arguments():
    with pytest.raises(ValueError, match="must part 4 blocks in four groups"):
        VRWKVAdapter(**ARGS, interaction_indexes=[[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="multiple of 5 heads"):
        VRWKVAdapter(**ARGS, **GROUPS | {"deform_num_heads": 5})
    for strides in ((), (2,), (16, 4), (4, 4)):
        with pytest.raises(ValueError, match="strides must be some of 4, 8, 16, 32 in this order"):
            VRWKV(**ARGS, strides=strides)
    with pytest.raises(ValueError, match="16 pixels"):
        VRWKV("test_vrwkv", {"patch_size": 8})
    with pytest.raises(ValueError, match="init_cfg must be"):
        VRWKV(**ARGS, init_cfg={"type": "Xavier"})


def test_sampling_is_bilinear_and_zero_outside():
    """By hand on a 2 x 3 map: a pixel's centre, between two pixels, beyond the border, and far outside."""
    value = torch.arange(6.0).view(1, 6, 1, 1)
    places = torch.tensor([[1.5 / 3, 0.25], [1.0 / 3, 0.25], [0.0, 0.25], [2.0, 2.0]])
    out = sample_values(value, [(2, 3)], places.view(1, 4, 1, 1, 1, 2), torch.ones(1, 4, 1, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 0.5, 0.0, 0.0]))


def test_deformable_attention_gradients():
    torch.manual_seed(0)
    attention = DeformableAttention(6, num_heads=2, num_levels=2, num_points=3, ratio=1.0).double()
    nn.init.normal_(attention.sampling_offsets.weight, std=0.1)
    shapes = [(3, 4), (2, 2)]
    query = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 16, 6, dtype=torch.float64, requires_grad=True)
    centres = pixel_centres(shapes[1:], query)
    assert torch.autograd.gradcheck(lambda q, v: attention(q, centres, v, shapes), (query, values))


@torch.no_grad()
def test_lean_head_returns_what_upernet_returns():
    torch.manual_seed(0)
    settings = dict(in_channels=[8] * 4, in_index=[0, 1, 2, 3], channels=6, num_classes=5, norm_cfg=dict(type="BN"))
    lean = MODELS.build(dict(type="LeanUPerHead", **settings)).eval()
    plain = MODELS.build(dict(type="UPerHead", **settings)).eval()
    plain.load_state_dict(lean.state_dict())
    maps = [torch.randn(2, 8, 33 // stride + 1, 40 // stride) for stride in (1, 2, 4, 8)]
    copies = [y.clone() for y in maps]
    torch.testing.assert_close(lean(maps), plain(maps))
    torch.testing.assert_close(maps, copies, rtol=0, atol=0)


@both
@families
def test_pretrained_classification_weights(kind, model, tmp_path):
    """Taken from a file of another grid and with a head; layer scale and adapter keep their initial values."""
    name, model = model, timm.create_model(model, depth=4, embed_dim=24, img_size=96, num_classes=7, **heads(model))
    torch.save({"state_dict": model.state_dict(), "arch": name}, tmp_path / "weights.pth")
    backbone = create(kind, name, init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth")})
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbone.init_weights()
    ours = backbone.state_dict()
    torch.testing.assert_close(ours["vrwkv.blocks.3.att.key.weight"], model.blocks[3].att.key.weight.data)
    assert ours["vrwkv.pos_embed"].shape == (1, 16, 24)
    same = [name for name in ours if not name.startswith("vrwkv.") or "gamma" in name]
    for name in same:
        torch.testing.assert_close(ours[name], before[name], rtol=0, atol=0)


def test_pretrained_weights_of_another_model(tmp_path):
    torch.save(timm.create_model("test_vrwkv", depth=2, embed_dim=24).state_dict(), tmp_path / "weights.pth")
    backbone = create("VRWKV", init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth")})
    with pytest.raises(UserError, match=r"is of another model.*missing \(vrwkv\.blocks\.2\.ln1"):
        backbone.init_weights()


@families
def test_layer_decay(model):
    class Segmentor(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = create("VRWKVAdapter", model)
            self.decode_head = nn.Conv2d(24, 2, 1)

    model = Segmentor()
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get("VRWKVLayerDecay")
    settings = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.01))
    groups = constructor(settings, dict(decay_rate=0.5))(model).optimizer.param_groups
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    named = {name: of[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(named) == sum(len(group["params"]) for group in groups)
    for name, layers_after in {
        "backbone.vrwkv.pos_embed": 5,
        "backbone.vrwkv.patch_embed.proj.weight": 5,
        "backbone.vrwkv.ln0.weight": 4,
        "backbone.vrwkv.blocks.0.att.key.weight": 4,
        "backbone.vrwkv.blocks.3.ffn.value.weight": 1,
        "backbone.interactions.0.injector.attn.value_proj.weight": 0,
        "backbone.level_embed": 0,
        "decode_head.weight": 0,
    }.items():
        assert named[name]["lr"] == 0.5**layers_after, name
    without = {name for name, group in named.items() if group["weight_decay"] == 0}
    spared = {f"backbone.vrwkv.{name}" for name in model.backbone.vrwkv.no_weight_decay()}
    assert "backbone.vrwkv.pos_embed" in spared <= without
    assert all((parameter.ndim > 1) != (name in without) for name, parameter in model.named_parameters()
               if name not in spared)  # fmt: skip
