import pytest
import torch
from support.tolerances import BACKWARD, FORWARD, assert_close

from vrwkv.ops import norm_gate

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1, 1), (2, 7, 3, 8), (2, 5, 2, 40), (1, 66, 3, 64), (2, 3, 1, 33), (1, 4, 2, 160)]  # B, T, H, N


def formula(y, g, weight, bias, eps=1e-5):
    deviation = y - y.mean(-1, keepdim=True)
    normal = deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt()
    return (normal.flatten(2) * weight + bias) * g / (1 + torch.exp(-g))


def make_inputs(shape, dtype, device, parameters=None):
    batch, tokens, heads, size = shape
    generator = torch.Generator().manual_seed(0)
    parameters = parameters or (torch.float64 if dtype == torch.float64 else torch.float32)
    y = torch.randn(shape, generator=generator) * 2 + 1
    g = 3 * torch.randn(batch, tokens, heads * size, generator=generator)
    weight, bias = torch.randn(2, heads * size, generator=generator).unbind()
    tensors = y.to(dtype), g.to(dtype), weight.to(parameters), bias.to(parameters)
    return [tensor.to(device).clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(device, shape, dtype):
    inputs = make_inputs(shape, dtype, device)
    inputs64 = [x.detach().double().requires_grad_() for x in inputs]
    actual, wanted = norm_gate(*inputs), formula(*inputs64)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_close(actual, wanted, FORWARD, dtype)
    grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    actual, wanted = torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(wanted, inputs64, grad.double())
    for x, a, b in zip(inputs, actual, wanted, strict=True):
        assert a.dtype == x.dtype and a.shape == x.shape
        assert_close(a, b, BACKWARD, dtype)


def test_small_values_and_eps(device):
    """Where the variance is far below eps, which is added to it."""
    inputs = make_inputs((2, 5, 2, 16), torch.float32, device)
    with torch.no_grad():
        inputs[0].mul_(1e-4)
    for eps in (1e-5, 0.1):
        assert_close(norm_gate(*inputs, eps), formula(*(x.double() for x in inputs), eps), FORWARD, torch.float32)


def test_far_from_zero(device):
    """A mean a thousand times the deviation; gates of any size."""
    y, g, weight, bias = (x.detach() for x in make_inputs((1, 6, 2, 64), torch.float32, device))
    g = g.clone()
    g[0, 0, :6] = torch.tensor([-1e4, -200, -88, 88, 200, 1e4])
    y = y + 1e3
    wanted = formula(y.double(), g.double().clamp(min=-700), weight.double(), bias.double())
    assert_close(norm_gate(y, g, weight, bias), wanted, {torch.float32: 2e-4}, torch.float32)  # y itself is rounded


def test_gradcheck_and_opcheck(native):
    assert torch.autograd.gradcheck(norm_gate, make_inputs((2, 3, 2, 4), torch.float64, native))
    inputs = make_inputs((2, 3, 2, 4), torch.float32, native)
    torch.library.opcheck(torch.ops.vrwkv.norm_gate.default, (*inputs, 1e-5))


def test_parameters_of_the_tokens_dtype(device):
    inputs = make_inputs((2, 5, 2, 8), torch.bfloat16, device, torch.bfloat16)
    assert torch.equal(norm_gate(*inputs), norm_gate(*inputs[:2], *(x.float() for x in inputs[2:])))


def test_other_layouts_and_empty(device):
    y, g, weight, bias = make_inputs((2, 6, 2, 8), torch.float32, device)
    strided = y.detach().transpose(1, 2).contiguous().transpose(1, 2), g.detach().mT.contiguous().mT
    assert torch.equal(norm_gate(*strided, weight, bias), norm_gate(y, g, weight, bias))
    for shape in ((0, 6, 2, 8), (2, 0, 2, 8)):
        inputs = make_inputs(shape, torch.float32, device)
        out = norm_gate(*inputs)
        assert out.shape == (*shape[:2], 16)
        assert [grad.shape for grad in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]


def test_same_bits_for_any_number_of_threads(native):
    inputs = make_inputs((2, 700, 3, 24), torch.float32, native)
    threads = torch.get_num_threads()
    try:
        outputs = []
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            outputs.append(norm_gate(*inputs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_wrong_input(device):
    y, g, weight, bias = (x.detach() for x in make_inputs((2, 3, 2, 4), torch.float32, device))
    shape = "y must have shape (B, T, H, N) with B, T and H * N those of g, "
    for call, error, words in [
        (lambda: norm_gate(y, g[0], weight, bias), RuntimeError, "g must have shape (B, T, C), got (3, 8)"),
        (lambda: norm_gate(g, g, weight, bias), RuntimeError, f"{shape}(2, 3, 8), got (2, 3, 8)"),
        (lambda: norm_gate(y[:1], g, weight, bias), RuntimeError, f"{shape}(2, 3, 8), got (1, 3, 2, 4)"),
        (
            lambda: norm_gate(y.double(), g, weight, bias),
            RuntimeError,
            "y must have the dtype of g, torch.float32, got torch.float64",
        ),
        (
            lambda: norm_gate(y, g, weight[:3], bias),
            RuntimeError,
            "weight must have shape (C,) = (8,) to match g, got (3,)",
        ),
        (
            lambda: norm_gate(y, g, weight, bias.long()),
            RuntimeError,
            "bias must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (lambda: norm_gate(y, None, weight, bias), TypeError, "g must be a torch.Tensor, got NoneType"),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == f"norm_gate: {words}"
