"""Checkpoints: the authors' files as they are, our own, other grids, other heads."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.golden import GOLDEN, load_golden
from timm.layers import EcaModule
from timm.models import load_checkpoint
from torch import Tensor, nn

from vrwkv.models.vrwkv import checkpoint_filter_fn

LAYOUTS: dict[str, dict[str, list[int]]] = json.loads((GOLDEN / "checkpoint_layouts.json").read_text())
PUBLISHED = {
    "vrwkv_tiny_patch16_224": "vrwkv_t_in1k_224",
    "vrwkv_small_patch16_224": "vrwkv_s_in1k_224",
    "vrwkv_base_patch16_224": "vrwkv_b_in1k_224",
    "vrwkv_large_patch16_384": "vrwkv_l_22kto1k_384",
    "vrwkv6_tiny_patch16_224": "vrwkv6_t_in1k_224",
    "vrwkv6_small_patch16_224": "vrwkv6_s_in1k_224",
    "vrwkv6_base_patch16_224": "vrwkv6_b_in1k_224",
}
GOLDEN_NAMES = ["vrwkv_pre_norm", "vrwkv_mlp_head", "vrwkv6_post_norm"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layout_loads_strictly(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        weights = {key: torch.empty(shape) for key, shape in LAYOUTS[PUBLISHED[name]].items()}
    model.load_state_dict(weights, strict=True)
    assert len(weights) == len(model.state_dict())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vrwkv_tiny_patch16_224", 6.16),
        ("vrwkv_small_patch16_224", 23.82),
        ("vrwkv_base_patch16_224", 93.65),
        ("vrwkv_large_patch16_192", 334.88),
        ("vrwkv_large_patch16_384", 334.88),
        ("vrwkv6_tiny_patch16_224", 7.64),
        ("vrwkv6_small_patch16_224", 27.68),
        ("vrwkv6_base_patch16_224", 104.90),
    ],
)
def test_parameter_count(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def source(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The model and its arguments, the authors' weights, and the same weights by our names."""
    golden = load_golden(request.param)
    model = timm.create_model(golden.model, **golden.model_args)
    return golden.model, golden.model_args, golden.weights, checkpoint_filter_fn(golden.weights, model)


def assert_equal(model: nn.Module, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("route", ["pretrained", "checkpoint_path", "load_checkpoint", "load_checkpoint with filter"])
@pytest.mark.parametrize("file", ["bare.pth", "bare.safetensors", "state_dict.pth", "model.pth"])
def test_authors_files_load_as_they_are(file: str, route: str, source: tuple, tmp_path: Path) -> None:
    name, args, weights, expected = source
    path = str(tmp_path / file)
    if file.endswith(".safetensors"):
        save_file(weights, path)
    else:
        entry = Path(file).stem
        torch.save(weights if entry == "bare" else {entry: weights, "meta": {"epoch": 300}}, path)
    if route == "pretrained":
        overlay = dict(file=path, num_classes=args["num_classes"])
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    elif route == "checkpoint_path":
        model = timm.create_model(name, checkpoint_path=path, **args)
    else:
        model = timm.create_model(name, **args)
        load_checkpoint(model, path, filter_fn=checkpoint_filter_fn if "filter" in route else None)
    assert_equal(model, expected)


def test_filter_takes_whole_files_and_wrapped_models(source: tuple) -> None:
    name, args, weights, expected = source
    model = timm.create_model(name, **args)
    for content in ({"state_dict": weights}, {"model": weights}, {f"module.{k}": v for k, v in weights.items()}):
        torch.testing.assert_close(checkpoint_filter_fn(content, model), expected, rtol=0, atol=0)


def test_backbone_without_prefix(source: tuple) -> None:
    name, args, weights, expected = source
    backbone = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    model = timm.create_model(name, **args | {"num_classes": 0, "head_hidden_size": None})
    model.load_state_dict(backbone)
    assert_equal(model, {k: v for k, v in expected.items() if not k.startswith(("head", "pre_logits"))})


def test_own_names_pass_unchanged(source: tuple) -> None:
    name, args, _, expected = source
    model = timm.create_model(name, **args)
    wrapped = {f"module.{key}": tensor for key, tensor in expected.items()}
    torch.testing.assert_close(checkpoint_filter_fn(expected, model), expected, rtol=0, atol=0)
    model.load_state_dict(wrapped)
    assert_equal(model, expected)


@pytest.mark.parametrize("name", ["test_vrwkv", "test_vrwkv6"])
def test_what_users_add_comes_back(name: str) -> None:
    """Modules by names that the authors' files have, too, and with parameters of the shape of theirs."""
    models = [timm.create_model(name) for _ in range(2)]
    for model in models:
        model.head = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))
        model.blocks[0].attention = EcaModule(32)
        model.blocks[1].prompt = nn.Parameter(torch.randn(1, 1, 32))
        model.layers = nn.ModuleList([nn.Linear(2, 2)])
        model.ln1 = nn.LayerNorm(2)
    models[1].load_state_dict(models[0].state_dict())
    assert_equal(models[1], dict(models[0].state_dict()))


