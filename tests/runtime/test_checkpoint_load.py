"""Weights from a file into a model: what must fit, what may differ, and what a refusal says."""

import argparse
import copy
import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.golden import load_golden
from torch import Tensor, nn

import vrwkv  # noqa: F401
from vrwkv.runtime import checkpoint
from vrwkv.runtime.errors import UserError


def create(**kwargs: Any) -> nn.Module:
    return timm.create_model("test_vrwkv", **dict(img_size=32, depth=1, num_classes=3) | kwargs)


def assert_equal(model: nn.Module, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize("entry", ["", "model", "state_dict", "state_dict_ema"])
def test_every_wrapping(entry: str) -> None:
    expected, wrong = create().state_dict(), {"state_dict": create().state_dict()}
    content = expected if not entry else {**wrong, entry: expected} if entry == "state_dict_ema" else {entry: expected}
    for weights in (content, {entry: {f"module.{k}": v for k, v in expected.items()}} if entry else content):
        checkpoint.load(model := create(), weights, "x.pth")
        assert_equal(model, expected)


@pytest.mark.parametrize("content", [{}, {"a": 1}, {1: torch.zeros(1)}, {"state_dict": {}}], ids=str)
def test_no_weights(content: dict) -> None:
    with pytest.raises(UserError, match=r"^x\.pth is not a checkpoint: no state dict of tensors in it$"):
        checkpoint.load(create(), content, "x.pth")


def test_another_model_is_refused_and_named() -> None:
    own = create().state_dict()
    weights = {name: tensor for name, tensor in own.items() if ".att." not in name}
    weights |= {"head.bias": torch.zeros(4), "a": torch.zeros(1)}
    with pytest.raises(
        UserError,
        match=r"^checkpoint x\.pth is of another model than VisionRWKV: 9 missing \(blocks\.0\.att\.spatial_decay, "
        r"blocks\.0\.att\.spatial_first, blocks\.0\.att\.spatial_mix_k, \.\.\.\); 1 unexpected \(a\); "
        r"1 of another shape \(head\.bias \(4,\) for \(3,\)\)$",
    ):
        checkpoint.load(model := create(), weights, "x.pth")
        assert_equal(model, own)


def test_position_embedding_of_an_unknown_grid_is_named() -> None:
    with pytest.raises(UserError, match=r"^checkpoint x\.pth does not fit VisionRWKV: a pos_embed of 8 tokens"):
        checkpoint.load(create(), create(img_size=(32, 64)).state_dict(), "x.pth")


@pytest.mark.parametrize("name", ["pos_embed", "blocks.0.att.spatial_decay", "patch_embed.proj.weight"])
def test_entries_that_are_too_short(name: str) -> None:
    with pytest.raises(UserError, match=rf"1 of another shape \({name} \(\)"):
        checkpoint.load(create(), create().state_dict() | {name: torch.tensor(1.0)}, "x.pth")


def test_new_head() -> None:
    own, given = create(num_classes=5).state_dict(), create().state_dict()
    headless = {name: tensor for name, tensor in given.items() if not name.startswith("head.")}
    for weights in (given, headless):
        checkpoint.load(model := create(num_classes=5), weights, "x.pth", new_head=True)
        torch.testing.assert_close(model.blocks[0].att.key.weight.data, given["blocks.0.att.key.weight"])
        assert model.head.weight.shape == own["head.weight"].shape
        with pytest.raises(UserError, match="head"):
            checkpoint.load(model, weights, "x.pth")
    checkpoint.load(model := create(), given, "x.pth", new_head=True)
    assert_equal(model, given)


def test_new_head_behind_a_hidden_layer() -> None:
    """Backbones that were pre-trained as autoencoders have none of both."""
    own = create(head_hidden_size=8, num_classes=5)
    headless = {name: t for name, t in create().state_dict().items() if not name.startswith(("head.", "pre_logits."))}
    expected = headless | {name: t.clone() for name, t in own.state_dict().items() if name not in headless}
    assert len(expected) == len(headless) + 4
    checkpoint.load(own, headless, "x.pth", new_head=True)
    assert_equal(own, expected)
    with pytest.raises(UserError, match=r"2 missing \(pre_logits"):
        checkpoint.load(own, {n: t for n, t in expected.items() if "pre_logits" not in n}, "x.pth")


def test_checkpoints_of_timm(tmp_path: Path) -> None:
    content = {"arch": "test_vrwkv", "state_dict": create().state_dict(), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "last.pth.tar")
    checkpoint.load(model := create(), checkpoint.read(tmp_path / "last.pth.tar"), "last.pth.tar")
    assert_equal(model, content["state_dict"])


def test_new_heads_of_a_distilled_model() -> None:
    args = dict(depth=1, img_size=32)
    given = timm.create_model("deit_tiny_distilled_patch16_224", **args, num_classes=3).state_dict()
    model = timm.create_model("deit_tiny_distilled_patch16_224", **args, num_classes=5)
    heads = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("head")}
    assert len(heads) == 4
    checkpoint.load(model, given, "x.pth", new_head=True)
    assert_equal(model, given | heads)


def test_optional_names() -> None:
    given = create().state_dict()
    checkpoint.load(model := create(init_values=0.5), given, "x.pth", optional={"blocks.0.gamma1", "blocks.0.gamma2"})
    assert (model.blocks[0].gamma1 == 0.5).all()
    with pytest.raises(UserError, match=r"1 missing \(blocks\.0\.gamma2\)"):
        checkpoint.load(model, given, "x.pth", optional={"blocks.0.gamma1"})


def test_conversion_outlives_copies_and_works_inside_other_modules() -> None:
    golden = load_golden("vrwkv_pre_norm")
    model = timm.create_model("test_vrwkv", **golden.model_args)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    model.load_state_dict({"state_dict": golden.weights, "meta": {}})
    for other in copies:
        other.load_state_dict(golden.weights)
        assert_equal(other, model.state_dict())
    outer = nn.ModuleDict({"encoder": copies[0], "decoder": nn.Linear(2, 2)})
    weights = {f"encoder.{name}": torch.zeros_like(tensor) for name, tensor in golden.weights.items()}
    outer.load_state_dict(weights | {"decoder.weight": torch.zeros(2, 2), "decoder.bias": torch.zeros(2)})
    assert not any(parameter.any() for parameter in outer.parameters())


def test_other_libraries_models() -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    checkpoint.load(model, source.state_dict(), "x.pth")
    assert_equal(model, source.state_dict())
    with pytest.raises(UserError, match="is of another model than VisionTransformer"):
        checkpoint.load(model, create().state_dict(), "x.pth")
