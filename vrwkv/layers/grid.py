"""Where the tokens of a model stand: on a whole grid of patches, or on chosen places of it."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vrwkv.ops import q_shift, q_shift_mix
from vrwkv.ops._q_shift.torch_impl import mix_shifted


class VisiblePatches(NamedTuple):
    """Places on an ``(height, width)`` grid that hold a token; the others are masked."""

    height: int
    width: int
    places: Tensor  # (B, T'), h * width + w, each once for an image

    def select(self, x: Tensor) -> Tensor:
        """The tokens ``(B, T', C)`` of these places, of all tokens ``x (B, height * width, C)``."""
        return x.gather(1, self._expanded(x))

    def spread(self, x: Tensor, rest: Tensor) -> Tensor:
        """All tokens ``(B, height * width, C)``: ``x (B, T', C)`` at these places, ``rest (C,)`` at the others."""
        whole = rest.expand(x.shape[0], self.height * self.width, -1)
        return whole.scatter(1, self._expanded(x), x)

    def _expanded(self, x: Tensor) -> Tensor:
        return self.places[..., None].expand(-1, -1, x.shape[2])


Grid = tuple[int, int] | VisiblePatches
"""The patch resolution ``(H, W)`` where no patch is masked."""


def q_shift_mix_on(
    grid: Grid, x: Tensor, mixes: Sequence[Tensor], shift_pixel: int, channel_gamma: float, heads: int
) -> tuple[Tensor, ...]:
    """:func:`vrwkv.ops.q_shift_mix` of the tokens ``x (B, T, C)`` on a grid, where masked neighbours count as zero."""
    if not isinstance(grid, VisiblePatches):
        return q_shift_mix(x, mixes, grid, shift_pixel, channel_gamma, heads)
    whole = grid.spread(x, x.new_zeros(x.shape[2]))
    shifted = grid.select(q_shift(whole, (grid.height, grid.width), shift_pixel, channel_gamma, heads))
    return tuple(mix_shifted(x, shifted, mixes))
