import pytest
import torch
from support.tolerances import BACKWARD, FORWARD, assert_close
from support.wkv6_cases import NAMES, make_case, make_inputs

from vrwkv.ops import wkv6
from vrwkv.ops._extension import is_native
from vrwkv.ops._wkv6 import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [  # (B, T, H, N)
    (3, 1, 2, 8), (2, 2, 1, 40), (1, 31, 2, 64), (1, 64, 1, 80), (2, 65, 1, 16), (1, 196, 2, 40), (1, 257, 1, 64),
    (4, 37, 5, 12),  # sequences enough to be taken one way and then the other
]  # fmt: skip


def gradients(function, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs, grad)


@pytest.mark.parametrize("head_size", [8, 40, 64, 80])
@pytest.mark.parametrize("tokens", [1, 2, 31, 196, 257, 1024, 4096])
def test_fp32_error(device, tokens, head_size):
    r, k, v, w, u = make_inputs(1, tokens, 1, head_size, device=device)
    some = [0, head_size // 2, head_size - 1]  # columns of the state are independent of each other
    wanted = reference.wkv6(r, k, v[..., some], w, u)
    y = wkv6(*(x.float() for x in (r, k, v, w, u)))
    assert_close(y[..., some], wanted, {torch.float32: 1e-5}, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(device, shape, dtype):
    case = make_case(*shape)
    grad, *inputs = (x.to(device) for x in case.to(dtype))
    y = wkv6(*inputs)
    assert y.dtype == dtype
    assert_close(y, case.y, FORWARD, dtype)
    for name, x, actual, wanted in zip(NAMES, inputs, gradients(wkv6, inputs, grad), case.gradients, strict=True):
        assert actual.dtype == x.dtype, name
        scale = max(wanted.abs().max().item(), 1.0)  # with few tokens the gradient of w is zero
        assert_close(actual, wanted, BACKWARD, dtype, scale=scale), name


@pytest.mark.parametrize("tokens, head_size", [(1024, 64), (4300, 8)])
def test_gradients_of_long_sequences(device, tokens, head_size):
    inputs = make_inputs(1, tokens, 1, head_size, device=device)
    some = [0, head_size // 2, head_size - 1]
    grad = torch.zeros_like(inputs[2])  # columns of the state are independent of each other
    grad[..., some] = torch.randn(1, tokens, 1, 3, generator=torch.Generator().manual_seed(1)).to(grad)

    def columns(r, k, v, w, u):
        return reference.wkv6(r, k, v[..., some], w, u)

    wanted = gradients(columns, inputs, grad[..., some])
    actual = gradients(wkv6, [x.float() for x in inputs], grad.float())
    for name, a, b in zip(NAMES, actual, wanted, strict=True):
        assert_close(a, b, BACKWARD, torch.float32), name


@pytest.mark.parametrize("decay", [-12.0, -8.0, -4.0])
def test_equal_decays_do_not_add_up_their_rounding(device, decay):
    r, k, v, w, u = make_inputs(1, 4096, 1, 8, device=device)
    inputs = [r.abs(), k.abs(), v, torch.full_like(w, decay), u]
    wanted = reference.wkv6(*inputs)
    assert_close(wkv6(*(x.float() for x in inputs)), wanted, FORWARD, torch.float32)


@pytest.mark.parametrize("tokens", [2, 31, 196])
def test_extreme_decays(device, tokens):
    case = make_case(2, tokens, 1, 24, "extreme")
    for dtype in (torch.float32, torch.float64):
        grad, *inputs = (x.to(device) for x in case.to(dtype))
        assert_close(wkv6(*inputs), case.y, FORWARD, dtype)
        for name, actual, wanted in zip(NAMES, gradients(wkv6, inputs, grad), case.gradients, strict=True):
            assert_close(actual, wanted, BACKWARD, dtype, scale=max(wanted.abs().max().item(), 1.0)), name


def test_any_decay_gives_finite_results(device):
    grad, r, k, v, w, u = (x.to(device) for x in make_case(1, 70, 1, 16).to(torch.float32))
    for value in (float("-inf"), -1e30, -104.0, 5.0, 89.0, 1e30, float("inf")):
        w = torch.full_like(w, value)
        w[:, ::3] = -1.0
        y = wkv6(r, k, v, w, u)
        wanted = reference.wkv6(*(x.double() for x in (r, k, v, w, u)))
        assert_close(y, wanted, FORWARD, torch.float32)
        assert all(x.isfinite().all() for x in gradients(wkv6, [r, k, v, w, u], grad))


def test_a_decay_that_vanishes_has_no_gradient(device):
    grad, r, k, v, w, u = (x.to(device) for x in make_case(1, 70, 1, 16).to(torch.float32))
    for value in (5.0, 20.0, 60.0, float("inf")):
        w = torch.full_like(w, value)
        assert not gradients(wkv6, [r, k, v, w, u], grad)[3].any(), value


@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_gradcheck(device, tokens):
    inputs = [x.requires_grad_() for x in make_inputs(1, tokens, 2, 3, device=device)]
    assert torch.autograd.gradcheck(wkv6, inputs, fast_mode=tokens > 10)


def test_opcheck(native):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(native).requires_grad_() for x in make_case(2, 6, 2, 5).to(dtype)[1:]]
        torch.library.opcheck(torch.ops.vrwkv.wkv6.default, inputs)


@pytest.mark.parametrize("batch, tokens", [(1, 600), (9, 70)])
def test_same_bits_on_repetition_and_for_any_thread_count(device, batch, tokens):
    inputs = [x.float() for x in make_inputs(batch, tokens, 2, 16, device=device)]
    grad = torch.randn(inputs[0].shape, device=device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, threads, threads):
            torch.set_num_threads(count)
            results.append([wkv6(*inputs), *gradients(wkv6, inputs, grad)])
    finally:
        torch.set_num_threads(threads)
    if not is_native(inputs[0]):
        results = results[3:]  # torch's own sums may follow the number of threads: repetition is what is promised there
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_layouts_that_are_not_contiguous(device):
    r, k, v, w, u = (x.to(device) for x in make_case(3, 20, 2, 12).to(torch.float32)[1:])
    y = wkv6(r, k, v, w, u)
    transposed = r.transpose(0, 3).contiguous().transpose(0, 3)
    sliced, heads_first = torch.cat((v, v), dim=3)[..., :12], k.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(wkv6(transposed, heads_first, sliced, w, u.T.contiguous().T), y, FORWARD, torch.float32)
    expanded = wkv6(r, k, v[:1].expand(3, -1, -1, -1), w, u)
    assert_close(expanded, wkv6(r, k, v[:1].repeat(3, 1, 1, 1), w, u), FORWARD, torch.float32)


@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (2, 0, 2, 3), (2, 5, 0, 3), (2, 5, 2, 0)])
def test_empty(device, shape):
    inputs = [torch.zeros(shape, device=device, requires_grad=True) for _ in range(4)]
    inputs.append(torch.zeros(shape[2:], device=device, requires_grad=True))
    y = wkv6(*inputs)
    assert y.shape == shape
    for x, grad in zip(inputs, torch.autograd.grad(y.sum(), inputs), strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_nan_is_not_hidden(device):
    for i, name in enumerate("rkvw"):
        inputs = [x.to(device) for x in make_case(1, 70, 1, 8).to(torch.float32)[1:]]
        inputs[i] = inputs[i].clone()
        inputs[i][0, 5, 0, 2] = float("nan")
        y = wkv6(*inputs)
        seen = {"r": y[:, 5], "k": y, "v": y[..., 2], "w": y[:, :5]}[name]
        assert seen.isnan().all(), name


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"r": None}, TypeError, ["r must be a torch.Tensor", "NoneType"]),
        ({"r": torch.zeros(2, 4, 6)}, RuntimeError, ["r must have shape (B, T, H, N)", "(2, 4, 6)"]),
        ({"k": torch.zeros(2, 4, 3, 3)}, RuntimeError, ["k must have the shape of r", "(2, 4, 2, 3)", "(2, 4, 3, 3)"]),
        ({"v": torch.zeros(2, 4, 2, 3).half()}, RuntimeError, ["v must have the dtype of r", "float32", "float16"]),
        ({"w": torch.zeros(2, 5, 2, 3)}, RuntimeError, ["w must have the shape of r", "(2, 5, 2, 3)"]),
        ({"u": torch.zeros(6)}, RuntimeError, ["u must have shape (H, N) = (2, 3)", "(6,)"]),
        ({"u": torch.zeros(2, 3, dtype=torch.long)}, RuntimeError, ["u must be float16", "int64"]),
        ({"r": torch.zeros(2, 4, 2, 3, dtype=torch.int32)}, RuntimeError, ["r must be float16", "int32"]),
        ({"u": torch.zeros(2, 3, device="meta")}, RuntimeError, ["u must be on the device of r", "meta"]),
    ],
)
def test_wrong_input(device, change, error, words):
    inputs = {name: torch.zeros(2, 4, 2, 3) for name in "rkvw"} | {"u": torch.zeros(2, 3)} | change
    with pytest.raises(error) as caught:
        wkv6(**{name: x if x is None or x.is_meta else x.to(device) for name, x in inputs.items()})
    for word in ["wkv6:", *words]:
        assert word in str(caught.value)
    assert caught.value.__context__ is None  # what the kernel said is not shown too


