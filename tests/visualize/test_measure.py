"""Receptive fields and weights against the formula and against what the model itself computed."""

import pytest
import timm
import torch
from torch import Tensor, nn

from vrwkv.models.vrwkv import VisionRWKV
from vrwkv.visualize import (
    area_holding,
    class_votes,
    effective_receptive_field,
    explain,
    gathered_shares,
    spatial_mixes,
)


class Convolution(nn.Module):
    """A model whose receptive field is known."""

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.kernel = kernel

    def forward_intermediates(self, x: Tensor, indices: int, intermediates_only: bool) -> list[Tensor]:
        assert (indices, intermediates_only) == (1, True)
        return [torch.conv2d(x, self.kernel, padding="same")]


@pytest.fixture(scope="module")
def model() -> VisionRWKV:
    torch.manual_seed(0)
    model = timm.create_model("test_vrwkv").eval()
    for mix in spatial_mixes(model):
        nn.init.normal_(mix.key.weight)
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(0))


def test_receptive_field_of_a_convolution_is_its_kernel() -> None:
    kernel = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    field = effective_receptive_field(Convolution(kernel), torch.randn(3, 2, 7, 8))
    expected = torch.zeros(7, 8)
    expected[2:5, 3:6] = kernel[0].square().sum(0).sqrt()
    torch.testing.assert_close(field, expected)


def test_receptive_field_adds_up_the_squares_of_channels() -> None:
    kernel = torch.zeros(2, 1, 3, 3)
    kernel[0, 0, 0, 0], kernel[1, 0, 2, 2] = 3, -4  # a sum over channels would have them at other places too
    field = effective_receptive_field(Convolution(kernel), torch.randn(1, 1, 5, 5))
    assert field[1, 1] == 3
    assert field[3, 3] == 4
    assert field.sum() == 7


def test_receptive_field_is_the_whole_picture(model: VisionRWKV, images: Tensor) -> None:
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    field = effective_receptive_field(model, images)
    assert field.shape == (64, 80)
    assert (field > 0).all()
    assert field.argmax() // 80 // 16 == 2  # the central token's own patch
    assert field.argmax() % 80 // 16 == 2
    assert all(before[name] is parameter.grad for name, parameter in model.named_parameters())


def test_area_holding() -> None:
    field = torch.tensor([[4.0, 1.0], [0.0, 5.0]])
    assert area_holding(field, 0.5) == 1 / 4
    assert area_holding(field, 0.9) == 2 / 4
    assert area_holding(field, 0.95) == 3 / 4


@pytest.mark.parametrize(("at", "token"), [((0.0, 0.0), 0), ((0.5, 0.5), 12), ((0.99, 0.99), 19), ((0.26, 0.1), 5)])
def test_shares_make_what_the_model_computed(
    model: VisionRWKV, images: Tensor, at: tuple[float, float], token: int
) -> None:
    values, outputs = [], []
    hooks = []
    for mix in spatial_mixes(model):
        hooks.append(mix.value.register_forward_hook(lambda _, args, output: values.append(output)))
        hooks.append(mix.key_norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0])))
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    shares = gathered_shares(model, images, at)
    assert len(shares) == len(values) == 3
    for share, v, y in zip(shares, values, outputs, strict=True):
        assert share.shape == (2, 4, 5, 32)
        gathered = (share.flatten(1, 2) * v).sum(1)
        torch.testing.assert_close(gathered, y[:, token], rtol=1e-4, atol=1e-5)


def test_shares_of_the_mean_are_the_mean_of_shares(model: VisionRWKV, images: Tensor) -> None:
    places = [((y + 0.5) / 4, (x + 0.5) / 5) for y in range(4) for x in range(5)]
    each = [gathered_shares(model, images, at) for at in places]
    for layer, share in enumerate(gathered_shares(model, images)):
        torch.testing.assert_close(share, torch.stack([shares[layer] for shares in each]).mean(0))
        torch.testing.assert_close(share.sum((1, 2)), torch.ones(2, 32))


def test_second_generation_has_a_receptive_field_but_no_shares(images: Tensor) -> None:
    model = timm.create_model("test_vrwkv6").eval()
    field = effective_receptive_field(model, images)
    assert field.shape == (64, 80) and (field > 0).all()
    with pytest.raises(ValueError, match="a model with Bi-WKV layers is required, VisionRWKV6 has none"):
        gathered_shares(model, images)


@pytest.mark.parametrize("name", ["test_vrwkv", "test_vrwkv6"])
def test_votes_and_bias_make_the_score(name: str, images: Tensor) -> None:
    model = timm.create_model(name, num_classes=5).eval()
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    classes = torch.tensor([3, 1])
    votes = class_votes(model, images, classes)
    assert votes.shape == (2, 4, 5)
    with torch.no_grad():
        logits = model(images)
        scores = logits.gather(1, classes[:, None])[:, 0] - logits.mean(1)
        bias = model.head.bias[classes] - model.head.bias.mean()
        torch.testing.assert_close(votes.sum((1, 2)) + bias, scores)
        tokens = model.forward_features(images)  # (B, T, C), each of which votes for itself
        rows = model.head.weight[classes] - model.head.weight.mean(0)
    torch.testing.assert_close(votes.flatten(1), (tokens * rows[:, None]).sum(-1) / 20)


def test_votes_of_other_models(images: Tensor) -> None:
    """A model with maps, and one whose classifier is given a class token alone."""
    images, classes = images[..., :64], torch.tensor([0, 2])
    model = timm.create_model("test_resnet", num_classes=3).eval()
    votes = class_votes(model, images, classes)
    with torch.no_grad():
        logits = model(images)
    bias = model.get_classifier().bias
    scores = logits.gather(1, classes[:, None])[:, 0] - logits.mean(1) - bias[classes] + bias.mean()
    torch.testing.assert_close(votes.sum((1, 2)), scores.detach())
    torch.testing.assert_close(class_votes(model, images), class_votes(model, images, logits.argmax(1)))
    model = timm.create_model("test_vit", num_classes=3, img_size=64).eval()
    with pytest.raises(ValueError, match="features of patches is required, VisionTransformer has none"):
        class_votes(model, images, classes)


@pytest.mark.parametrize("name", ["test_vrwkv", "test_vrwkv6", "test_resnet", "test_vit"])
def test_one_pass_explains_as_each_measure_does(name: str, images: Tensor) -> None:
    images = images[..., :64]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **({"img_size": 64} if name == "test_vit" else {})).eval()
    nn.init.normal_(model.get_classifier().weight)
    logits, votes, shares = explain(model, images)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images))
    assert not logits.requires_grad
    if name == "test_vit":
        assert votes is None
    else:
        torch.testing.assert_close(votes, class_votes(model, images))
    if name == "test_vrwkv":
        torch.testing.assert_close(shares, gathered_shares(model, images))
    else:
        assert shares is None


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "pit_ti_distilled_224"])
def test_models_without_one_map_of_patches_say_their_classes(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    logits, votes, shares = explain(model, images)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images))
    assert votes is None and shares is None


def test_messages(model: VisionRWKV, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\) of the height and the width, got \(0.5, 1\)"):
        gathered_shares(model, images, (0.5, 1))
    with pytest.raises(ValueError, match="a model with Bi-WKV layers is required, Conv2d has none"):
        spatial_mixes(nn.Conv2d(3, 3, 3))
