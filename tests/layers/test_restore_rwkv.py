"""Re-WKV and Omni-Shift against what their papers say, written out."""

import pytest
import torch
from torch import Tensor

from vrwkv.layers import OmniShift, ReWKV
from vrwkv.ops import bi_wkv

GRID = (3, 5)


def tokens(seed: int, channels: int = 6) -> Tensor:
    return torch.randn(2, 15, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_re_wkv_runs_along_rows_and_columns_in_turn(recurrence: int) -> None:
    layer = ReWKV(6, recurrence).double()
    k, v = tokens(0), tokens(1)
    by_rows = torch.arange(15)
    by_columns = by_rows.view(GRID).T.flatten()
    expected = v
    for turn in range(recurrence):
        order = by_columns if turn % 2 else by_rows
        result = torch.empty_like(v)
        result[:, order] = bi_wkv(
            layer.spatial_decay[turn] / 15, layer.spatial_first[turn] / 15, k[:, order], expected[:, order]
        )
        expected = result
    torch.testing.assert_close(layer(k, v, GRID), expected)


def test_re_wkv_of_two_turns_treats_rows_and_columns_alike() -> None:
    """With the same parameters in both turns, turning the grid round swaps the order of the turns only."""
    layer = ReWKV(6, 2).double()
    k, v = (x.view(2, *GRID, 6) for x in (tokens(0), tokens(1)))
    result = layer(k.flatten(1, 2), v.flatten(1, 2), GRID).view(2, *GRID, 6)
    swapped = ReWKV(6, 3).double()
    with torch.no_grad():  # a first turn that only hands on each token's own value, as its bonus is huge
        swapped.spatial_decay.copy_(torch.stack([torch.zeros(6), *layer.spatial_decay]))
        swapped.spatial_first.copy_(torch.stack([torch.full((6,), 1e4), *layer.spatial_first]))
    turned = swapped(k.transpose(1, 2).flatten(1, 2), v.transpose(1, 2).flatten(1, 2), GRID[::-1])
    torch.testing.assert_close(turned.view(2, *GRID[::-1], 6).transpose(1, 2), result)


def test_re_wkv_has_gradients() -> None:
    layer = ReWKV(2, 2).double()
    k, v = (tokens(seed, 2)[:1, :6].clone().requires_grad_() for seed in (0, 1))
    parameters = dict(layer.named_parameters())

    def run(k: Tensor, v: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (k, v, (2, 3)))

    assert torch.autograd.gradcheck(run, (k, v, *parameters.values()))


def test_re_wkv_message() -> None:
    with pytest.raises(ValueError, match="recurrence must be >= 1, got 0"):
        ReWKV(6, 0)


def test_omni_shift_is_the_sum_of_its_convolutions() -> None:
    layer = OmniShift(6).double()
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor([0.7, -1.3, 0.4, 2.1]))
    x = tokens(0).requires_grad_()
    maps = x.transpose(1, 2).unflatten(2, GRID)
    a, b, c, d = layer.alpha
    expected = a * maps + b * layer.conv1x1(maps) + c * layer.conv3x3(maps) + d * layer.conv5x5(maps)
    expected = expected.flatten(2).transpose(1, 2)
    result = layer(x, GRID)
    torch.testing.assert_close(result, expected)
    grad = tokens(1)
    inputs = (x, *layer.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(result, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_omni_shift_runs_one_convolution(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = OmniShift(6).train(training)
    calls = []
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda x, *args, **kwargs: calls.append(x.shape) or convolve(x, *args, **kwargs)
    )
    layer(tokens(0).float(), GRID)
    assert calls == [(2, 6, 3, 5)]
