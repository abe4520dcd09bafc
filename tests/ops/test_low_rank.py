import pytest
import torch
from support.tolerances import BACKWARD, FORWARD, assert_close

from vrwkv.ops import low_rank, low_rank_mix

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [  # B, T, C, R, J
    (1, 1, 1, 1, 1),
    (2, 7, 33, 5, 2),
    (1, 71, 192, 32, 5),
    (3, 20, 48, 64, 1),
    (2, 8, 31, 3, 3),
]


def low_rank_formula(h, matrix, offset):
    return offset + torch.tanh(h) @ matrix


def mix_formula(x, y, h, matrices, offsets):
    parts = h.split(matrices.shape[1], dim=2)
    return tuple(x + (y - x) * (offsets[j] + torch.tanh(parts[j]) @ matrices[j]) for j in range(len(matrices)))


def make_inputs(name, shape, dtype, device, wide=False):
    """Arguments of an op: tokens in `dtype`, parameters in fp32 (fp64 for fp64) or, where `wide`, `dtype` too."""
    batch, tokens, channels, rank, parts = shape
    generator = torch.Generator().manual_seed(0)
    parameters = dtype if wide or dtype == torch.float64 else torch.float32

    def draw(dtype, *sizes):
        return torch.randn(sizes, generator=generator).to(device, dtype).requires_grad_()

    if name == "low_rank":
        return draw(dtype, batch, tokens, rank), draw(parameters, rank, channels), draw(parameters, channels)
    xy = [draw(dtype, batch, tokens, channels) for _ in range(2)]
    h = draw(dtype, batch, tokens, parts * rank)
    return *xy, h, draw(parameters, parts, rank, channels), draw(parameters, parts, channels)


OPS = {"low_rank": (low_rank, low_rank_formula), "low_rank_mix": (low_rank_mix, mix_formula)}
every_op = pytest.mark.parametrize("name", OPS)


def results(function, inputs):
    outputs = function(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@every_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(device, name, shape, dtype):
    function, formula = OPS[name]
    inputs = make_inputs(name, shape, dtype, device)
    inputs64 = [x.detach().double().requires_grad_() for x in inputs]
    actual, wanted = results(function, inputs), results(formula, inputs64)
    assert len(actual) == len(wanted)
    for a, b in zip(actual, wanted, strict=True):
        assert a.dtype == dtype and a.is_contiguous()
        assert_close(a, b, FORWARD, dtype)
    grads = [torch.randn(a.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype) for a in actual]
    actual = torch.autograd.grad(actual, inputs, grads)
    wanted = torch.autograd.grad(wanted, inputs64, [grad.double() for grad in grads])
    for x, a, b in zip(inputs, actual, wanted, strict=True):
        assert a.dtype == x.dtype and a.shape == x.shape
        assert_close(a, b, BACKWARD, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_is_right_everywhere(device, dtype):
    """To a few units in the last place of each value, near zero too; infinite and NaN stay what they are."""
    places = torch.cat([torch.logspace(-30, 2, 3000, dtype=torch.float64), torch.linspace(0.1, 0.15, 1001)]).to(dtype)
    h = torch.cat([places, -places]).to(device)
    one, zero = torch.ones(1, 1, device=device, dtype=dtype), torch.zeros(1, device=device, dtype=dtype)
    actual = low_rank(h[None, :, None], one, zero).flatten()
    wanted = torch.tanh(h.double()) if dtype == torch.float32 else torch.tanh(h)
    relative = ((actual.double() - wanted) / wanted).abs().max().item()
    assert relative <= 8 * torch.finfo(dtype).eps
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0], device=device, dtype=dtype)
    actual = low_rank(special[None, :, None], one, zero).flatten()
    assert actual[:2].tolist() == [1, -1] and actual[2].isnan() and actual[3] == 0


@every_op
def test_gradcheck_and_opcheck(native, name):
    function, _ = OPS[name]
    shape = (2, 3, 5, 2, 2)
    assert torch.autograd.gradcheck(function, make_inputs(name, shape, torch.float64, native))
    operator = getattr(torch.ops.vrwkv, name).default
    torch.library.opcheck(operator, make_inputs(name, shape, torch.float32, native))


@every_op
def test_parameters_of_the_tokens_dtype(device, name):
    function, _ = OPS[name]
    inputs = make_inputs(name, SHAPES[1], torch.bfloat16, device, wide=True)
    wide = [x if x.dim() == 3 and len(x) == 2 and x.shape[1] == 7 else x.float() for x in inputs]
    for a, b in zip(results(function, inputs), results(function, wide), strict=True):
        assert torch.equal(a, b)


