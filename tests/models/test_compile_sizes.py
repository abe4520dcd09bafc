"""One compiled model and one exported program serve images of every size."""

import random
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.export import Dim

import vrwkv  # noqa: F401

# B, H, W. The first two differ in everything, so that the compiler finds out at the second that nothing is fixed.
SIZES = [(2, 64, 64), (3, 96, 80), (2, 64, 64), (3, 33, 200), (5, 128, 48), (4, 100, 130), (2, 32, 32)]
# What torch fixes in each program: a dimension of one element, here a batch or a side of the grid of patches.
ONES = [(1, 64, 96), (2, 16, 96), (2, 96, 16), (3, 1, 1)]


@pytest.fixture(autouse=True)
def two_compilations() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        yield


def create(**kwargs) -> nn.Module:
    """A model for images of 32 x 32 pixels whose position embedding is not zero."""
    model = timm.create_model("test_vrwkv", img_size=32, depth=1, init_values=1.0, **kwargs)
    for name, parameter in model.named_parameters():
        if name.endswith("pos_embed"):
            nn.init.normal_(parameter)
    return model


def in_random_order(sizes: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    return sizes[:2] + random.Random(0).sample(sizes[2:], len(sizes) - 2)


def assert_same_at_every_size(actual: Callable[[Tensor], list[Tensor]], expected: Callable[[Tensor], list[Tensor]]):
    for batch, height, width in in_random_order(SIZES):
        images = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(actual(images), expected(images), rtol=1e-4, atol=1e-5)


def gradients(model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]) -> Callable[[Tensor], list[Tensor]]:
    return lambda images: list(torch.autograd.grad(model(images).square().mean(), parameters))


@torch.no_grad()
def test_compiled_inference() -> None:
    model = create(num_classes=5).eval()
    assert_same_at_every_size(torch.compile(model, fullgraph=True, backend="aot_eager"), model)


@torch._dynamo.config.patch(recompile_limit=1)
@torch._inductor.config.patch({"aot_inductor.debug_compile": True})  # g++ without optimization
@torch.no_grad()
def test_inference_by_inductor() -> None:
    model = create(num_classes=5).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in ((2, 96, 80), (2, 64, 64), (5, 33, 200), (3, 32, 32)):
        images = torch.randn(size[0], 3, *size[1:])
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiler, dynamic", [("aot_eager", None), ("aot_eager", True)])
def test_compiled_training_step(compiler: str, dynamic: bool | None) -> None:
    model = create(num_classes=5)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=compiler)
    parameters = list(model.parameters())
    assert_same_at_every_size(gradients(compiled, parameters), gradients(model, parameters))


def test_training_step_of_the_patches_by_inductor() -> None:
    # Where it changes the layout of what the backward pass of a convolution is given, it fixes the sizes.
    model = create()
    model.pos_embed.requires_grad_(False)
    parameters = list(model.patch_embed.parameters())

    def embed(images: Tensor) -> Tensor:
        return model.embed(images)[0]

    compiled = torch.compile(embed, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        for height, width in ((96, 80), (33, 200), (64, 64)):
            images = torch.randn(2, 3, height, width)
            actual, expected = (gradients(function, parameters)(images) for function in (compiled, embed))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiled_features() -> None:
    model = create(features_only=True, out_indices=[0]).eval()
    assert_same_at_every_size(torch.compile(model, fullgraph=True, backend="aot_eager"), model)


def dynamic_images(smallest: int | None = None) -> tuple[dict[int, object], ...]:
    side = (lambda name: Dim.DYNAMIC) if smallest is None else (lambda name: Dim(name, min=smallest))
    return ({0: Dim.DYNAMIC, 2: side("height"), 3: side("width")},)


@pytest.mark.parametrize("options", [dict(num_classes=5), dict(features_only=True, out_indices=[0])])
@pytest.mark.parametrize("example", [(2, 96, 80), (2, 32, 32)])
@torch.no_grad()
def test_exported_program(example: tuple[int, int, int], options: dict) -> None:
    model = create(**options).eval()
    batch, height, width = example
    exported = torch.export.export(model, (torch.randn(batch, 3, height, width),), dynamic_shapes=dynamic_images())
    program = exported.module()
    assert_same_at_every_size(program, model)
    images = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(program(images), model(images))
    # Torch notes that no side of the grid has one patch, although the program would be right there too.
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.randn(2, 3, 1, 1))
    program = exported.module(check_guards=False)  # right at every size
    for batch, height, width in ONES:
        images = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(program(images), model(images))


@torch.no_grad()
def test_exported_program_with_named_sizes() -> None:
    model = create(num_classes=5).eval()
    program = torch.export.export(model, (torch.randn(2, 3, 96, 80),), dynamic_shapes=dynamic_images(32)).module()
    assert_same_at_every_size(program, model)


@torch.no_grad()
def test_exported_from_one_image_where_nothing_is_fixed() -> None:
    model = create(num_classes=5).eval()
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        exported = torch.export.export(model, (torch.randn(1, 3, 96, 80),), dynamic_shapes=dynamic_images())
    assert_same_at_every_size(exported.module(), model)
