import gc
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from vrwkv.layers import ChannelMix, SpatialMix, SpatialMix6, grid
from vrwkv.layers.recompute import recomputed
from vrwkv.ops import q_shift_mix


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


@contextmanager
def plain_context(function, *inputs):
    yield function(*inputs)


def through(x, scale, first, second, function):
    with recomputed(function, x, scale) as (a, b):
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


def test_nothing_of_the_function_is_kept(case):
    x, scale, first, second, _ = case
    storages = []

    def function(x, scale):
        inner = torch.sin(x)
        result = inner * scale, torch.cos(x * scale)
        storages.extend(StorageWeakRef(y.untyped_storage()) for y in (inner, *result))
        return result

    with recomputed(function, x, scale) as (a, b):
        loss = first(a).sum() + second(b).sum()
    del a, b
    assert loss.requires_grad and len(storages) == 3 and all(storage.expired() for storage in storages)
    loss.backward()
    assert len(storages) == 6 and all(storage.expired() for storage in storages)


def test_an_outer_hook_sees_what_is_kept(case):
    """Inputs, and what the block keeps besides the results: here of the product that stands in it."""
    x, scale, first, second, function = case
    kept, seen = [], []
    outer = torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: seen.append(y) or y)
    with outer, recomputed(function, x, scale) as (a, b):
        c, d = first(a), second(b)
        loss = (c * d).sum()
    pointers = [tensor.data_ptr() for tensor in kept]
    wanted = x, scale, first.weight, second.weight, c, d
    assert sorted(pointers) == sorted(tensor.data_ptr() for tensor in wanted)
    loss.backward()
    assert {tensor.data_ptr() for tensor in seen} == set(pointers)


def test_nested(case):
    x, scale, first, second, function = case
    inner, constant = Counted(), scale.detach()  # three parts of a gradient could be added in another order

    def nested(context):
        with context(function, x, scale) as (a, b), context(inner, a, constant) as (c, _):
            return first(c).sum() + second(b).square().sum()

    wanted = gradients(nested(plain_context), case)
    function.calls = inner.calls = 0
    assert all(map(torch.equal, gradients(nested(recomputed), case), wanted))
    assert (function.calls, inner.calls) == (2, 2)


def test_changes_in_place(case):
    x, scale, first, second, function = case

    def changed(context):
        with context(function, x, scale) as (a, b):
            return first(a.mul_(3)).sum() + second(b).sum()

    wanted = gradients(changed(plain_context), case)
    assert all(map(torch.equal, gradients(changed(recomputed), case), wanted))
    with recomputed(function, x, scale) as (a, b):
        c, d = first(a), second(b)
        loss = (c * d).sum()
    with torch.no_grad():
        d.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = through(*case)
    with torch.no_grad():
        first.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torch_func(case):
    x, scale, *rest = case
    actual = torch.func.grad(lambda x: through(x, scale, *rest))(x)
    torch.testing.assert_close(actual, gradients(plain(*case), case)[0])


@pytest.mark.parametrize(
    "layer",
    [SpatialMix(8, 0, 2), ChannelMix(8, 16, 0, 2), SpatialMix6(8, 0, 2, 2)],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixes_keep_no_shifted_tokens(layer, dtype, monkeypatch):
    calls = []

    def counted(x, *args):
        calls.append(x.dtype)
        return q_shift_mix(x, *args)

    monkeypatch.setattr(grid, "q_shift_mix", counted)
    x = torch.randn(2, 6, 8, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = layer(x, (2, 3))
    y.float().square().sum().backward()
    assert calls == [dtype, dtype] and x.grad.dtype == torch.float32
    with torch.no_grad():
        layer(x, (2, 3))
    assert len(calls) == 3


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


@pytest.mark.parametrize("checkpointed", [False, True])
def test_all_is_freed_without_the_garbage_collector(case, checkpointed):
    """By the backward pass, and where there is none by dropping the loss."""
    x, scale, first, second, function = case
    storages = []

    def run(x, scale):
        with recomputed(function, x, scale) as (a, b):
            c, d = first(a), second(b)
            y = c * d.tanh()
        storages.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in (x, a, b, c, d))
        return y.square().sum()

    gc.collect()
    gc.disable()
    try:
        for backward in (True, False):
            loss = checkpoint(run, x * 2, scale, use_reentrant=False) if checkpointed else run(x * 2, scale)
            if backward:
                loss.backward()
            del loss
            assert storages and all(storage.expired() for storage in storages)
    finally:
        gc.enable()


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
