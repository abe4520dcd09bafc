"""Opening a picture, the same way for training, validation and prediction."""

import os

import numpy as np
from PIL import Image, ImageOps

from vrwkv.runtime.errors import UserError, first_line


def open_image(path: str | os.PathLike[str], mode: str = "RGB") -> Image.Image:
    """Reads a picture upright and with 8 bits per channel.

    The EXIF orientation is applied, 16-bit grey is scaled to 8 bits, and transparent parts become white.

    Args:
        path: File of any format that Pillow reads.
        mode: Pillow's name of the result's mode, "RGB" or "L".

    Raises:
        UserError: the file is missing or no picture, or its data are broken.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # Pillow would clip the values at 255
                grey = np.clip(np.asarray(image, dtype=np.float32) / 257, 0, 255)
                image = Image.fromarray(grey.round().astype(np.uint8))
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert(mode)
    except FileNotFoundError as error:
        raise UserError(f"image {path} does not exist") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image {path}: {first_line(error)}") from error
