"""Models under forward mode, second derivatives, torch.func and torch.jit.trace."""

import pytest
import timm
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import vrwkv  # noqa: F401

STEP = 1e-6


@pytest.fixture(scope="module", params=["test_vrwkv", "test_vrwkv6"])
def model(request):
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=3, img_size=32, depth=2).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def direction(images):
    return torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def slope(function, images, direction):
    return (function(images + STEP * direction) - function(images - STEP * direction)) / (2 * STEP)


def assert_slope(actual, wanted):
    assert wanted.abs().max() > 1e-5
    torch.testing.assert_close(actual, wanted, atol=1e-8, rtol=1e-5)


def test_forward_mode(model, images, direction):
    wanted = slope(model, images, direction).detach()
    assert_slope(jvp(model, (images,), (direction,))[1], wanted)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(images, direction))).tangent
            assert_slope(tangent.detach(), wanted)
    compiled = torch.compile(model, backend="aot_eager")
    assert_slope(jvp(compiled, (images,), (direction,))[1], wanted)
    jacobian = jacrev(model)(images)
    assert_slope(jacobian.flatten(2) @ direction.flatten(), wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_second_derivatives(model, images, direction, checkpointing):
    model.set_grad_checkpointing(checkpointing)

    def gradient(x, create_graph=False):
        x = x.clone().requires_grad_()
        return x, torch.autograd.grad(model(x).square().sum(), x, create_graph=create_graph)[0]

    x, first = gradient(images, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), x)
    assert_slope(second, slope(lambda x: gradient(x)[1], images, direction))
    model.set_grad_checkpointing(False)


def test_torch_names_what_it_cannot_do_with_checkpoints(model, images):
    model.set_grad_checkpointing(True)
    with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
        grad(lambda x: model(x).sum())(images)
    model.set_grad_checkpointing(False)


def test_gradients_of_each_sample(model, images):
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    each = vmap(grad(lambda parameters, x: loss(parameters, x[None])), in_dims=(None, 0))(parameters, images)
    wanted = torch.autograd.grad(loss(parameters, images), list(parameters.values()))
    for a, b in zip(each.values(), wanted, strict=True):
        torch.testing.assert_close(a.sum(0), b)


def test_trace_that_can_be_trained(model, images):
    traced = torch.jit.trace(model, images)  # compares itself with a trace without gradients
    torch.testing.assert_close(traced(images), model(images))
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(model(images).sum(), parameters)
    for a, b in zip(torch.autograd.grad(traced(images).sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(a, b)
