"""Classes of pixels and tiles: the same as resizing all logits, and the same as looking at the whole picture."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from vrwkv.segmentation.classes import fill_classes, fill_from_top
from vrwkv.segmentation.resize import resize_rows
from vrwkv.segmentation.tiles import fill_by_tiles, tile_bounds

CASES = [
    ((5, 7), (20, 28)),
    ((9, 6), (33, 23)),
    ((1, 3), (4, 9)),
    ((8, 8), (8, 8)),
    ((30, 20), (11, 17)),
    ((1, 1), (1, 1)),
]


def expected(logits, size, align_corners=False):
    resized = F.interpolate(logits.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=align_corners)
    return resized[0].argmax(0).to(torch.uint8)


@pytest.mark.parametrize(("grid", "size"), CASES)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
def test_classes_are_those_of_resized_logits(grid, size, smooth, align_corners):
    torch.manual_seed(0)
    logits = torch.randn(*grid, 5, dtype=torch.float64).float()
    if smooth:  # most pixels lie between four logits of one class
        logits = logits[:2, :2].repeat_interleave(15, 0).repeat_interleave(15, 1)[: grid[0], : grid[1]]
    mask = torch.full(size, 255, dtype=torch.uint8)
    fill_classes(mask, logits, (0, 0), grid, align_corners)
    torch.testing.assert_close(mask, expected(logits, size, align_corners), rtol=0, atol=0)


@pytest.mark.parametrize(("grid", "size"), CASES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_blocks_of_rows(grid, size, align_corners):
    torch.manual_seed(0)
    logits = torch.randn(*grid, 5)
    mask = torch.full(size, 255, dtype=torch.uint8)
    fill_from_top(mask, iter(logits.split(2)), grid, align_corners)
    torch.testing.assert_close(mask, expected(logits, size, align_corners), rtol=0, atol=0)


@pytest.mark.parametrize("align_corners", [False, True])
def test_resized_rows(align_corners):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 6)
    whole = F.interpolate(x, (33, 23), mode="bilinear", align_corners=align_corners)
    parts = [resize_rows(x, slice(first, first + 5), (33, 23), align_corners) for first in range(0, 33, 5)]
    rows = torch.cat(parts, dim=2)
    torch.testing.assert_close(rows, whole)


@pytest.mark.parametrize("tile", [256, 320, 1024])
def test_bounds_of_tiles(tile):
    overlap = tile // 8 // 32 * 32
    for size in (1, tile, tile + 1, 2 * tile - overlap, 2 * tile, 3 * tile + 7, 16384):
        bounds = tile_bounds(size, tile, overlap)
        assert bounds[0][0] == 0 and bounds[-1][1] == size
        assert all(first % 32 == 0 and 0 < last - first <= tile for first, last in bounds)
        assert all(end - begin == overlap for (_, end), (begin, _) in pairwise(bounds))


@pytest.mark.parametrize("size", [(600, 700), (257, 1000), (900, 40), (513, 259), (257, 257)])
@pytest.mark.parametrize("stride", [1, 4, 8, 16, 32])
def test_tiles_of_one_field_of_logits(size, stride):
    """Logits that do not depend on the tile: blending leaves them as they are, and no pixel is missed."""
    torch.manual_seed(0)
    logits = torch.randn(-(-size[0] // stride), -(-size[1] // stride), 5)
    mask = torch.full(size, 255, dtype=torch.uint8)
    boxes = []

    def logits_of(box):
        boxes.append(box)
        left, top, right, bottom = box
        return logits[top // stride : -(-bottom // stride), left // stride : -(-right // stride)]

    fill_by_tiles(mask, logits_of, 256)
    assert len(boxes) > 1
    assert (mask != expected(logits, size)).float().mean() < 1e-4  # where two classes are equal but for rounding


def test_tiles_fade_into_each_other():
    """Two tiles that say different things: the border is where they weigh the same, half an overlap from their ends."""
    values = iter((0.0, 1.0))
    mask = torch.zeros(64, 480, dtype=torch.uint8)

    def logits_of(box):
        share = next(values)
        shape = ((box[3] - box[1]) // 4, (box[2] - box[0]) // 4)
        return torch.tensor([1 - share, share]).expand(*shape, 2)

    fill_by_tiles(mask, logits_of, 256)
    ((begin, _),) = tile_bounds(480, 256, 32)[1:]
    assert mask[:, : begin + 16].sum() == 0
    assert mask[:, begin + 16 :].all()
