"""The CUDA kernels of Bi-WKV, run on the CPU with their memory and barriers checked, against the float64 reference."""

import pytest
import torch
from support.bi_wkv_cases import NAMES, REGIMES, make_case
from support.tolerances import BACKWARD, FORWARD, assert_close

from vrwkv.ops._bi_wkv import reference, torch_impl

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Every T, C and B of the issue; 209 and 257 tokens take two tiles of unequal length, 1024 several.
SHAPES = [
    (1, 1, 1), (3, 1, 192), (1, 2, 31), (3, 2, 64), (3, 31, 33), (1, 31, 192), (1, 33, 1), (3, 33, 64),
    (1, 49, 33), (3, 49, 31), (1, 196, 64), (3, 196, 1), (1, 196, 192), (1, 209, 33), (3, 257, 16), (1, 1024, 9),
]  # fmt: skip


def check(emulated, case, dtype):
    grad, *inputs = case.to(dtype)
    y = emulated.bi_wkv(*inputs)
    assert y.dtype == dtype
    assert_close(y, case.y, FORWARD, dtype, scale=case.scales[0])
    gradients = emulated._bi_wkv_backward(grad, *inputs)
    for name, x, actual, wanted, scale in zip(NAMES, inputs, gradients, case.gradients, case.scales[1:], strict=True):
        assert actual.dtype == x.dtype, name
        assert_close(actual, wanted, BACKWARD, dtype, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_initial_values(emulated, shape, dtype):
    check(emulated, make_case(*shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", REGIMES[1:])
@pytest.mark.parametrize("shape", [(1, 2, 31), (3, 33, 31), (1, 49, 64), (3, 196, 9), (1, 257, 17), (1, 1024, 5)])
def test_extreme_keys_and_decays(emulated, shape, regime, dtype):
    check(emulated, make_case(*shape, regime), dtype)


@pytest.mark.parametrize("tokens, channels", [(196, 192), (1024, 33), (4096, 9)])
def test_fp32_error(emulated, tokens, channels):
    generator = torch.Generator().manual_seed(tokens)
    w = torch.linspace(-5, 3, channels) / tokens
    u = torch.randn(channels, generator=generator) / tokens
    k, v = (torch.randn(1, tokens, channels, generator=generator) for _ in range(2))
    some = sorted({0, channels - 1})
    wanted = reference.bi_wkv(*(x[..., some].double() for x in (w, u, k, v)))
    y = emulated.bi_wkv(w, u, k, v)
    assert_close(y[..., some], wanted, {torch.float32: 2e-6}, torch.float32, scale=v.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [(1, 49, 64, "decay"), (1, 1024, 9)])
def test_bits_do_not_depend_on_blocks_or_order(emulated, case, dtype):
    grad, *inputs = make_case(*case).to(dtype)
    results = []
    try:
        for max_blocks, seed in ((1 << 20, 0), (1, 1), (3, 2), (7, 3)):
            emulated.configure(max_blocks, seed)
            results.append([emulated.bi_wkv(*inputs), *emulated._bi_wkv_backward(grad, *inputs)])
    finally:
        emulated.configure()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_more_tiles_than_a_block_scans(emulated):
    tokens = 257 * 128 + 5  # in double a tile has 128
    generator = torch.Generator().manual_seed(0)
    w, u = torch.tensor([3.0, -0.5], dtype=torch.float64) / 128, torch.zeros(2, dtype=torch.float64)
    k, v, grad = (torch.randn(1, tokens, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    inputs = [x.requires_grad_() for x in (w, u, k, v)]
    wanted = torch_impl.bi_wkv(*inputs)
    wanted_gradients = torch.autograd.grad(wanted, inputs, grad)
    inputs = [x.detach() for x in inputs]
    assert_close(emulated.bi_wkv(*inputs), wanted.detach(), BACKWARD, torch.float64)
    for actual, expected in zip(emulated._bi_wkv_backward(grad, *inputs), wanted_gradients, strict=True):
        assert_close(actual, expected, {torch.float64: 1e-9}, torch.float64)


def test_layouts_that_are_not_contiguous_or_not_aligned(emulated):
    grad, w, u, k, v = make_case(3, 33, 64).to(torch.float16)
    expected = [emulated.bi_wkv(w, u, k, v), *emulated._bi_wkv_backward(grad, w, u, k, v)]
    spaced = torch.stack((w, w), dim=1)[:, 0]
    transposed = k.transpose(0, 2).contiguous().transpose(0, 2)
    shifted = torch.cat((torch.zeros(1, dtype=v.dtype), v.flatten()))[1:].view_as(v)  # two bytes off
    actual = [
        emulated.bi_wkv(spaced, u, transposed, shifted),
        *emulated._bi_wkv_backward(grad, spaced, u, transposed, shifted),
    ]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty(emulated, shape):
    w, x = torch.zeros(shape[2]), torch.zeros(shape)
    assert emulated.bi_wkv(w, w, x, x).shape == shape
    for gradient, like in zip(emulated._bi_wkv_backward(x, w, w, x, x), (w, w, x, x), strict=True):
        assert gradient.shape == like.shape and not gradient.any()


@pytest.mark.parametrize("tokens", [40, 300])
def test_nan_is_not_hidden_and_a_masked_key_has_no_weight(emulated, tokens):
    _, w, u, k, v = make_case(1, tokens, 4).to(torch.float32)
    k, v = k.clone(), v.clone()
    k[0, 5, 0] = v[0, 6, 1] = float("nan")
    k[0, 7, 2] = float("-inf")
    y = emulated.bi_wkv(w, u, k, v)
    assert y[..., :2].isnan().all() and y[..., 2:].isfinite().all()
    v[0, 7, 2] += 1e3
    assert torch.equal(emulated.bi_wkv(w, u, k, v)[..., 2], y[..., 2])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k": torch.zeros(2, 4)}, "k must have shape (B, T, C), got (2, 4)"),
        ({"v": torch.zeros(2, 5, 3)}, "v must have the shape of k, (2, 4, 3), got (2, 5, 3)"),
        ({"v": torch.zeros(2, 4, 3).half()}, "v must have the dtype of k, torch.float32, got torch.float16"),
        ({"w": torch.zeros(4)}, "w must have shape (C,) = (3,) to match k, got (4,)"),
        ({"u": torch.zeros(3).half()}, "u must have dtype torch.float32, got torch.float16"),
    ],
)
def test_wrong_input(emulated, change, words):
    inputs = {"w": torch.zeros(3), "u": torch.zeros(3), "k": torch.zeros(2, 4, 3), "v": torch.zeros(2, 4, 3)} | change
    with pytest.raises(RuntimeError) as caught:
        emulated.bi_wkv(*inputs.values())
    assert str(caught.value) == f"bi_wkv: {words}"
