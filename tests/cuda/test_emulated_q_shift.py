"""The CUDA kernels of Q-Shift, run on the CPU with their memory and barriers checked, against the reference."""

import pytest
import torch
from support.tolerances import BACKWARD, FORWARD, assert_close

from vrwkv.ops._q_shift import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# B, (H, W), C, shift_pixel, channel_gamma, heads: grids that are not square or smaller than the shift, groups that end
# inside a vector of channels, heads that do so, channels in no group, more pixels than a block takes.
CASES = [
    (1, (1, 1), 1, 1, 0.25, 1),
    (3, (1, 2), 31, 1, 0.25, 1),
    (1, (31, 1), 33, 2, 0.25, 1),
    (3, (3, 11), 64, 1, 0.25, 1),
    (1, (7, 7), 192, 1, 0.2, 1),
    (1, (14, 14), 40, 3, 0.25, 1),
    (3, (2, 5), 33, 7, 0.25, 1),
    (1, (32, 32), 33, 1, 0.25, 1),
    (3, (40, 20), 8, 1, 0.25, 1),
    (2, (5, 6), 192, 1, 0.25, 3),
    (1, (6, 5), 48, 2, 0.2, 4),
    (2, (4, 3), 24, 1, 0.25, 8),
]


def make(batch, grid, channels, dtype, count=3):
    generator = torch.Generator().manual_seed(channels)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (batch, grid[0] * grid[1], channels)
    x, *grads = (torch.randn(shape, generator=generator).to(dtype) for _ in range(count + 1))
    return x, [torch.rand(channels, generator=generator).to(accumulate) for _ in range(count)], grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, grid, channels, shift, gamma, heads", CASES)
def test_shift_and_its_adjoint_are_exact(emulated, batch, grid, channels, shift, gamma, heads, dtype):
    x, _, (grad, *_) = make(batch, grid, channels, dtype)
    x.requires_grad_()
    wanted = reference.q_shift(x, *grid, shift, gamma, heads)
    assert torch.equal(emulated.q_shift(x.detach(), *grid, shift, gamma, heads), wanted)
    assert torch.equal(emulated.q_shift(grad, *grid, -shift, gamma, heads), torch.autograd.grad(wanted, x, grad)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, grid, channels, shift, gamma, heads", CASES)
def test_mix(emulated, batch, grid, channels, shift, gamma, heads, dtype):
    check_mix(emulated, batch, grid, channels, shift, gamma, heads, dtype)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
def test_any_number_of_mixes(emulated, count):
    check_mix(emulated, 2, (5, 6), 36, 1, 0.25, 1, torch.float32, count)


def check_mix(emulated, batch, grid, channels, shift, gamma, heads, dtype, count=3):
    x, mixes, grads = make(batch, grid, channels, dtype, count)
    inputs = [tensor.double().requires_grad_() for tensor in (x, *mixes)]
    wanted = reference.q_shift_mix(inputs[0], inputs[1:], *grid, shift, gamma, heads)
    wanted_gradients = torch.autograd.grad(wanted, inputs, [grad.double() for grad in grads])
    for actual, expected in zip(emulated.q_shift_mix(x, mixes, *grid, shift, gamma, heads), wanted, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, FORWARD, dtype)
    grad_x, grad_mixes = emulated._q_shift_mix_backward(grads, x, mixes, *grid, shift, gamma, heads)
    for actual, expected in zip((grad_x, *grad_mixes), wanted_gradients, strict=True):
        assert_close(actual, expected, BACKWARD, dtype)


def test_bits_do_not_depend_on_blocks_or_order(emulated):
    x, mixes, grads = make(3, (32, 32), 72, torch.float32)
    results = []
    try:
        for max_blocks, seed in ((1 << 20, 0), (1, 1), (5, 2)):
            emulated.configure(max_blocks, seed)
            grad_x, grad_mixes = emulated._q_shift_mix_backward(grads, x, mixes, 32, 32, 1, 0.25, 1)
            results.append([*emulated.q_shift_mix(x, mixes, 32, 32, 1, 0.25, 1), grad_x, *grad_mixes])
    finally:
        emulated.configure()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("shape, grid", [((0, 6, 3), (2, 3)), ((2, 0, 3), (0, 5)), ((2, 6, 0), (2, 3))])
def test_empty(emulated, shape, grid):
    x, mix = torch.zeros(shape), torch.zeros(shape[2])
    assert emulated.q_shift(x, *grid, 1, 0.25, 1).shape == shape
    assert [y.shape for y in emulated.q_shift_mix(x, [mix, mix], *grid, 1, 0.25, 1)] == [shape, shape]
    grad_x, grad_mixes = emulated._q_shift_mix_backward([x, x], x, [mix, mix], *grid, 1, 0.25, 1)
    assert grad_x.shape == shape and len(grad_mixes) == 2 and not any(grad.any() for grad in grad_mixes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid, channels", [((4, 5), 64), ((20, 15), 8)])
def test_bits_do_not_depend_on_storage_offset_or_layout(emulated, grid, channels, dtype):
    x, mixes, grads = make(2, grid, channels, dtype)

    def moved(tensor, offset):
        return torch.cat((torch.zeros(offset, dtype=dtype), tensor.flatten()))[offset:].view_as(tensor)

    def run(x, grads):
        grad_x, grad_mixes = emulated._q_shift_mix_backward(grads, x, mixes, *grid, 1, 0.25, 1)
        shifted = emulated.q_shift(x, *grid, 1, 0.25, 1)
        return [shifted, *emulated.q_shift_mix(x, mixes, *grid, 1, 0.25, 1), grad_x, *grad_mixes]

    expected = run(x, grads)
    transposed = [grad.transpose(0, 2).contiguous().transpose(0, 2) for grad in grads]
    others = [(moved(x, offset), grads) for offset in range(1, 16 // dtype.itemsize)]
    others += [(x, [grads[0], moved(grads[1], 1), grads[2]]), (moved(x, 1), transposed)]
    for some_x, some_grads in others:
        assert all(torch.equal(a, b) for a, b in zip(run(some_x, some_grads), expected, strict=True))


def test_wrong_input(emulated):
    x, mix = torch.zeros(2, 6, 3), torch.zeros(3)
    for call, words in (
        (
            lambda: emulated.q_shift(x, 2, 2, 1, 0.25, 1),
            "q_shift: patch_resolution (H, W) must satisfy H * W = T = 6, got (2, 2)",
        ),
        (
            lambda: emulated.q_shift_mix(x, [mix.half()], 2, 3, 1, 0.25, 1),
            "mixes[0] must have dtype torch.float32, got torch.float16",
        ),
        (lambda: emulated._q_shift_mix_backward([], x, [mix], 2, 3, 1, 0.25, 1), "as many as mixes, 1, got 0"),
    ):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert words in str(caught.value)
