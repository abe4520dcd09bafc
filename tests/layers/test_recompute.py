import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vrwkv.layers.recompute import recomputed


class Counted:
    """Two cheap functions of a tensor, counted."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, scale):
        self.calls += 1
        return torch.sin(x) * scale, torch.cos(x * scale)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(2, 5, 8, generator=generator), torch.randn(8, generator=generator)
    torch.manual_seed(0)
    return x.requires_grad_(), scale.requires_grad_(), nn.Linear(8, 4, bias=False), nn.Linear(8, 4), Counted()


def through(x, scale, first, second, function, context=recomputed):
    with context(function, x, scale) as (a, b):
        c, d = first(a), second(b)
    return (c * d.tanh()).sum()


def plain(x, scale, first, second, function):
    a, b = function(x, scale)
    return (first(a) * second(b).tanh()).sum()


def gradients(loss, case, **keywords):
    x, scale, first, second, _ = case
    return torch.autograd.grad(loss, [x, scale, first.weight, second.weight, second.bias], **keywords)


def test_same_bits_for_one_more_call(case):
    loss = through(*case)
    assert case[-1].calls == 1
    actual = gradients(loss, case)
    assert case[-1].calls == 2
    wanted = plain(*case)
    assert torch.equal(loss, wanted)
    assert all(map(torch.equal, actual, gradients(wanted, case)))


def test_results_are_not_kept(case):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        x, scale, first, second, function = case
        with recomputed(function, x, scale) as (a, b):
            loss = first(a).sum() + second(b).sum()
    assert loss.requires_grad and any(tensor is x for tensor in kept)  # an outer hook sees what is kept instead
    results = {a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr()}
    assert not results & {tensor.untyped_storage().data_ptr() for tensor in kept}


def test_again_and_twice(case):
    loss = through(*case)
    first = gradients(loss, case, retain_graph=True)
    assert all(map(torch.equal, first, gradients(loss, case)))
    assert case[-1].calls == 3

    def second_order(loss):
        with_graph = gradients(loss, case, create_graph=True)
        return gradients(sum(g.square().sum() for g in with_graph), case)

    for actual, wanted in zip(second_order(through(*case)), second_order(plain(*case)), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_inside_a_checkpoint(case):
    wanted = gradients(plain(*case), case)
    case[-1].calls = 0
    loss = checkpoint(through, *case, use_reentrant=False)
    assert all(map(torch.equal, gradients(loss, case), wanted))
    assert case[-1].calls == 3  # forward, the checkpoint's, and ours


def test_frozen_parts(case):
    x, scale, first, second, function = case
    first.requires_grad_(False)
    actual = torch.autograd.grad(through(*case), [x, second.weight])
    assert all(map(torch.equal, actual, torch.autograd.grad(plain(*case), [x, second.weight])))
    for tensor in (x, scale):
        tensor.requires_grad_(False)
    function.calls = 0
    through(*case).backward()
    assert function.calls == 1  # nothing in front asks for gradients: the results are kept


def test_without_gradients(case):
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(through(*case), plain(*case))


def test_autocast_is_the_same_again(case):
    def rounded(x, scale):
        x = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
        return function(x, scale.to(x.dtype))

    *rest, function = case
    with torch.autocast("cpu", torch.bfloat16):
        loss, wanted = through(*rest, rounded), plain(*rest, rounded)
    assert all(map(torch.equal, gradients(loss, case), gradients(wanted, case)))
    assert function.calls == 3