def test_weights_of_another_model_are_refused(source: tuple) -> None:
    name, args, weights, _ = source
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.20\.att"):
        timm.create_model(name, **args | {"depth": 21}).load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*decode_head"):
        timm.create_model(name, **args).load_state_dict(weights | {"decode_head.bias": torch.zeros(1)})


def test_pretrained_with_another_number_of_classes(source: tuple, tmp_path: Path) -> None:
    name, args, weights, expected = source
    torch.save(weights, tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"), num_classes=args["num_classes"])
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args | {"num_classes": 4})
    assert model.head.weight.shape[0] == 4
    model.head = nn.Identity()
    assert_equal(model, {key: tensor for key, tensor in expected.items() if not key.startswith("head.")})


def test_pretrained_with_one_input_channel(source: tuple, tmp_path: Path) -> None:
    name, args, weights, expected = source
    torch.save(weights, tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"), num_classes=args["num_classes"])
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, **args)
    summed = expected["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert_equal(model, expected | {"patch_embed.proj.weight": summed})


def test_pretrained_features_only(source: tuple, tmp_path: Path) -> None:
    name, args, weights, expected = source
    torch.save(weights, tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"), num_classes=args["num_classes"])
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=2)
    model = timm.create_model(name, **options, **args)
    kept = ("patch_embed", "pos_embed", "ln0", "blocks")
    assert_equal(model, {f"model.{key}": tensor for key, tensor in expected.items() if key.startswith(kept)})


@torch.no_grad()
def test_position_embedding_of_another_grid_is_resized(source: tuple) -> None:
    name, args, weights, expected = source
    small = timm.create_model(name, **args).eval()
    small.load_state_dict(weights)
    large = timm.create_model(name, **args | {"img_size": (96, 64)}).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        large.load_state_dict(weights)
    side = args["img_size"] // 16
    grid = expected["pos_embed"].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(6, 4), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(large.pos_embed.data, resized.flatten(1, 2))
    images = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(large(images), small(images))


def test_as_many_tokens_on_another_grid() -> None:
    golden = load_golden("vrwkv_pre_norm")
    wide = timm.create_model("test_vrwkv", **golden.model_args | {"img_size": (32, 128)})
    ours = wide.state_dict() | {"pos_embed": torch.randn(1, 16, 32)}
    torch.testing.assert_close(checkpoint_filter_fn(ours, wide)["pos_embed"], ours["pos_embed"], rtol=0, atol=0)
    published = checkpoint_filter_fn(golden.weights, wide)["pos_embed"]
    grid = golden.weights["backbone.pos_embed"].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(2, 8), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(published, expected.flatten(1, 2))


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [(64, (32, 128)), ((32, 128), 64), ((32, 128), (64, 128)), ((32, 96), (32, 128)), ((32, 96), (32, 96))],
)
def test_pretrained_grid_is_known(saved: Any, wanted: Any, tmp_path: Path) -> None:
    model = timm.create_model("test_vrwkv", img_size=saved)
    nn.init.normal_(model.pos_embed)
    timm.models.save_for_hf(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=wanted)
    again = timm.create_model("test_vrwkv", img_size=wanted)
    again.load_state_dict(back.state_dict())
    model.set_input_size(wanted)
    assert_equal(back, dict(model.state_dict()))
    assert_equal(again, dict(model.state_dict()))


def test_pretrained_patches_are_resampled(tmp_path: Path) -> None:
    model = timm.create_model("test_vrwkv")
    timm.models.save_for_hf(model, tmp_path)
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, patch_size=8)
    model.set_input_size(patch_size=8)
    torch.testing.assert_close(dict(back.state_dict()), dict(model.state_dict()), rtol=0, atol=1e-6)


def test_guessed_grid_is_said() -> None:
    wide = timm.create_model("test_vrwkv", img_size=(32, 128)).state_dict()
    with pytest.warns(
        UserWarning, match=r"16 tokens is resized to the model's grid \(8, 8\) as if its own was \(4, 4\)"
    ):
        timm.create_model("test_vrwkv", img_size=128).load_state_dict(wide)


def test_unknown_grid_is_refused() -> None:
    wide = timm.create_model("test_vrwkv", img_size=(32, 64)).state_dict()
    with pytest.raises(
        ValueError, match=r"pos_embed of 8 tokens can only be resized to the model\'s grid \(4, 4\).*set_input_size"
    ):
        timm.create_model("test_vrwkv").load_state_dict(wide)
