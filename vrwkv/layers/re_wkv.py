"""Recurrent WKV: Bi-WKV along rows and along columns in turn (Restore-RWKV, arXiv 2407.11087, section 3.3)."""

import torch
from torch import Tensor, nn

from vrwkv.ops import bi_wkv


class ReWKV(nn.Module):
    """Bi-WKV with the same keys several times over, each time on what it made of the values the time before.

    The first time tokens are numbered row by row, the second time column by column, and so on, so that neighbours in
    either direction are near each other. As in :class:`vrwkv.layers.SpatialMix` decays and bonuses are divided by the
    number of tokens.

    Args:
        dim: channels C.
        recurrence: number of times.

    Raises:
        ValueError: ``recurrence`` is below 1.
    """

    def __init__(self, dim: int, recurrence: int = 2) -> None:
        super().__init__()
        if recurrence < 1:
            raise ValueError(f"recurrence must be >= 1, got {recurrence}")
        self.spatial_decay = nn.Parameter(torch.empty(recurrence, dim))
        self.spatial_first = nn.Parameter(torch.empty(recurrence, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set normally distributed decays and bonuses, as Restore-RWKV has them."""
        nn.init.normal_(self.spatial_decay)
        nn.init.normal_(self.spatial_first)

    def forward(self, k: Tensor, v: Tensor, patch_resolution: tuple[int, int]) -> Tensor:
        """Mix the values ``v (B, T, C)`` on an ``(H, W)`` grid by the keys ``k (B, T, C)``; returns ``(B, T, C)``."""
        grid, tokens = patch_resolution, v.shape[1]
        for turn, (w, u) in enumerate(zip(self.spatial_decay / tokens, self.spatial_first / tokens, strict=True)):
            if turn:  # from rows to columns or back
                k, v, grid = _transpose(k, grid), _transpose(v, grid), (grid[1], grid[0])
            v = bi_wkv(w, u, k, v)
        return v if len(self.spatial_decay) % 2 else _transpose(v, grid)


def _transpose(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Number the tokens ``x (B, H * W, C)`` of an ``(H, W)`` grid along the other direction."""
    return x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
