import numpy as np
import pytest
import torch
from support.tolerances import BACKWARD, FORWARD, assert_close

from vrwkv.ops import sigmoid_gate, squared_relu

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CASES = {
    "sigmoid_gate": (sigmoid_gate, lambda r, y: torch.sigmoid(r) * y, 2),
    "squared_relu": (squared_relu, lambda x: x.clamp(min=0) ** 2, 1),
}


def make_inputs(count, shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (33,), (2, 7, 31), (3, 64, 192)])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(device, name, shape, dtype):
    function, formula, count = CASES[name]
    inputs = make_inputs(count, shape, dtype, device)
    inputs64 = [x.detach().double().requires_grad_() for x in inputs]
    actual, wanted = function(*inputs), formula(*inputs64)
    assert actual.dtype == dtype
    assert_close(actual, wanted, FORWARD, dtype)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    actual, wanted = torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(wanted, inputs64, grad.double())
    for a, b in zip(actual, wanted, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, BACKWARD, dtype)


def test_far_from_zero(device):
    r = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4, float("inf"), float("-inf")], device=device)
    wanted = torch.sigmoid(r.double())
    assert_close(sigmoid_gate(r, torch.ones_like(r)), wanted, FORWARD, torch.float32)
    nan = torch.full((3,), float("nan"), device=device)
    assert sigmoid_gate(nan, torch.ones_like(nan)).isnan().all() and squared_relu(nan).isnan().all()


@pytest.mark.parametrize("name", CASES)
def test_gradcheck_and_opcheck(native, name):
    function, _, count = CASES[name]
    assert torch.autograd.gradcheck(function, make_inputs(count, (3, 13), torch.float64, native))
    operator = getattr(torch.ops.vrwkv, name).default
    torch.library.opcheck(operator, make_inputs(count, (2, 3, 5), torch.float32, native))


def test_opcheck_in_place(native):
    torch.library.opcheck(torch.ops.vrwkv.squared_relu_.default, (torch.randn(3, 13, device=native),))
    with pytest.raises(RuntimeError, match=r"squared_relu_: x must be contiguous, got shape \(5, 3\)"):
        torch.ops.vrwkv.squared_relu_(torch.randn(3, 5, device=native).t())


@pytest.mark.parametrize("name", CASES)
def test_other_layouts_and_empty(device, name):
    function, _, count = CASES[name]
    inputs = make_inputs(count, (6, 8), torch.float32, device)
    assert torch.equal(function(*(x.t() for x in inputs)), function(*inputs).t())
    empty = make_inputs(count, (0, 8), torch.float32, device)
    y = function(*empty)
    assert y.shape == (0, 8) and torch.autograd.grad(y.sum(), empty[0])[0].shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_relu_in_place(device, dtype):
    (x,) = make_inputs(1, (7, 31), dtype, device)
    wanted = squared_relu(x)
    for layout in (x.detach().clone(), x.detach().t().contiguous().t()):
        assert torch.equal(squared_relu(layout, inplace=True), wanted)
    overwritten = x * 1
    actual = squared_relu(overwritten, inplace=True)
    assert torch.equal(actual, wanted)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    assert torch.equal(torch.autograd.grad(actual, x, grad)[0], torch.autograd.grad(wanted, x, grad)[0])


def test_squared_relu_overwrites_what_it_may(native):
    (x,) = make_inputs(1, (7, 31), torch.float32, native)
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode:
            y = x * 1
            assert squared_relu(y, inplace=True).data_ptr() == y.data_ptr()
    kept = x.exp()  # exp keeps its result for the backward pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared_relu(kept, inplace=True).sum().backward()
    w = torch.ones_like(x, requires_grad=True)
    kept = x.detach().clone()
    product = (w * kept).sum()
    squared_relu(kept, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_squared_relu_leaves_a_leaf_alone(native):
    (x,) = make_inputs(1, (7, 31), torch.float32, native)
    before = x.detach().clone()
    squared_relu(x, inplace=True).sum().backward()
    assert torch.equal(x, before) and x.grad is not None


def test_dtypes_are_promoted(device):
    r, y = torch.randn(2, 5, device=device).bfloat16(), torch.randn(2, 5, device=device)
    assert torch.equal(sigmoid_gate(r, y), sigmoid_gate(r.float(), y))


def test_wrong_input(device):
    x = torch.zeros(2, 3, device=device)
    floating = "must be float16, bfloat16, float32 or float64, got torch.int64"
    for call, error, words in [
        (lambda: sigmoid_gate(x, x[0]), RuntimeError, "sigmoid_gate: y must have the shape of r, (2, 3), got (3,)"),
        (lambda: sigmoid_gate(x.long(), x), RuntimeError, f"sigmoid_gate: r {floating}"),
        (lambda: sigmoid_gate(x.long(), x.long()), RuntimeError, f"sigmoid_gate: r {floating}"),
        (lambda: squared_relu(x.long()), RuntimeError, f"squared_relu: x {floating}"),
        (lambda: sigmoid_gate(x, None), TypeError, "sigmoid_gate: y must be a torch.Tensor, got NoneType"),
        (lambda: sigmoid_gate(np.zeros(3), x), TypeError, "sigmoid_gate: r must be a torch.Tensor, got ndarray"),
        (lambda: squared_relu([1.0]), TypeError, "squared_relu: x must be a torch.Tensor, got list"),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == words
