"""The CUDA kernels of the pointwise functions, run on the CPU with their memory checked, against float64."""

import pytest
import torch
from support.tolerances import BACKWARD, FORWARD, assert_close

from vrwkv.ops._gating import torch_impl

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def make(count, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 31), (2, 49, 64), (1, 1024, 33)])
def test_values_and_gradients(emulated, shape, dtype):
    grad, r, y = make(3, shape, dtype)
    inputs = [x.double().requires_grad_() for x in (r, y)]
    wanted = torch_impl.sigmoid_gate(*inputs)
    assert_close(emulated.sigmoid_gate(r, y), wanted, FORWARD, dtype)
    wanted_gradients = torch.autograd.grad(wanted, inputs, grad.double())
    for actual, expected in zip(emulated._sigmoid_gate_backward(grad, r, y), wanted_gradients, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, BACKWARD, dtype)
    wanted = torch_impl.squared_relu(inputs[1])
    assert_close(emulated.squared_relu(y), wanted, FORWARD, dtype)
    in_place = y.clone()
    emulated.squared_relu_(in_place)
    assert torch.equal(in_place, emulated.squared_relu(y))
    (wanted_gradient,) = torch.autograd.grad(wanted, inputs[1:], grad.double())
    assert_close(emulated._squared_relu_backward(grad, emulated.squared_relu(y)), wanted_gradient, BACKWARD, dtype)


def test_far_from_zero_and_nan(emulated):
    r = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4])
    assert_close(emulated.sigmoid_gate(r, torch.ones(7)), torch.sigmoid(r.double()), FORWARD, torch.float32)
    nan = torch.full((5,), float("nan"))
    assert emulated.sigmoid_gate(nan, nan).isnan().all() and emulated.squared_relu(nan).isnan().all()


def test_any_number_of_blocks_empty_and_unaligned(emulated):
    _, r, y = make(3, (1000,), torch.float32)
    expected = emulated.sigmoid_gate(r, y)
    try:
        for max_blocks in (1, 3):
            emulated.configure(max_blocks)
            assert torch.equal(emulated.sigmoid_gate(r, y), expected)
    finally:
        emulated.configure()
    assert torch.equal(emulated.sigmoid_gate(r[1:], y[1:]), expected[1:])
    assert emulated.squared_relu(r[:0]).shape == (0,)


def test_wrong_input(emulated):
    with pytest.raises(RuntimeError, match=r"sigmoid_gate: y must have the shape of r, \(3,\), got \(4,\)"):
        emulated.sigmoid_gate(torch.zeros(3), torch.zeros(4))
