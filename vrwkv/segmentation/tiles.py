"""Pictures beyond memory: logits of tiles that overlap, blended, and turned into classes tile by tile."""

from collections.abc import Callable

import torch
from torch import Tensor

from vrwkv.segmentation.classes import fill_classes

STEP = 32  # tiles begin at multiples of it, so that the logits of all of them lie on one grid
Box = tuple[int, int, int, int]  # left, top, right, bottom, as Pillow has it


def tile_bounds(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """First and last pixels (exclusive) of tiles of about one size that cover `size` pixels, neighbours overlapping."""
    if size <= tile:
        return [(0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    equal = -(-(size + (count - 1) * overlap) // count)  # the size at which so many tiles just cover all
    step = min(tile, -(-equal // STEP) * STEP) - overlap
    count = -(-(size - overlap) // step)
    return [(i * step, min(i * step + step + overlap, size)) for i in range(count)]


def fill_by_tiles(mask: Tensor, logits_of: Callable[[Box], Tensor], tile: int) -> None:
    """Write the classes of all pixels of a picture, looking at one tile of it at a time.

    Where tiles overlap, by an eighth of their size, one fades into the other. Beside one tile, the logits of the
    overlap with the next row of tiles are held.

    Args:
        mask: of the picture, uint8 on the CPU, ``(H, W)``; it is written to.
        logits_of: gives the logits ``(h, w, classes)`` of a box of the picture, all at one stride.
        tile: largest height and width of a tile, a multiple of 32 and at least 256; the mask is larger.
    """
    height, width = mask.shape
    overlap = tile // 8 // STEP * STEP
    tops, lefts = (tile_bounds(size, tile, overlap) for size in (height, width))
    side = int(height <= tile)  # one that is cut: there, all tiles but the last have a multiple of every stride
    stride = 0
    below: Tensor | None = None  # of the overlap with the next row of tiles, and of one row that is done
    for top, bottom in tops:
        beside: Tensor | None = None  # of the overlap with the next tile, and of one column that is done
        for left, right in lefts:
            logits = logits_of((left, top, right, bottom)).float()
            stride = stride or (bottom - top, right - left)[side] // logits.shape[side]
            grid = (-(-height // stride), -(-width // stride))
            y, x, faded = top // stride, left // stride, overlap // stride
            logits = logits * _fade(logits.shape[0], faded, top > 0, bottom < height, logits)[:, None, None]
            logits *= _fade(logits.shape[1], faded, left > 0, right < width, logits)[:, None]
            if below is None:
                below = logits.new_zeros(faded + 1, grid[1], logits.shape[2])
            # One row and one column of what is done, for the pixels that lie between two tiles.
            halo_y, halo_x = int(top > 0), int(left > 0)
            total = logits.new_zeros(logits.shape[0] + halo_y, logits.shape[1] + halo_x, logits.shape[2])
            total[halo_y:, halo_x:] = logits
            known = 0
            if beside is not None:
                known = beside.shape[1]
                total[:, :known] += beside
            if top > 0:
                total[: faded + 1, known:] += below[:, x - halo_x + known : x + logits.shape[1]]
            rows = len(total) - (faded if bottom < height else 0)
            columns = total.shape[1] - (faded if right < width else 0)
            fill_classes(mask, total[:rows, :columns], (y - halo_y, x - halo_x), grid)
            if bottom < height:
                below[:, x : x - halo_x + columns] = total[rows - 1 :, halo_x:columns]
            beside = total[:, columns - 1 :].clone()


def _fade(size: int, faded: int, begins: bool, ends: bool, like: Tensor) -> Tensor:
    """Weights ``(size,)`` that rise from 0 at the beginning and fall to 0 at the end, where there is a neighbour."""
    weights = like.new_ones(size)
    rising = (torch.arange(faded, device=like.device, dtype=like.dtype) + 0.5) / max(faded, 1)
    if begins:
        weights[:faded] *= rising
    if ends:
        weights[size - faded :] *= rising.flip(0)
    return weights
