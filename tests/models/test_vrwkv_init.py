"""Initial values, written here channel by channel as in the paper's code."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import vrwkv  # noqa: F401

DIM, DEPTH = 8, 4


def spatial_mix(a: float, b: float) -> dict[str, list[float]]:
    return {
        "att.spatial_decay": [-5 + 8 * (i / (DIM - 1)) ** (0.7 + 1.3 * a) for i in range(DIM)],
        "att.spatial_first": [math.log(0.3) + 0.5 * ((i + 1) % 3 - 1) for i in range(DIM)],
        "att.spatial_mix_k": [(i / DIM) ** b for i in range(DIM)],
        "att.spatial_mix_v": [(i / DIM) ** b + 0.3 * a for i in range(DIM)],
        "att.spatial_mix_r": [(i / DIM) ** (b / 2) for i in range(DIM)],
    }


def spatial_mix6(a: float, b: float) -> dict[str, list[float]]:
    return {
        "att.time_maa_x": [1 - (i / DIM) ** b for i in range(DIM)],
        "att.time_maa_w": [1 - (i / DIM) ** b for i in range(DIM)],
        "att.time_maa_k": [1 - (i / DIM) ** b for i in range(DIM)],
        "att.time_maa_v": [1 - (i / DIM) ** b - 0.3 * a for i in range(DIM)],
        "att.time_maa_r": [1 - (i / DIM) ** (b / 2) for i in range(DIM)],
        "att.time_maa_g": [1 - (i / DIM) ** (b / 2) for i in range(DIM)],
        "att.time_decay": [-6 + 5 * (i / (DIM - 1)) ** (0.7 + 1.3 * a) for i in range(DIM)],
        "att.time_faaaa": [a * (1 - i / (DIM - 1)) + 0.1 * ((i + 1) % 3 - 1) for i in range(DIM)],
    }


@pytest.mark.parametrize("layer", range(DEPTH))
@pytest.mark.parametrize(
    ("name", "args", "spatial"),
    [("test_vrwkv", {}, spatial_mix), ("test_vrwkv6", dict(head_size=4), spatial_mix6)],
    ids=["test_vrwkv", "test_vrwkv6"],
)
def test_initial_values_follow_channel_and_layer(
    name: str, args: dict[str, int], spatial: Callable[[float, float], dict[str, list[float]]], layer: int
) -> None:
    block = timm.create_model(name, embed_dim=DIM, depth=DEPTH, **args).blocks[layer]
    a, b = layer / (DEPTH - 1), 1 - layer / DEPTH
    expected = spatial(a, b) | {
        "ffn.spatial_mix_k": [(i / DIM) ** b for i in range(DIM)],
        "ffn.spatial_mix_r": [(i / DIM) ** b for i in range(DIM)],
    }
    for path, values in expected.items():
        torch.testing.assert_close(block.get_parameter(path).data.flatten(), torch.tensor(values), msg=path)


def test_initial_low_rank_matrices() -> None:
    """Uniform within 1e-4."""
    shapes = {"maa_w1": (64, 160), "maa_w2": (5, 32, 64), "decay_w1": (64, 64), "decay_w2": (64, 64)}
    for block in timm.create_model("test_vrwkv6", embed_dim=64).blocks:
        for name, shape in shapes.items():
            matrix = block.att.get_parameter(f"time_{name}").detach()
            assert matrix.shape == shape
            assert matrix.abs().max() <= 1e-4
            assert matrix.std().item() == pytest.approx(1e-4 / 3**0.5, rel=0.05)


@pytest.mark.parametrize(("name", "args", "in_block"), [("test_vrwkv", dict(key_norm=True), 7), ("test_vrwkv6", {}, 8)])
def test_initial_linear_weights_norms_and_layer_scale(name: str, args: dict[str, bool], in_block: int) -> None:
    model = timm.create_model(name, embed_dim=64, init_values=1e-5, head_hidden_size=48, **args)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) == 3 * in_block + 2
    for path, linear in linears.items():
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1), path
        assert linear.bias is None or not linear.bias.any(), path
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm)]
    for norm in norms:
        assert (norm.weight == 1).all() and not norm.bias.any()
    assert not model.pos_embed.any()
    for block in model.blocks:
        assert (block.gamma1 == 1e-5).all() and (block.gamma2 == 1e-5).all()


@pytest.mark.parametrize("args", [dict(depth=1), dict(embed_dim=1), dict(depth=1, embed_dim=1)], ids=str)
@pytest.mark.parametrize("name", ["test_vrwkv", "test_vrwkv6"])
def test_one_layer_or_one_channel_is_finite(name: str, args: dict[str, int]) -> None:
    heads = dict(head_size=1) if "6" in name and "embed_dim" in args else {}
    model = timm.create_model(name, num_classes=2, **args, **heads)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize(("name", "args"), [("test_vrwkv", dict(key_norm=True)), ("test_vrwkv6", {})])
def test_init_weights_fills_an_empty_model(name: str, args: dict[str, Any]) -> None:
    def fixed(model: torch.nn.Module) -> dict[str, Tensor]:
        named = model.named_parameters()
        return {path: p.data for path, p in named if p.ndim == 1 or path.endswith(("pos_embed", "time_faaaa"))}

    args = args | dict(init_values=0.5, num_classes=5)
    expected = timm.create_model(name, **args)
    with torch.device("meta"):
        model = timm.create_model(name, **args)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    bias = "patch_embed.proj.bias"  # drawn at random
    torch.testing.assert_close(fixed(model) | {bias: None}, fixed(expected) | {bias: None})
