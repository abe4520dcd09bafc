import numpy as np
import pytest
import torch
from support.tolerances import BACKWARD, FORWARD, assert_close

from vrwkv.ops import q_shift, q_shift_mix
from vrwkv.ops._q_shift import reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# (H, W), C, shift_pixel, channel_gamma, heads: grids that are not square or smaller than the shift, channels in no
# group, heads smaller than a vector
CASES = [
    ((1, 1), 1, 1, 0.25, 1),
    ((1, 7), 33, 1, 0.25, 1),
    ((5, 3), 17, 2, 0.25, 1),
    ((2, 4), 16, 3, 0.25, 1),
    ((3, 5), 33, 1, 0.2, 1),
    ((4, 4), 8, 0, 0.25, 1),
    ((4, 4), 8, 1, 0.0, 1),
    ((14, 14), 192, 1, 0.25, 1),
    ((14, 14), 192, 1, 0.25, 3),
    ((3, 5), 33, 1, 0.2, 3),
    ((5, 3), 40, 2, 0.25, 8),
    ((2, 3), 6, 1, 0.25, 6),
]


def tokens(grid, channels, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, grid[0] * grid[1], channels, generator=generator).to(device, dtype)


def test_moves_each_group_the_way_it_says(device):
    x = torch.arange(1.0, 10.0, device=device).reshape(1, 9, 1).expand(-1, -1, 5)
    left, right, above, below, rest = q_shift(x, (3, 3), channel_gamma=0.2).reshape(3, 3, 5).unbind(-1)
    assert left.tolist() == [[0, 1, 2], [0, 4, 5], [0, 7, 8]]
    assert right.tolist() == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]
    assert above.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert below.tolist() == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert rest.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_heads_have_groups_of_their_own(device):
    x = tokens((3, 4), 24, torch.float32, device)
    apart = [q_shift(head, (3, 4)) for head in x.chunk(3, dim=2)]
    assert torch.equal(q_shift(x, (3, 4), heads=3), torch.cat(apart, dim=2))
    assert not torch.equal(q_shift(x, (3, 4), heads=3), q_shift(x, (3, 4)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid, channels, shift, gamma, heads", CASES)
def test_shift_and_its_gradient_are_exact(device, grid, channels, shift, gamma, heads, dtype):
    x = tokens(grid, channels, dtype, device).requires_grad_()
    y, wanted = q_shift(x, grid, shift, gamma, heads), reference.q_shift(x, *grid, shift, gamma, heads)
    assert y.dtype == dtype and torch.equal(y, wanted)
    grad = tokens(grid, channels, dtype, device, seed=1)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(wanted, x, grad)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid, channels, shift, gamma, heads", CASES)
def test_mix(device, grid, channels, shift, gamma, heads, dtype):
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    x = tokens(grid, channels, dtype, device).requires_grad_()
    mixes = [torch.rand(channels).to(device, accumulate).requires_grad_() for _ in range(3)]
    actual = q_shift_mix(x, mixes, grid, shift, gamma, heads)
    x64 = x.detach().double().requires_grad_()
    mixes64 = [mix.detach().double().requires_grad_() for mix in mixes]
    wanted = reference.q_shift_mix(x64, mixes64, *grid, shift, gamma, heads)
    assert len(actual) == 3
    for a, b in zip(actual, wanted, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, FORWARD, dtype)
    grads = [tokens(grid, channels, dtype, device, seed) for seed in (1, 2, 3)]
    actual = torch.autograd.grad(actual, [x, *mixes], grads)
    wanted = torch.autograd.grad(wanted, [x64, *mixes64], [grad.double() for grad in grads])
    for name, a, b in zip(("x", "mix 0", "mix 1", "mix 2"), actual, wanted, strict=True):
        assert a.dtype == (dtype if name == "x" else accumulate), name
        assert_close(a, b, BACKWARD, dtype, scale=max(b.abs().max().item(), 1.0))


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5])
def test_any_number_of_mixes(device, count):
    x = tokens((3, 4), 70, torch.float32, device)
    mixes = [torch.rand(70, device=device) for _ in range(count)]
    actual = q_shift_mix(x, mixes, (3, 4))
    assert len(actual) == count
    for a, b in zip(actual, reference.q_shift_mix(x, mixes, 3, 4, 1, 0.25), strict=True):
        assert_close(a, b, FORWARD, torch.float32)


def test_unused_outputs_need_no_gradient(device):
    x = tokens((3, 4), 8, torch.float32, device).requires_grad_()
    mixes = [torch.rand(8, device=device) for _ in range(2)]
    actual = torch.autograd.grad(q_shift_mix(x, mixes, (3, 4))[1].sum(), x)[0]
    wanted = torch.autograd.grad(reference.q_shift_mix(x, mixes, 3, 4, 1, 0.25)[1].sum(), x)[0]
    assert_close(actual, wanted, BACKWARD, torch.float32)


def test_gradcheck(device):
    x = tokens((3, 4), 9, torch.float64, device).requires_grad_()
    mixes = [torch.rand(9, dtype=torch.float64, device=device).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda x: q_shift(x, (3, 4), 1, 0.2), x)
    assert torch.autograd.gradcheck(lambda x, *mixes: q_shift_mix(x, mixes, (3, 4), heads=3), (x, *mixes))


