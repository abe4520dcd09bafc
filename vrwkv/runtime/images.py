"""Opening a picture, the same way for training, validation and prediction."""

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from vrwkv.runtime.errors import UserError, first_line


class Packed(ABC):
    """A picture that is part of a larger file; as a string the name to call it by."""

    @abstractmethod
    def open(self) -> BinaryIO:
        """The picture as if it were a file of its own, of any format that Pillow reads."""


Picture = str | os.PathLike[str] | Image.Image | Packed
"""A file of any format that Pillow reads, part of one, or what Pillow has opened."""


@functools.cache
def picture_endings() -> frozenset[str]:
    """The endings of the files that Pillow reads, such as ".png"; of some more formats it only knows what they are."""
    Image.init()
    stubs = {"MPEG", *(kind for kind, (opener, _) in Image.OPEN.items() if _is_stub(opener))}
    return frozenset(
        ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in stubs
    )


def _is_stub(opener: object) -> bool:
    return isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)


def mode_of(channels: int) -> str:
    """Pillow's name for pictures of so many channels, 1 or 3."""
    return "L" if channels == 1 else "RGB"


def open_image(image: Picture, mode: str = "RGB", limit: bool = True) -> Image.Image:
    """A picture upright and with 8 bits per channel.

    The EXIF orientation is applied, 16-bit grey is scaled to 8 bits, and transparent parts become white.

    Args:
        image: The picture.
        mode: Pillow's name of the result's mode, "RGB" or "L".
        limit: Refuse pictures that are so large that Pillow takes them for an attack.

    Raises:
        UserError: the file is missing or no picture, or its data are broken.
    """
    if isinstance(image, Image.Image):
        return _to_8_bits(image, mode)
    try:
        if not isinstance(image, Packed) and not Path(image).is_file() and Path(image).exists():
            raise UserError(f"cannot read image {image}: not a file")  # a pipe would keep us waiting
        with _limited(limit), Image.open(image.open() if isinstance(image, Packed) else image) as opened:
            return _to_8_bits(opened, mode)
    except FileNotFoundError as error:
        raise UserError(f"image {image} does not exist") from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow raises whatever damaged data lead to, such as struct.error
        raise UserError(f"cannot read image {image}: {first_line(error)}") from error


@contextmanager
def _limited(limit: bool) -> Iterator[None]:
    pixels = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels if limit else None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = pixels


def _to_8_bits(image: Image.Image, mode: str) -> Image.Image:
    # Pillow copies where there is nothing to do: gigabytes of a large picture.
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow would clip the values at 255
        grey = np.clip(np.asarray(image, dtype=np.float32) / 257, 0, 255)
        image = Image.fromarray(grey.round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == mode else image.convert(mode)
