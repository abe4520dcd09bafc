"""What the mixes of all families share: their place in the model, their Q-Shift, and what of them must not decay."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vrwkv.layers.grid import Grid, q_shift_mix_on

torch.fx.wrap("q_shift_mix_on")  # tracers look for functions to wrap beside `forward`, not beside what that calls


class Mix(nn.Module):
    """A spatial or channel mix.

    Parameters of its own are decays, bonuses, mixes, and low-rank matrices that add to them; other matrices and norms
    are modules.

    Args:
        layer_index: place of the block in the model, from 0; it sets the initial values.
        depth: number of blocks.
        shift_pixel: distance of the Q-Shift in patches.
        channel_gamma: share of the channels that Q-Shift moves in each direction.
        heads: equal parts of the channels, in each of which Q-Shift has groups of its own.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, layer_index: int, depth: int, shift_pixel: int = 1, channel_gamma: float = 1 / 4, heads: int = 1
    ) -> None:
        super().__init__()
        if shift_pixel < 0:
            raise ValueError(f"shift_pixel must be >= 0, got {shift_pixel}")
        if not 0 <= channel_gamma <= 0.25:
            raise ValueError(f"channel_gamma must lie in [0, 1/4], four groups share the channels, got {channel_gamma}")
        self.rising = layer_index / max(depth - 1, 1)  # 0 in the first layer, 1 in the last
        self.falling = 1 - layer_index / depth
        self.shift_pixel = shift_pixel
        self.channel_gamma = channel_gamma
        self.heads = heads

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should not decay."""
        return {name for name, _ in self.named_parameters(recurse=False)}

    def shift_on(self, patch_resolution: Grid) -> Callable[..., tuple[Tensor, ...]]:
        """Q-Shift on an ``(H, W)`` grid or a part of it, as a function from tokens ``(B, T, C)`` and mixes ``(C,)`` to
        mixed tokens."""

        def shift(x: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
            return q_shift_mix_on(patch_resolution, x, mixes, self.shift_pixel, self.channel_gamma, self.heads)

        return shift
