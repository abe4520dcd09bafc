"""Bilinear resizing in parts, so that what is resized need never be held as a whole."""

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbours(given: int, wanted: int, align_corners: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Between which of `given` pixels in a line each of `wanted` pixels lies, as interpolate has it.

    Returns:
        The one before and the one after, int64, the same one where it lies on one, and the weight of the latter, fp32;
        each ``(wanted,)``.
    """
    order = torch.arange(wanted, dtype=torch.float32)
    places = order * ((given - 1) / max(wanted - 1, 1)) if align_corners else (order + 0.5) * (given / wanted) - 0.5
    places = places.clamp(0, given - 1)
    before = places.long()
    return before, places.ceil().long(), places - before


def resize_rows(x: Tensor, rows: slice, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Some rows of what interpolate makes of a map.

    Args:
        x: ``(B, C, h, w)``.
        rows: which of the H rows that are wanted.
        size: ``(H, W)`` of the whole result.
        align_corners: as interpolate has it.

    Returns:
        ``(B, C, rows, W)``.
    """
    above, below, weight = (each[rows].to(x.device) for each in neighbours(x.shape[2], size[0], align_corners))
    mixed = torch.lerp(x[:, :, above], x[:, :, below], weight.to(x.dtype).unsqueeze(-1))
    return F.interpolate(mixed, (len(above), size[1]), mode="bilinear", align_corners=align_corners)
