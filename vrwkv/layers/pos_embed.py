"""Position embedding on a grid of patches, resized to follow the image."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def resize_pos_embed(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize a position embedding as the authors do: bicubic, ``align_corners=False``, no antialias.

    Args:
        pos_embed: ``(1, H * W, C)`` for ``old_grid``.
        old_grid: ``(H, W)`` that ``pos_embed`` was made for.
        new_grid: ``(H', W')`` that is wanted.

    Returns:
        ``(1, H' * W', C)`` in the same dtype, computed in fp32 or better; ``pos_embed`` itself for an equal grid.
    """
    # A compiler resizes to a grid that it does not know, and once more to an equal one, which changes nothing.
    if _known_equal(old_grid[0], new_grid[0]) and _known_equal(old_grid[1], new_grid[1]):
        return pos_embed
    grid = pos_embed.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, C, H, W)
    grid = grid.to(torch.promote_types(pos_embed.dtype, torch.float32))
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # (1, H' * W', C)


def _known_equal(old: int, new: int) -> bool:
    equal: Any = old == new
    # Sizes are tensors while torch.jit.trace runs.
    return statically_known_true(bool(equal) if isinstance(equal, Tensor) else equal)
