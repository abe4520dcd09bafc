"""Initial values, written here channel by channel as in the paper's code."""

import math

import pytest
import timm
import torch
from torch import Tensor

import vrwkv  # noqa: F401

DIM, DEPTH = 8, 4


@pytest.mark.parametrize("layer", range(DEPTH))
def test_initial_values_follow_channel_and_layer(layer: int) -> None:
    block = timm.create_model("test_vrwkv", embed_dim=DIM, depth=DEPTH).blocks[layer]
    a, b = layer / (DEPTH - 1), 1 - layer / DEPTH
    expected = {
        "att.spatial_decay": [-5 + 8 * (i / (DIM - 1)) ** (0.7 + 1.3 * a) for i in range(DIM)],
        "att.spatial_first": [math.log(0.3) + 0.5 * ((i + 1) % 3 - 1) for i in range(DIM)],
        "att.spatial_mix_k": [(i / DIM) ** b for i in range(DIM)],
        "att.spatial_mix_v": [(i / DIM) ** b + 0.3 * a for i in range(DIM)],
        "att.spatial_mix_r": [(i / DIM) ** (b / 2) for i in range(DIM)],
        "ffn.spatial_mix_k": [(i / DIM) ** b for i in range(DIM)],
        "ffn.spatial_mix_r": [(i / DIM) ** b for i in range(DIM)],
    }
    for name, values in expected.items():
        torch.testing.assert_close(block.get_parameter(name).data, torch.tensor(values), msg=name)


def test_initial_linear_weights_norms_and_layer_scale() -> None:
    model = timm.create_model("test_vrwkv", embed_dim=64, init_values=1e-5, key_norm=True, head_hidden_size=48)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) == 3 * 7 + 2
    for name, linear in linears.items():
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1), name
        assert linear.bias is None or not linear.bias.any(), name
    assert not model.pos_embed.any()
    for block in model.blocks:
        assert (block.gamma1 == 1e-5).all() and (block.gamma2 == 1e-5).all()


@pytest.mark.parametrize("args", [dict(depth=1), dict(embed_dim=1), dict(depth=1, embed_dim=1)], ids=str)
def test_one_layer_or_one_channel_is_finite(args: dict[str, int]) -> None:
    model = timm.create_model("test_vrwkv", num_classes=2, **args)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_init_weights_fills_an_empty_model() -> None:
    def fixed(model: torch.nn.Module) -> dict[str, Tensor]:
        return {name: p.data for name, p in model.named_parameters() if p.ndim == 1 or name == "pos_embed"}

    args = dict(init_values=0.5, key_norm=True, num_classes=5)
    expected = timm.create_model("test_vrwkv", **args)
    with torch.device("meta"):
        model = timm.create_model("test_vrwkv", **args)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    bias = "patch_embed.proj.bias"  # drawn at random
    torch.testing.assert_close(fixed(model) | {bias: None}, fixed(expected) | {bias: None})