@every_op
def test_other_layouts_and_empty(device, name):
    function, _ = OPS[name]
    inputs = make_inputs(name, (2, 6, 20, 4, 3), torch.float32, device)
    strided = [x.detach().mT.contiguous().mT if x.dim() > 1 else x for x in inputs]
    for a, b in zip(results(function, strided), results(function, inputs), strict=True):
        assert_close(a, b, FORWARD, torch.float32)
    for shape in ((0, 6, 20, 4, 3), (2, 0, 20, 4, 3)):
        inputs = make_inputs(name, shape, torch.float32, device)
        outputs = results(function, inputs)
        assert all(y.shape == (*shape[:2], 20) for y in outputs)
        grads = torch.autograd.grad(sum(y.sum() for y in outputs), inputs)
        assert [grad.shape for grad in grads] == [x.shape for x in inputs]


@every_op
def test_one_result_alone_has_gradients(device, name):
    function, formula = OPS[name]
    inputs = make_inputs(name, SHAPES[1], torch.float64, device)
    actual = torch.autograd.grad(results(function, inputs)[0].square().sum(), inputs)
    wanted = torch.autograd.grad(results(formula, inputs)[0].square().sum(), inputs)
    torch.testing.assert_close(actual, wanted)


@every_op
def test_autocast_changes_nothing(device, name):
    function, _ = OPS[name]
    inputs = make_inputs(name, SHAPES[1], torch.float32, device)
    wanted = results(function, inputs)
    with torch.autocast(device.type, torch.bfloat16):
        actual = results(function, inputs)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    gradients = [torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs) for outputs in (actual, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@every_op
def test_same_bits_for_any_number_of_threads(native, name):
    function, _ = OPS[name]
    inputs = make_inputs(name, (2, 333, 40, 8, 2), torch.float32, native)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            outputs.append(results(function, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in outputs[1:]:
        assert all(map(torch.equal, outputs[0], other))


def test_wrong_input(device):
    h, matrix, offset = torch.zeros(2, 3, 4), torch.zeros(4, 5), torch.zeros(5)
    x, hs, matrices, offsets = torch.zeros(2, 3, 5), torch.zeros(2, 3, 8), torch.zeros(2, 4, 5), torch.zeros(2, 5)
    h, matrix, offset, x, hs, matrices, offsets = (
        tensor.to(device) for tensor in (h, matrix, offset, x, hs, matrices, offsets)
    )
    for call, error, words in [
        (lambda: low_rank(h[0], matrix, offset), RuntimeError, "h must have shape (B, T, C), got (3, 4)"),
        (lambda: low_rank(h, offset, offset), RuntimeError, "matrix must have shape (R, C), got (5,)"),
        (
            lambda: low_rank(h, matrix[:3], offset),
            RuntimeError,
            "matrix must have shape (4, 5) to match h, got (3, 5)",
        ),
        (
            lambda: low_rank(h, matrix, offset[:3]),
            RuntimeError,
            "offset must have shape (5,) to match matrix, got (3,)",
        ),
        (
            lambda: low_rank(h.long(), matrix, offset),
            RuntimeError,
            "h must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (lambda: low_rank(h, matrix, None), TypeError, "offset must be a torch.Tensor, got NoneType"),
        (
            lambda: low_rank_mix(x, x[:1], hs, matrices, offsets),
            RuntimeError,
            "y must have the shape of x, (2, 3, 5), got (1, 3, 5)",
        ),
        (
            lambda: low_rank_mix(x, x, hs[..., :7], matrices, offsets),
            RuntimeError,
            "h must have shape (B, T, J * R) = (2, 3, 8) to match x and matrices, got (2, 3, 7)",
        ),
        (
            lambda: low_rank_mix(x, x, hs.bfloat16(), matrices, offsets),
            RuntimeError,
            "h must have the dtype of x, torch.float32, got torch.bfloat16",
        ),
        (
            lambda: low_rank_mix(x, x, hs, matrices[0], offsets),
            RuntimeError,
            "matrices must have shape (J, R, C), got (4, 5)",
        ),
        (
            lambda: low_rank_mix(x, x, hs, matrices[..., :3], offsets),
            RuntimeError,
            "matrices must have shape (2, 4, 5) to match x, got (2, 4, 3)",
        ),
        (
            lambda: low_rank_mix(x, x, hs, matrices, offsets[:1]),
            RuntimeError,
            "offsets must have shape (2, 5) to match matrices, got (1, 5)",
        ),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).partition(": ")[2] == words
