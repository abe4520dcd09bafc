"""Forward mode, second derivatives and torch.func, which the kernels do not know: right by pure torch, never zero."""

from functools import partial
from itertools import product

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from vrwkv.ops import bi_wkv, low_rank, low_rank_mix, norm_gate, q_shift, q_shift_mix, sigmoid_gate, squared_relu, wkv6


def _q_shift_mix(x, *mixes):
    return q_shift_mix(x, mixes, (2, 3), heads=2)


CASES = {  # function, shapes
    "bi_wkv": (bi_wkv, [(2,), (2,), (2, 4, 2), (2, 4, 2)]),
    "wkv6": (wkv6, [(1, 4, 1, 2)] * 4 + [(1, 2)]),
    "q_shift": (partial(q_shift, patch_resolution=(2, 3)), [(2, 6, 8)]),
    "q_shift_mix": (_q_shift_mix, [(2, 6, 8), (8,), (8,)]),
    "sigmoid_gate": (sigmoid_gate, [(2, 3), (2, 3)]),
    "squared_relu": (squared_relu, [(2, 5)]),
    "low_rank": (low_rank, [(1, 3, 2), (2, 4), (4,)]),
    "low_rank_mix": (low_rank_mix, [(1, 3, 4), (1, 3, 4), (1, 3, 4), (2, 2, 4), (2, 4)]),
    "norm_gate": (norm_gate, [(1, 2, 2, 3), (1, 2, 6), (6,), (6,)]),
}


@pytest.fixture(params=CASES)
def case(request):
    function, shapes = CASES[request.param]
    generator = torch.Generator().manual_seed(0)
    return function, [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def as_tuple(y):
    return y if isinstance(y, tuple) else (y,)


def total(function, *inputs):
    """Something curved of all outputs."""
    return sum(y.square().sum() for y in as_tuple(function(*inputs)))


def test_numerical_derivatives(case):
    function, inputs = case
    inputs = [x.requires_grad_() for x in inputs]
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_gradients_given_all_at_once(case):
    function, inputs = case
    inputs = [x.requires_grad_() for x in inputs]
    outputs = as_tuple(function(*inputs))
    grads = [torch.randn(3, *y.shape, dtype=y.dtype) for y in outputs]
    actual = torch.autograd.grad(outputs, inputs, grads, is_grads_batched=True, retain_graph=True)
    wanted = [torch.autograd.grad(outputs, inputs, [grad[i] for grad in grads], retain_graph=True) for i in range(3)]
    for a, b in zip(actual, zip(*wanted, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


def test_tangents_of_gradients(case):
    """The backward pass alone is in forward mode; it is linear in what it is given."""
    function, inputs = case
    inputs = [x.requires_grad_() for x in inputs]
    value = total(function, *inputs)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(value), 2 * torch.ones_like(value))
        for x in torch.autograd.grad(value, inputs, grad):
            gradient, tangent = forward_ad.unpack_dual(x)
            torch.testing.assert_close(tangent, 2 * gradient)


def test_every_argument_mapped_along_every_dimension(case):
    function, inputs = case
    for dims in product(*([None, 0, x.dim(), -2] for x in inputs[-2:])):
        dims = (None,) * (len(inputs) - len(dims)) + dims
        if any(dim is not None for dim in dims):
            batch = [x if dim is None else torch.stack((x, -x), dim) for x, dim in zip(inputs, dims, strict=True)]
            mapped = as_tuple(torch.func.vmap(function, in_dims=dims)(*batch))
            for i in range(2):
                chosen = [x if dim is None else x.select(dim, i) for x, dim in zip(batch, dims, strict=True)]
                for a, b in zip(mapped, as_tuple(function(*chosen)), strict=True):
                    torch.testing.assert_close(a[i], b)


def test_one_tensor_given_twice_has_both_derivatives():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: bi_wkv(x[0, 0], x[0, 1], x, x), x)


def test_transforms(case):
    function, inputs = case
    places = tuple(range(len(inputs)))
    inputs = [x.requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(total(function, *inputs), inputs)
    inputs = [x.detach() for x in inputs]
    for transform in torch.func.grad, torch.func.jacfwd:
        actual = transform(partial(total, function), places)(*inputs)
        for a, b in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a, b)
    batch = [torch.stack((x, 2 * x), dim=-1) for x in inputs]
    mapped = torch.func.vmap(partial(total, function), in_dims=-1)(*batch)
    torch.testing.assert_close(mapped, torch.stack([total(function, *(x[..., i] for x in batch)) for i in range(2)]))


def test_tangent_of_what_is_linear():
    w, u, k, v = (torch.randn(shape) for shape in [(3,), (3,), (1, 5, 3), (1, 5, 3)])
    y, tangent = torch.func.jvp(lambda v: bi_wkv(w, u, k, v), (v,), (v,))
    torch.testing.assert_close(tangent, y)
    assert tangent.any()
