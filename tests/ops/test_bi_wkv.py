import numpy as np
import pytest
import torch
from support.tolerances import BACKWARD, FORWARD, assert_close

from vrwkv.ops import _extension, bi_wkv
from vrwkv.ops._bi_wkv import reference, torch_impl

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = ("w", "u", "k", "v")


def make_inputs(batch, tokens, channels, dtype=torch.float32, device="cpu", seed=0):
    """Decays over the initial range of the layer, -5..3 before the division by T; w and u in the accumulator dtype."""
    generator = torch.Generator().manual_seed(seed)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    w = torch.linspace(-5, 3, channels, dtype=torch.float64) / tokens
    u = torch.randn(channels, generator=generator, dtype=torch.float64) / tokens
    k, v = (torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64) for _ in range(2))
    return [x.to(device, t) for x, t in ((w, accumulate), (u, accumulate), (k, dtype), (v, dtype))]


def expected(inputs):
    return reference.bi_wkv(*(x.double() for x in inputs))


def gradients(function, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs, grad)


@pytest.mark.parametrize("channels", [1, 33, 192])
@pytest.mark.parametrize("tokens", [1, 2, 31, 49, 196, 257, 1024, 4096])
def test_forward(device, tokens, channels):
    inputs = make_inputs(2 if tokens < 1000 else 1, tokens, channels, device=device)
    some = sorted({0, channels // 7, channels // 2, channels - 1})  # the reference costs T^2 per channel
    wanted = expected([x[..., some] for x in inputs])
    assert_close(bi_wkv(*inputs)[..., some], wanted, FORWARD, torch.float32, scale=inputs[3].abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, channels", [(49, 33), (150, 35)])
def test_dtypes(device, dtype, tokens, channels):
    inputs = make_inputs(2, tokens, channels, dtype, device)
    y = bi_wkv(*inputs)
    assert y.dtype == dtype
    assert_close(y, expected(inputs), FORWARD, dtype)
    grad = torch.randn(y.shape, dtype=torch.float64).to(dtype).to(device)
    actual = gradients(bi_wkv, inputs, grad)
    wanted = gradients(reference.bi_wkv, [x.double() for x in inputs], grad.double())
    for name, x, a, b in zip(NAMES, inputs, actual, wanted, strict=True):
        assert a.dtype == x.dtype, name
        assert_close(a, b, BACKWARD, dtype)


@pytest.mark.parametrize("tokens, channels", [(1, 1), (2, 33), (31, 1), (129, 64), (300, 35), (600, 5)])
def test_gradients(device, tokens, channels):
    inputs = make_inputs(2, tokens, channels, device=device)
    grad = torch.randn(2, tokens, channels, generator=torch.Generator().manual_seed(1)).to(device)
    actual = gradients(bi_wkv, inputs, grad)
    wanted = gradients(reference.bi_wkv, [x.double() for x in inputs], grad.double())
    for name, a, b in zip(NAMES, actual, wanted, strict=True):
        scale = max(b.abs().max().item(), 1.0)  # with T = 1 the gradients of w, u and k are zero
        assert_close(a, b, BACKWARD, torch.float32, scale=scale), name


def extreme_inputs(kind, tokens, dtype, device):
    w, u, k, v = make_inputs(1, tokens, 9, dtype, device)
    if kind != "keys":
        w = torch.linspace(-1e3, 1e3, 9).to(w) / tokens
    if kind != "decay":
        k = (torch.rand(k.shape, generator=torch.Generator().manual_seed(2)) * 2e4 - 1e4).to(k)
    return [w, u * tokens * 3, k, v]


@pytest.mark.parametrize("kind", ["keys", "decay", "both"])
@pytest.mark.parametrize("tokens", [2, 31, 196, 300])
def test_extreme_exponents(device, kind, tokens):
    # fp32 cannot tell exponents of 1e4 apart by less than 1e-3: exact sums are asked of float64, right ones of fp32.
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-3)):
        inputs = extreme_inputs(kind, tokens, dtype, device)
        y, wanted = bi_wkv(*inputs), expected(inputs)
        assert_close(y, wanted, {dtype: tolerance}, dtype, scale=inputs[3].abs().max().item())
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
        for name, a, b in zip(
            NAMES,
            gradients(bi_wkv, inputs, grad),
            gradients(reference.bi_wkv, [x.double() for x in inputs], grad.double()),
            strict=True,
        ):
            assert_close(a, b, {dtype: 10 * tolerance}, dtype, scale=max(b.abs().max().item(), 1.0)), name


@pytest.mark.parametrize("tokens", [1, 7, 260])
def test_gradcheck(device, tokens):
    inputs = make_inputs(1, tokens, 2, torch.float64, device)
    if tokens > 100:  # perturb all elements at once
        assert torch.autograd.gradcheck(bi_wkv, [x.requires_grad_() for x in inputs], fast_mode=True)
    else:
        assert torch.autograd.gradcheck(bi_wkv, [x.requires_grad_() for x in inputs])


def test_opcheck(native):
    inputs = make_inputs(2, 6, 5, device=native)
    torch.library.opcheck(torch.ops.vrwkv.bi_wkv.default, [x.requires_grad_() for x in inputs])
    half = make_inputs(1, 6, 5, torch.bfloat16, native)
    torch.library.opcheck(torch.ops.vrwkv.bi_wkv.default, [x.requires_grad_() for x in half])


@pytest.mark.parametrize("steep", [False, True])
def test_same_bits_on_repetition_and_for_any_thread_count(device, steep):
    inputs = make_inputs(2, 600, 40, device=device)
    if steep:
        inputs[0] = inputs[0] * 100
    grad = torch.randn(2, 600, 40).to(device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, threads, threads):
            torch.set_num_threads(count)
            results.append([bi_wkv(*inputs), *gradients(bi_wkv, inputs, grad)])
    finally:
        torch.set_num_threads(threads)
    if not _extension.is_native(grad):
        results = results[3:]  # torch's own sums may follow the number of threads: repetition is what is promised there
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_layouts_that_are_not_contiguous(device):
    w, u, k, v = make_inputs(3, 20, 12, device=device)
    y = bi_wkv(w, u, k, v)
    padded = torch.zeros(24, device=device)
    padded[::2] = w
    k_transposed, v_sliced = k.transpose(0, 2).contiguous().transpose(0, 2), torch.cat((v, v), dim=2)[:, :, :12]
    assert torch.equal(bi_wkv(padded[::2], u, k_transposed, v_sliced), y)
    expanded = bi_wkv(w, u, k[:1].expand(3, -1, -1), v)
    assert torch.equal(expanded, bi_wkv(w, u, k[:1].repeat(3, 1, 1), v))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty(device, shape):
    inputs = [torch.zeros(shape[2]), torch.zeros(shape[2]), torch.zeros(shape), torch.zeros(shape)]
    inputs = [x.to(device).requires_grad_() for x in inputs]
    y = bi_wkv(*inputs)
    assert y.shape == shape
    for x, grad in zip(inputs, torch.autograd.grad(y.sum(), inputs), strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_nan_and_infinity_are_not_hidden(device):
    w, u, k, v = make_inputs(1, 40, 3, device=device)
    k[0, 5, 0] = float("nan")
    v[0, 6, 1] = float("nan")
    y = bi_wkv(w, u, k, v)
    assert y[..., 0].isnan().all() and y[..., 1].isnan().all() and y[..., 2].isfinite().all()


def test_a_masked_key_has_no_weight(device):
    w, u, k, v = make_inputs(1, 40, 3, device=device)
    k[0, 7] = float("-inf")
    y = bi_wkv(w, u, k, v)
    v[0, 7] += 1e3
    assert_close(bi_wkv(w, u, k, v), y.double(), FORWARD, torch.float32)


def test_memory_is_linear_in_tokens(device):
    # 2^20 tokens: a quadratic intermediate would need terabytes.
    inputs = make_inputs(1, 2**20 if device.type == "cuda" else 2**17, 2, device=device)
    y = bi_wkv(*inputs)
    assert y.isfinite().all()
    # The plain mean is what remains at w = u = 0 with constant keys.
    zeros = torch.zeros(2, device=device)
    y = bi_wkv(zeros, zeros, torch.zeros_like(inputs[2]), inputs[3])
    assert_close(y, inputs[3].double().mean(1, keepdim=True).expand_as(y), FORWARD, torch.float32, scale=1.0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k": torch.zeros(2, 4)}, "k must have shape (B, T, C), got (2, 4)"),
        ({"v": torch.zeros(2, 4, 4)}, "v must have the shape of k, (2, 4, 3), got (2, 4, 4)"),
        ({"v": torch.zeros(2, 4, 3).half()}, "v must have the dtype of k, torch.float32, got torch.float16"),
        ({"w": torch.zeros(4)}, "w must have shape (C,) = (3,) to match k, got (4,)"),
        ({"u": torch.zeros(1, 3)}, "u must have shape (C,) = (3,) to match k, got (1, 3)"),
        (
            {"u": torch.zeros(3, dtype=torch.long)},
            "u must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (
            {"k": torch.zeros(2, 4, 3, dtype=torch.int32)},
            "k must be float16, bfloat16, float32 or float64, got torch.int32",
        ),
        ({"w": torch.zeros(3, device="meta")}, "w must be on the device of k, {device}, got meta"),
    ],
)
def test_wrong_input(device, change, words):
    inputs = {"w": torch.zeros(3), "u": torch.zeros(3), "k": torch.zeros(2, 4, 3), "v": torch.zeros(2, 4, 3)} | change
    inputs = {name: x if x.is_meta else x.to(device) for name, x in inputs.items()}
    with pytest.raises(RuntimeError) as caught:
        bi_wkv(**inputs)
    # The same words from the kernels and from pure torch.
    assert str(caught.value) == "bi_wkv: " + words.format(device=inputs["k"].device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [None, [[[0.0]]], np.zeros((1, 1, 1), np.float32)])
def test_what_is_no_tensor(device, name, value):
    inputs = dict(zip(NAMES, make_inputs(1, 1, 1, device=device), strict=True)) | {name: value}
    with pytest.raises(TypeError) as caught:
        bi_wkv(**inputs)
    assert str(caught.value) == f"bi_wkv: {name} must be a torch.Tensor, got {type(value).__name__}"


def test_wrong_input_without_data(native):
    w, k = torch.zeros(4, device="meta"), torch.zeros(2, 4, 3, device="meta")
    with pytest.raises(RuntimeError, match=r"w must have shape \(C,\) = \(3,\)"):
        bi_wkv(w, w, k, k)


def test_autocast_keeps_the_given_dtype(device):
    inputs = make_inputs(1, 20, 8, torch.bfloat16, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = bi_wkv(*inputs)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, bi_wkv(*inputs))


def test_operators_called_directly_check_their_input(native):
    w, k = torch.zeros(3, device=native), torch.zeros(2, 4, 3, device=native)
    ops = torch.ops.vrwkv
    for call, words in [
        (lambda: ops.bi_wkv(w[:2], w, k, k), "bi_wkv: w must have shape (C,) = (3,) to match k, got (2,)"),
        (lambda: ops.bi_wkv(w, w.double(), k, k), "bi_wkv: u must have dtype torch.float32, got torch.float64"),
        (lambda: ops.bi_wkv(w, w, k, k[:1]), "bi_wkv: v must have the shape of k, (2, 4, 3), got (1, 4, 3)"),
        (
            lambda: ops._bi_wkv_backward(k[:1], w, w, k, k),
            "_bi_wkv_backward: grad must have the shape of k, (2, 4, 3), got (1, 4, 3)",
        ),
        (lambda: ops.q_shift(k, 2, 2, 1, 5.0, 1), "q_shift: channel_gamma must lie in [0, 1/4], four groups share"),
        (lambda: ops.q_shift(k, 2, 2, 1, 0.25, 0), "q_shift: heads must be at least 1 and divide C = 3, got 0"),
        (lambda: ops._q_shift_mix_backward([], k, [w], 2, 2, 1, 0.25, 1), "grads must be as many as mixes, 1, got 0"),
        (lambda: ops._sigmoid_gate_backward(k[:1], k, k), "grad must have the shape of r, (2, 4, 3), got (1, 4, 3)"),
        (lambda: ops._squared_relu_backward(k.half(), k), "grad must have the dtype of y, torch.float32, got"),
    ]:
        with pytest.raises(RuntimeError) as caught:
            call()
        assert words in str(caught.value)


@pytest.mark.parametrize("decay", [-300, -5, 0, 30, 300])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 196])
def test_exported_form(tokens, decay):
    """One graph for every T: right for all decays that `vrwkv.export` lets through, and for keys far apart."""
    w, u, k, v = make_inputs(2, tokens, 33, torch.float64)
    w = torch.full_like(w, decay / tokens)
    for keys in (k, 300 * k):
        inputs = w, u, keys, v
        wanted, scale = expected(inputs), v.abs().max().item()
        assert_close(torch_impl._exported(*inputs), wanted, FORWARD, torch.float64, scale=scale)
    single = [x.float() for x in make_inputs(2, tokens, 33)]
    assert_close(torch_impl._exported(*single), expected(single), FORWARD, torch.float32, scale=scale)
