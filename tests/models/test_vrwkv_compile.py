"""torch.compile without graph breaks, and torch.export with a dynamic batch."""

import pytest
import timm
import torch
from torch import nn

import vrwkv  # noqa: F401


@pytest.fixture(params=["test_vrwkv", "test_vrwkv6"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch._dynamo.reset()
    return timm.create_model(request.param, img_size=32, depth=1, num_classes=5, init_values=1.0).eval()


@torch.no_grad()
def test_compiled_forward_matches_eager(model: nn.Module) -> None:
    images = torch.randn(2, 3, 40, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images))


def test_compiled_gradients_match_eager(model: nn.Module, backend: str) -> None:
    images = torch.randn(2, 3, 32, 32)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(model(images).square().sum(), parameters.values())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(images).square().sum(), parameters.values())
    for name, a, e in zip(parameters, actual, expected, strict=True):
        torch.testing.assert_close(a, e, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_export_with_dynamic_batch(model: nn.Module, backend: str) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.randn(2, 3, 40, 32),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 2, 5):
        images = torch.randn(size, 3, 40, 32)
        torch.testing.assert_close(program(images), model(images))