def test_opcheck(native):
    x = tokens((2, 3), 8, torch.float32, native).requires_grad_()
    mixes = [torch.rand(8, device=native).requires_grad_() for _ in range(2)]
    torch.library.opcheck(torch.ops.vrwkv.q_shift.default, (x, 2, 3, 1, 0.25, 2))
    torch.library.opcheck(torch.ops.vrwkv.q_shift_mix.default, (x, mixes, 2, 3, 1, 0.25, 2))


def test_same_bits_for_any_thread_count(native):
    x = tokens((30, 20), 40, torch.float32, native).requires_grad_()
    mixes = [torch.rand(40, device=native).requires_grad_() for _ in range(3)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            outputs = q_shift_mix(x, mixes, (30, 20))
            results.append([*outputs, *torch.autograd.grad([y.square().sum() for y in outputs], [x, *mixes])])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_layouts_that_are_not_contiguous(device):
    x = tokens((3, 4), 8, torch.float32, device)
    mix = torch.rand(16, device=device)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(q_shift(transposed, (3, 4)), q_shift(x, (3, 4)))
    assert torch.equal(q_shift_mix(transposed, [mix[::2]], (3, 4))[0], q_shift_mix(x, [mix[::2].clone()], (3, 4))[0])


@pytest.mark.parametrize("shape, grid", [((0, 6, 4), (2, 3)), ((2, 0, 4), (0, 3)), ((2, 6, 0), (2, 3))])
def test_empty(device, shape, grid):
    x = torch.zeros(shape, device=device, requires_grad=True)
    mix = torch.zeros(shape[2], device=device, requires_grad=True)
    assert q_shift(x, grid).shape == shape
    (y,) = q_shift_mix(x, [mix], grid)
    assert y.shape == shape
    grad_x, grad_mix = torch.autograd.grad(y.sum(), [x, mix])
    assert grad_x.shape == shape and not grad_mix.any()


GRID = "patch_resolution (H, W) must satisfy H * W = T = 6, got"


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda x: q_shift(x, (2, 4)), RuntimeError, f"q_shift: {GRID} (2, 4) for x of shape (2, 6, 4)"),
        (lambda x: q_shift(x, (-2, -3)), RuntimeError, f"q_shift: {GRID} (-2, -3)"),
        (lambda x: q_shift(x, (11, (2**64 + 6) // 11)), RuntimeError, f"q_shift: {GRID} (11, "),
        (lambda x: q_shift(x[:, :0], (2**32, 2**32)), RuntimeError, "satisfy H * W = T = 0, got (4294967296, "),
        (lambda x: q_shift(x[0], (2, 3)), RuntimeError, "q_shift: x must have shape (B, T, C), got (6, 4)"),
        (lambda x: q_shift(x.long(), (2, 3)), RuntimeError, "bfloat16, float32 or float64, got torch.int64"),
        (
            lambda x: q_shift_mix(x, [x.new_zeros(4), x.new_zeros(5)], (2, 3)),
            RuntimeError,
            "q_shift_mix: mixes[1] must have shape (C,) = (4,) to match x, got (5,)",
        ),
        (
            lambda x: q_shift_mix(x, [x.new_zeros(4, device="meta")], (2, 3)),
            RuntimeError,
            "mixes[0] must be on the device of x, ",
        ),
        (lambda x: q_shift(x, (2, 3), shift_pixel=-1), ValueError, "shift_pixel must be an integer >= 0, got -1"),
        (lambda x: q_shift(x, (2, 3), shift_pixel=0.5), ValueError, "shift_pixel must be an integer >= 0, got 0.5"),
        (lambda x: q_shift(x, (2, 3), channel_gamma=0.3), ValueError, "channel_gamma must lie in [0, 1/4], "),
        (lambda x: q_shift(x, (2, 3), channel_gamma=None), ValueError, "four groups share the channels, got None"),
        (lambda x: q_shift(x, (2, 3), heads=0), ValueError, "q_shift: heads must be an integer >= 1, got 0"),
        (lambda x: q_shift_mix(x, [], (2, 3), heads=2.0), ValueError, "heads must be an integer >= 1, got 2.0"),
        (
            lambda x: q_shift(x, (2, 3), heads=3),
            RuntimeError,
            "q_shift: heads must be at least 1 and divide C = 4, got 3",
        ),
        (
            lambda x: q_shift_mix(x, [], (2, 3), heads=8),
            RuntimeError,
            "q_shift_mix: heads must be at least 1 and divide C",
        ),
        (lambda x: q_shift(x, (6,)), TypeError, "q_shift: patch_resolution must be two integers (H, W), got (6,)"),
        (lambda x: q_shift(x, 6), TypeError, "patch_resolution must be two integers (H, W), got 6"),
        (lambda x: q_shift_mix(x, [], (2.0, 3.0)), TypeError, "q_shift_mix: patch_resolution must be two integers"),
        (lambda x: q_shift(x.numpy(force=True), (2, 3)), TypeError, "x must be a torch.Tensor, got ndarray"),
        (lambda x: q_shift_mix(x, None, (2, 3)), TypeError, "mixes must be a list or tuple of tensors, got NoneType"),
        (lambda x: q_shift_mix(x, [[1.0]], (2, 3)), TypeError, "mixes[0] must be a torch.Tensor, got list"),
    ],
)
def test_wrong_input(device, call, error, words):
    with pytest.raises(error) as caught:
        call(torch.zeros(2, 6, 4, device=device))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_grid_of_numpy_integers(device):
    x = tokens((2, 3), 8, torch.float32, device)
    assert torch.equal(q_shift(x, tuple(np.array([2, 3]))), q_shift(x, (2, 3)))
