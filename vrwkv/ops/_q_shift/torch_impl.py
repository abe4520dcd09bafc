"""Q-Shift from torch ops alone: for devices without a kernel, machines without a compiler, and ONNX."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vrwkv.ops._lerp import lerp


def q_shift(x: Tensor, height: int, width: int, shift_pixel: int, channel_gamma: float, heads: int) -> Tensor:
    """Shift the tokens ``x (B, H * W, C)`` by padding and cropping each group; returns the same shape."""
    batch, tokens, channels = x.shape
    size = channels // heads
    bounds = [int(size * channel_gamma * i) for i in range(5)]
    sizes = [end - begin for begin, end in pairwise(bounds)]
    grid = x.reshape(batch, height, width, heads, size)
    left, right, above, below, rest = grid.split([*sizes, size - bounds[4]], dim=-1)
    before, after = max(shift_pixel, 0), max(-shift_pixel, 0)  # the adjoint shifts by a negative number
    shifted = torch.cat(
        [
            F.pad(left, (0, 0, 0, 0, before, after))[:, :, after : after + width],
            F.pad(right, (0, 0, 0, 0, after, before))[:, :, before : before + width],
            F.pad(above, (0, 0, 0, 0, 0, 0, before, after))[:, after : after + height],
            F.pad(below, (0, 0, 0, 0, 0, 0, after, before))[:, before : before + height],
            rest,
        ],
        dim=-1,
    )
    return shifted.reshape(batch, tokens, channels)


def q_shift_mix(
    x: Tensor, mixes: Sequence[Tensor], height: int, width: int, shift_pixel: int, channel_gamma: float, heads: int
) -> list[Tensor]:
    """``x * m + shifted * (1 - m)`` for each ``m (C,)``, in ``m``'s dtype; returns ``x``'s shape and dtype."""
    return mix_shifted(x, q_shift(x, height, width, shift_pixel, channel_gamma, heads), mixes)


def mix_shifted(x: Tensor, shifted: Tensor, mixes: Sequence[Tensor]) -> list[Tensor]:
    """``x * m + shifted * (1 - m)`` for each ``m (C,)`` of ``x, shifted (B, T, C)``, in ``m``'s dtype and back."""
    dtype = x.dtype
    return [lerp(shifted.to(mix.dtype), x.to(mix.dtype), mix).to(dtype) for mix in mixes]
