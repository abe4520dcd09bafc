"""What the backbone sees of masked images, and what is asked of the decoder."""

import pytest
import timm
import torch
from torch import nn

from vrwkv.layers import VisiblePatches
from vrwkv.layers.grid import q_shift_mix_on
from vrwkv.ops import q_shift
from vrwkv.pretraining import MaskedAutoencoder
from vrwkv.pretraining.masked_autoencoder import (
    denormalised_patches,
    normalised_patches,
    random_masks,
    to_images,
    to_patches,
)

every_family = pytest.mark.parametrize("name", ["test_vrwkv", "test_vrwkv6"])


def autoencoder(name: str = "test_vrwkv", **kwargs) -> MaskedAutoencoder:
    torch.manual_seed(0)
    args = dict(img_size=(24, 32), patch_size=8, embed_dim=32, depth=2, num_classes=5)
    if name == "test_vrwkv6":
        args["head_size"] = 16
    return MaskedAutoencoder(timm.create_model(name, **args), **dict(decoder_dim=16, decoder_depth=2) | kwargs)


def masked_with(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_masked_neighbours_count_as_zero():
    torch.manual_seed(0)
    x, mix = torch.randn(2, 12, 8), torch.rand(8)
    index = torch.tensor([[0, 1, 4, 7, 11], [2, 3, 5, 6, 10]])
    grid = VisiblePatches(3, 4, index)
    (actual,) = q_shift_mix_on(grid, grid.select(x), [mix], 1, 0.25, 1)
    visible = torch.zeros(2, 12).scatter(1, index, 1.0)[..., None]
    wanted = x * mix + q_shift(x * visible, (3, 4)) * (1 - mix)
    torch.testing.assert_close(actual, grid.select(wanted))


@every_family
def test_backbone_with_every_patch_visible_is_the_model(name):
    model = autoencoder(name).backbone.eval()
    images = torch.randn(2, 3, 24, 32)
    x, (height, width) = model.embed(images)
    grid = VisiblePatches(height, width, torch.arange(12).expand(2, -1))
    x = model.ln0(grid.select(x))
    for index in range(len(model.blocks)):
        x = model.run_block(index, x, grid)
    torch.testing.assert_close(model.norm(x), model.forward_features(images))


@every_family
def test_masked_pixels_are_not_seen(name):
    model = autoencoder(name).eval()
    images = torch.randn(2, 3, 24, 32)
    first = model(images, masked_with(0))
    changed = to_patches(images, 8)
    changed[first.masked] = torch.randn(192)
    second = model(to_images(changed, 8, (24, 32)), masked_with(0))
    assert torch.equal(first.masked, second.masked)
    assert torch.equal(first.patches, second.patches)
    assert not torch.equal(first.loss, second.loss)


@every_family
def test_loss_is_that_of_masked_patches(name):
    model = autoencoder(name).eval()
    images = torch.randn(2, 3, 24, 32)
    loss, patches, masked = model(images, masked_with(1))
    wanted = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 12, 192)
    wanted = (wanted - wanted.mean(2, keepdim=True)) / wanted.std(2, keepdim=True)
    for i in range(2):
        expected = (patches[i] - wanted[i])[masked[i]].square().mean()
        torch.testing.assert_close(loss[i], expected, rtol=1e-4, atol=1e-5)


@every_family
def test_what_does_not_decay(name):
    """What does not in the backbone alone, and the mixes of the decoder."""
    model = autoencoder(name)
    ours = {f"backbone.{each}" for each in model.backbone.no_weight_decay()}
    assert "backbone.pos_embed" in ours
    others = model.no_weight_decay() - ours
    assert len(others) == 7 * len(model.decoder.blocks)
    assert others < {name for name, _ in model.decoder.named_parameters(prefix="decoder")}


@every_family
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_everything_is_trained(name, grad_checkpointing):
    model = autoencoder(name)
    model.backbone.set_grad_checkpointing(grad_checkpointing)
    model(torch.randn(4, 3, 24, 32)).loss.mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.decoder.mask_token.grad.abs().max() > 0


def test_each_image_has_its_own_places():
    index, masked = random_masks(64, 12, 0.75, torch.device("cpu"), masked_with(0))
    assert index.shape == (64, 3)
    assert (index.diff(dim=1) > 0).all()
    assert torch.equal(masked.sum(1), torch.full((64,), 9))
    assert not masked.gather(1, index).any()
    assert len({tuple(row) for row in index.tolist()}) > 32
    assert masked.float().mean(0).sub(0.75).abs().max() < 0.25


@pytest.mark.parametrize(("ratio", "visible"), [(0.01, 1), (0.99, 1), (0.5, 1)])
def test_one_patch_is_masked_and_one_visible(ratio, visible):
    index, masked = random_masks(3, 2, ratio, torch.device("cpu"))
    assert index.shape == (3, visible)
    assert masked.sum(1).tolist() == [1, 1, 1]


def test_normalised_patches_come_back():
    images = torch.rand(2, 3, 24, 32)
    patches = normalised_patches(images, 8)
    assert patches.mean(2).abs().max() < 1e-5
    back = to_images(denormalised_patches(patches, images, 8), 8, (24, 32))
    torch.testing.assert_close(back, images)


def test_even_patches_have_finite_targets():
    assert normalised_patches(torch.full((1, 3, 8, 8), 0.5), 8).abs().max() == 0


def test_position_embedding_follows_the_images():
    model = autoencoder().eval()
    assert model(torch.randn(1, 3, 48, 16), masked_with(0)).patches.shape == (1, 12, 192)


def test_published_large_model_loses_its_head():
    args = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, head_hidden_size=48)
    model = MaskedAutoencoder(timm.create_model("vrwkv_large_patch16_192", **args), 16, 1)
    assert isinstance(model.backbone.pre_logits, nn.Identity) and isinstance(model.backbone.head, nn.Identity)


@pytest.mark.parametrize(
    ("kwargs", "images", "message"),
    [
        (dict(decoder_dim=18), None, "decoder_dim must be a positive multiple of 4, got 18"),
        (dict(decoder_depth=0), None, "decoder_depth must be at least 1, got 0"),
        (dict(mask_ratio=1), None, "mask_ratio must lie between 0 and 1, got 1"),
        ({}, (20, 32), "images must consist of whole patches of 8 pixels, got 20 x 32"),
        ({}, (8, 8), "masking needs images of at least two patches, got 1"),
    ],
)
def test_bad_input(kwargs, images, message):
    with pytest.raises(ValueError, match=message):
        autoencoder(**kwargs)(torch.zeros(1, 3, *(images or (24, 32))))


def test_oblong_patches_are_refused():
    with pytest.raises(ValueError, match=r"patches must be square, got \(8, 4\) pixels"):
        MaskedAutoencoder(timm.create_model("test_vrwkv", img_size=16, patch_size=(8, 4)))
