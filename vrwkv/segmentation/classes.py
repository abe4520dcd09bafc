"""From logits at the stride of a head to the class of every pixel of a picture."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vrwkv.segmentation.resize import neighbours

PIXELS = 1 << 14  # of the picture that are looked at at a time

Size = tuple[int, int]


def fill_classes(mask: Tensor, logits: Tensor, corner: Size, grid: Size, align_corners: bool = False) -> None:
    """Write the classes of all pixels of a picture that lie between the given logits: the largest after resizing.

    Where the four logits around a pixel have one class in common, it is that of the pixel, as bilinear resizing only
    takes means; nothing is resized there.

    Args:
        mask: of the picture, uint8 on the CPU, ``(H, W)``; it is written to.
        logits: some of the grid's, ``(h, w, classes)``.
        corner: the row and the column of the first of them in the grid.
        grid: ``(h, w)`` of all logits of the picture, which is resized to the mask.
        align_corners: as interpolate has it.
    """
    rows, columns = (
        _Line(*args, align_corners, logits.device)
        for args in zip(grid, mask.shape, corner, logits.shape[:2], strict=True)
    )
    table = logits.flatten(0, 1).float().contiguous()
    best = table.max(1).indices.to(torch.uint8).view(logits.shape[:2])
    width = logits.shape[1]
    step = max(1, PIXELS // max(1, len(columns.before)))
    for start in range(0, len(rows.before), step):
        part = slice(start, start + step)
        above, below = rows.before[part], rows.after[part]
        upper, lower = best[above], best[below]
        labels = upper[:, columns.before]
        mixed = labels != upper[:, columns.after]
        mixed |= labels != lower[:, columns.before]
        mixed |= labels != lower[:, columns.after]
        y, x = mixed.nonzero(as_tuple=True)
        if len(y):
            left, right, weight_x = columns.before[x], columns.after[x], columns.weight[x]
            above, below, weight_y = above[y] * width, below[y] * width, rows.weight[part][y]
            places = torch.stack([above + left, above + right, below + left, below + right], dim=1)
            weight_x = torch.stack([1 - weight_x, weight_x], dim=1)
            weights = torch.cat([weight_x * (1 - weight_y)[:, None], weight_x * weight_y[:, None]], dim=1)
            means = F.embedding_bag(places, table, mode="sum", per_sample_weights=weights)
            labels[y, x] = means.max(1).indices.to(torch.uint8)
        first = rows.first + start
        mask[first : first + len(labels), columns.first : columns.first + labels.shape[1]] = labels


def fill_from_top(mask: Tensor, blocks: Iterator[Tensor], grid: Size, align_corners: bool = False) -> None:
    """The same for logits ``(h, w, classes)`` of whole rows that come one after another."""
    first = 0
    kept: Tensor | None = None
    for block in blocks:
        rows = block if kept is None else torch.cat([kept, block])
        fill_classes(mask, rows, (first, 0), grid, align_corners)
        kept = rows[-1:].clone()  # pixels may lie between two blocks
        first += len(rows) - 1


class _Line:
    """The pixels in one direction that lie between some of the logits, from `first` on, and between which they lie."""

    def __init__(
        self, given: int, wanted: int, start: int, count: int, align_corners: bool, device: torch.device
    ) -> None:
        before, after, weight = neighbours(given, wanted, align_corners)
        self.first = int((before < start).sum())
        inside = slice(self.first, int((after < start + count).sum()))
        self.before, self.after = (each[inside].to(device) - start for each in (before, after))
        self.weight = weight[inside].to(device)
