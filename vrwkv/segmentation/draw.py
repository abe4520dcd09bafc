"""Pictures of a segmentation: the overlay with its legend, and the mask with its palette."""

from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vrwkv.runtime.errors import UserError, nearest
from vrwkv.segmentation.segment import Segmentation

ROWS = 256  # of the picture that are tinted at a time


def draw_mask(result: Segmentation) -> Image.Image:
    """The class indices as a palette picture: a viewer shows colours, a program reads the indices."""
    return _colour(result.mask, result.palette)


def draw_overlay(result: Segmentation, opacity: float = 0.5, classes: Collection[str] | None = None) -> Image.Image:
    """The picture, tinted by class, with a legend of the classes present and their shares at its right.

    Args:
        result: What is drawn.
        opacity: Of the colours, 0 to 1.
        classes: Draw these alone; the rest of the picture stays as it is.

    Raises:
        UserError: the result has no such class.
    """
    drawn = drawn_classes(result.classes, classes)
    width, height = result.picture.size
    legend = _draw_legend(result, drawn)
    sheet = Image.new("RGB", (width + legend.width, max(height, legend.height)), "white")
    sheet.paste(legend, (width, 0))
    shown = np.array([255 * (name in drawn) for name in result.classes], np.uint8)
    for top in range(0, height, ROWS):  # a large picture need not be there several times
        rows = result.mask[top : top + ROWS]
        strip = result.picture.crop((0, top, width, top + len(rows)))
        tinted = Image.blend(strip, _colour(rows, result.palette).convert("RGB"), opacity)
        sheet.paste(strip, (0, top))
        sheet.paste(tinted, (0, top), Image.fromarray(shown[rows]))
    return sheet


def drawn_classes(known: Sequence[str], wanted: Collection[str] | None) -> set[str]:
    """The classes to draw: those that are wanted, or all.

    Raises:
        UserError: one is not known.
    """
    for name in wanted or ():
        if name not in known:
            raise UserError(f"the model knows no class {name!r}{nearest(name, known)}")
    return set(known if wanted is None else wanted)


def _colour(mask: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Image.Image:
    picture = Image.fromarray(mask).convert("P")
    picture.putpalette([value for colour in palette for value in colour])
    return picture


def _draw_legend(result: Segmentation, drawn: Collection[str]) -> Image.Image:
    """One row for each class that is drawn and present: a patch of its colour, its name and its share."""
    size = max(12, result.picture.height // 40)  # of the letters, in pixels
    font = ImageFont.load_default(size)
    colours = dict(zip(result.classes, result.palette, strict=True))
    rows = [(colours[name], f"{name}  {100 * share:.1f} %") for name, share in result.shares().items() if name in drawn]
    width = int(max((font.getlength(text) for _, text in rows), default=0))
    row = round(1.5 * size)
    legend = Image.new("RGB", (width + 3 * size, row * len(rows) + size), "white")
    draw = ImageDraw.Draw(legend)
    for place, (colour, text) in enumerate(rows):
        y = size // 2 + place * row
        draw.rectangle((size // 2, y, size // 2 + size, y + size), fill=colour, outline="grey")
        draw.text((2 * size, y + size / 2), text, fill="black", font=font, anchor="lm")
    return legend
