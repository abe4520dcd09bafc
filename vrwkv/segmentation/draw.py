"""Pictures of a segmentation: the overlay with its legend, and the mask with its palette."""

from PIL import Image, ImageDraw, ImageFont

from vrwkv.segmentation.segment import Segmentation


def draw_mask(result: Segmentation) -> Image.Image:
    """The class indices as a palette picture: a viewer shows colours, a program reads the indices."""
    mask = Image.fromarray(result.mask).convert("P")
    mask.putpalette([value for colour in result.palette for value in colour])
    return mask


def draw_overlay(result: Segmentation, opacity: float = 0.5) -> Image.Image:
    """The picture, tinted by class, with a legend of the classes present and their shares at its right."""
    colours = draw_mask(result).convert("RGB")
    blended = Image.blend(result.picture, colours, opacity)
    legend = _draw_legend(result)
    sheet = Image.new("RGB", (blended.width + legend.width, max(blended.height, legend.height)), "white")
    sheet.paste(blended, (0, 0))
    sheet.paste(legend, (blended.width, 0))
    return sheet


def _draw_legend(result: Segmentation) -> Image.Image:
    """One row for each class: a patch of its colour, its name and its share."""
    size = max(12, result.picture.height // 40)  # of the letters, in pixels
    font = ImageFont.load_default(size)
    colours = dict(zip(result.classes, result.palette, strict=True))
    rows = [(colours[name], f"{name}  {100 * share:.1f} %") for name, share in result.shares().items()]
    width = int(max(font.getlength(text) for _, text in rows))
    row = round(1.5 * size)
    legend = Image.new("RGB", (width + 3 * size, row * len(rows) + size), "white")
    draw = ImageDraw.Draw(legend)
    for place, (colour, text) in enumerate(rows):
        y = size // 2 + place * row
        draw.rectangle((size // 2, y, size // 2 + size, y + size), fill=colour, outline="grey")
        draw.text((2 * size, y + size / 2), text, fill="black", font=font, anchor="lm")
    return legend
