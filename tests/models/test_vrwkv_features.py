"""Features of every model: of its blocks, pruned, by torch.fx."""

import pytest
import torch
from support.small_models import create, every_model
from timm.layers import create_feature_extractor
from torch import nn


@every_model
@torch.no_grad()
def test_features_only(name: str) -> None:
    torch.manual_seed(1)
    model = create(name).eval()
    torch.manual_seed(1)
    backbone = create(name, features_only=True).eval()
    images = torch.randn(2, 3, 70, 100)
    features = backbone(images)
    assert [f.shape for f in features] == [(2, 32, 5, 7)] * 3
    assert backbone.feature_info.channels() == [32] * 3
    assert backbone.feature_info.reduction() == [16] * 3
    torch.testing.assert_close(features, model.forward_intermediates(images)[1])


@every_model
@torch.no_grad()
def test_forward_intermediates(name: str) -> None:
    model = create(name).eval()
    images = torch.randn(2, 3, 64, 96)
    final, tokens = model.forward_intermediates(images, output_fmt="NLC")
    assert [t.shape for t in tokens] == [(2, 24, 32)] * 3
    torch.testing.assert_close(final, model.forward_features(images), rtol=0, atol=0)
    torch.testing.assert_close(final, model.norm(tokens[-1]), rtol=0, atol=0)
    _, maps = model.forward_intermediates(images)
    torch.testing.assert_close([m.flatten(2).mT for m in maps], tokens, rtol=0, atol=0)
    normed = model.forward_intermediates(images, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(normed, [model.norm(t) for t in tokens], rtol=0, atol=0)


@torch.no_grad()
def test_forward_intermediates_takes_and_stops() -> None:
    model = create().eval()
    images = torch.randn(1, 3, 64, 64)
    every = model.forward_intermediates(images, intermediates_only=True)
    for indices, expected in ((2, every[1:]), ([0, -1], [every[0], every[2]])):
        torch.testing.assert_close(model.forward_intermediates(images, indices)[1], expected, rtol=0, atol=0)
    model.blocks[2].register_forward_pre_hook(lambda *_: pytest.fail("the last block ran"))
    early = model.forward_intermediates(images, [0, 1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, every[:2], rtol=0, atol=0)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")


@every_model
@torch.no_grad()
def test_prune_intermediate_layers(name: str) -> None:
    model = create(name).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    normed = model.norm(expected[1].flatten(2).mT)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.blocks) == 2 and model.num_classes == 0
    torch.testing.assert_close(model.forward_intermediates(images, 2)[1], expected, rtol=0, atol=0)
    torch.testing.assert_close(model(images), normed, rtol=0, atol=0)
    model.prune_intermediate_layers(2, prune_norm=True)
    torch.testing.assert_close(model(images), expected[1].flatten(2).mT, rtol=0, atol=0)
    model.reset_classifier(3, "avg")
    assert model(images).shape == (1, 3)


@every_model
@torch.no_grad()
def test_fx_feature_extraction(name: str) -> None:
    model = create(name).eval()
    nn.init.normal_(model.pos_embed)
    extractor = create_feature_extractor(model, ["blocks.0", "blocks.2", "head"])
    for size in ((64, 64), (40, 96)):  # one graph for all sizes
        images = torch.randn(2, 3, *size)
        _, tokens = model.forward_intermediates(images, output_fmt="NLC")
        torch.testing.assert_close(list(extractor(images).values()), [tokens[0], tokens[2], model(images)])
