"""Q-Shift written as its definition, one group of channels after the other: what the tests trust."""

from collections.abc import Sequence

import torch
from torch import Tensor


def q_shift(x: Tensor, height: int, width: int, shift_pixel: int, channel_gamma: float, heads: int = 1) -> Tensor:
    """Shift the tokens ``x (B, H * W, C)``, head by head; returns the same shape."""
    if heads > 1:
        parts = x.chunk(heads, dim=2) if x.numel() else [x]
        return torch.cat([q_shift(part, height, width, shift_pixel, channel_gamma) for part in parts], dim=2)
    channels = x.shape[2]
    bounds = [int(channels * channel_gamma * i) for i in range(5)]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    shifted = x.clone()
    offsets = ((0, -shift_pixel), (0, shift_pixel), (-shift_pixel, 0), (shift_pixel, 0))
    for group, (down, right) in enumerate(offsets):
        row, column = (rows + down).flatten(), (columns + right).flatten()
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        source = (row * width + column).clamp(0, max(height * width - 1, 0)).to(x.device)
        channel = slice(bounds[group], bounds[group + 1])
        shifted[:, :, channel] = x[:, source, channel] * inside[:, None].to(x)
    return shifted


def q_shift_mix(
    x: Tensor, mixes: Sequence[Tensor], height: int, width: int, shift_pixel: int, channel_gamma: float, heads: int = 1
) -> list[Tensor]:
    """``x * m + shifted * (1 - m)`` for each ``m (C,)``; returns tensors of ``x``'s shape ``(B, H * W, C)``."""
    shifted = q_shift(x, height, width, shift_pixel, channel_gamma, heads)
    return [x * mix + shifted * (1 - mix) for mix in mixes]
