"""The CUDA kernels of wkv6, run on the CPU with their memory and barriers checked, against the float64 reference."""

import pytest
import torch
from support.tolerances import BACKWARD, FORWARD, assert_close
from support.wkv6_cases import DECAYS, NAMES, make_case, make_inputs

from vrwkv.ops._wkv6 import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# (B, T, H, N): chunks have 64 tokens (32 in double), tiles 32 or 64 columns, states a multiple of 8.
SHAPES = [
    (3, 1, 2, 8), (2, 2, 1, 40), (1, 31, 2, 64), (1, 64, 1, 80), (2, 65, 2, 16), (1, 196, 1, 40), (1, 257, 1, 64),
    (1, 70, 1, 3),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(emulated, shape, decays, dtype):
    case = make_case(*shape, decays)
    grad, *inputs = case.to(dtype)
    y = emulated.wkv6(*inputs)
    assert y.dtype == dtype
    assert_close(y, case.y, FORWARD, dtype)
    gradients = emulated._wkv6_backward(grad, *inputs)
    for name, x, actual, wanted in zip(NAMES, inputs, gradients, case.gradients, strict=True):
        assert actual.dtype == x.dtype, name
        scale = max(wanted.abs().max().item(), 1.0)  # with few tokens the gradient of w is zero
        assert_close(actual, wanted, BACKWARD, dtype, scale=scale)


def test_fp32_error_of_a_long_sequence(emulated):
    r, k, v, w, u = make_inputs(1, 1500, 1, 8)
    w = w - 4  # down to e^-12: states that last
    wanted = reference.wkv6(r, k, v, w, u)
    y = emulated.wkv6(*(x.float() for x in (r, k, v, w, u)))
    assert_close(y, wanted, {torch.float32: 1e-5}, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_states_do_not_overflow(emulated, dtype):
    r, k, v, w, u = (torch.full((1, 200, 1, 16), x) for x in (1e-3, 30.0, 30.0, -12.0, 0.0))
    y = emulated.wkv6(*(x.to(dtype) for x in (r, k, v, w)), u[0, 0])
    wanted = reference.wkv6(*(x.to(dtype).double() for x in (r, k, v, w)), u[0, 0].double())
    assert_close(y, wanted, FORWARD, dtype)  # states are above 1e5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 50, 2, 16), (2, 140, 1, 40)])
def test_bits_do_not_depend_on_blocks_or_order(emulated, shape, dtype):
    grad, *inputs = make_case(*shape).to(dtype)
    results = []
    try:
        for max_blocks, seed in ((1 << 20, 0), (1, 1), (3, 2)):
            emulated.configure(max_blocks, seed)
            results.append([emulated.wkv6(*inputs), *emulated._wkv6_backward(grad, *inputs)])
    finally:
        emulated.configure()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_layouts_that_are_not_contiguous_or_not_aligned(emulated):
    grad, r, k, v, w, u = make_case(2, 65, 2, 16).to(torch.float16)
    expected = [emulated.wkv6(r, k, v, w, u), *emulated._wkv6_backward(grad, r, k, v, w, u)]
    transposed = k.transpose(0, 3).contiguous().transpose(0, 3)
    shifted = torch.cat((torch.zeros(1, dtype=v.dtype), v.flatten()))[1:].view_as(v)  # two bytes off
    spaced = torch.stack((u, u), dim=2)[..., 0]
    actual = [
        emulated.wkv6(r, transposed, shifted, w, spaced),
        *emulated._wkv6_backward(grad, r, transposed, shifted, w, spaced),
    ]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (2, 0, 2, 3), (2, 5, 0, 3), (2, 5, 2, 0)])
def test_empty(emulated, shape):
    x, u = torch.zeros(shape), torch.zeros(shape[2:])
    assert emulated.wkv6(x, x, x, x, u).shape == shape
    for gradient, like in zip(emulated._wkv6_backward(x, x, x, x, x, u), (x, x, x, x, u), strict=True):
        assert gradient.shape == like.shape and not gradient.any()


def test_nan_is_not_hidden(emulated):
    r, k, v, w, u = make_case(1, 70, 1, 3).to(torch.float32)[1:]
    for name, x in {"r": r, "k": k, "v": v, "w": w}.items():
        inputs = {"r": r, "k": k, "v": v, "w": w, name: x.clone()}
        inputs[name][0, 5, 0, 1] = float("nan")
        y = emulated.wkv6(*inputs.values(), u)
        assert y.isnan().any(), name


@pytest.mark.parametrize(
    "change, words",
    [
        ({"r": torch.zeros(2, 4)}, "r must have shape (B, T, H, N), got (2, 4)"),
        ({"w": torch.zeros(2, 4, 3, 1)}, "w must have the shape of r, (2, 4, 2, 3), got (2, 4, 3, 1)"),
        ({"u": torch.zeros(3, 2)}, "u must have shape (H, N) = (2, 3) to match r, got (3, 2)"),
        ({"u": torch.zeros(2, 3).half()}, "u must have dtype torch.float32, got torch.float16"),
    ],
)
def test_wrong_input(emulated, change, words):
    x = torch.zeros(2, 4, 2, 3)
    inputs = {"r": x, "k": x, "v": x, "w": x, "u": torch.zeros(2, 3)} | change
    with pytest.raises(RuntimeError) as caught:
        emulated.wkv6(*inputs.values())
    assert str(caught.value) == f"wkv6: {words}"