def test_operators_called_directly_check_their_input(native):
    x, u = torch.zeros(2, 4, 2, 3, device=native), torch.zeros(2, 3, device=native)
    ops = torch.ops.vrwkv
    for call, words in [
        (lambda: ops.wkv6(x, x, x, x, u.T), "wkv6: u must have shape (H, N) = (2, 3) to match r, got (3, 2)"),
        (lambda: ops.wkv6(x, x, x, x, u.double()), "wkv6: u must have dtype torch.float32, got torch.float64"),
        (lambda: ops.wkv6(x, x, x, x[:1], u), "wkv6: w must have the shape of r, (2, 4, 2, 3), got (1, 4, 2, 3)"),
        (
            lambda: ops._wkv6_backward(x[:1], x, x, x, x, u),
            "_wkv6_backward: grad must have the shape of r, (2, 4, 2, 3), got (1, 4, 2, 3)",
        ),
    ]:
        with pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value) == words


def test_wrong_input_without_data(native):
    x = torch.zeros(2, 4, 2, 3, device="meta")
    with pytest.raises(RuntimeError, match=r"u must have shape \(H, N\) = \(2, 3\)"):
        wkv6(x, x, x, x, x[0, 0].T)


def test_autocast_keeps_the_given_dtype(device):
    inputs = [x.to(device) for x in make_case(1, 20, 1, 8).to(torch.bfloat16)[1:]]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = wkv6(*inputs)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wkv6(*inputs))


def test_traced_by_jit(device):
    inputs = [torch.randn(2, 70, 2, 16, device=device) for _ in range(4)] + [torch.randn(2, 16, device=device)]
    traced = torch.jit.trace(lambda *x: wkv6(*x), inputs)
    torch.testing.assert_close(traced(*inputs), wkv6(*inputs), rtol=0, atol=0)
