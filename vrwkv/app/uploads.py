"""Pictures that a browser sends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.images import open_image


def open_upload(upload: Mapping[str, Any], max_pixels: int) -> Image.Image:
    """The picture in a file that was uploaded, upright and in RGB; its size is looked at before it is decoded.

    Args:
        upload: What gradio says of the file: its `path` here, which it has checked, and `orig_name` at home.
        max_pixels: Largest height times width.

    Raises:
        UserError: it is no picture, or too large; the message has the name that the user knows.
    """
    path = upload.get("path") or ""
    name = Path(upload.get("orig_name") or path).name
    try:
        _check_size(path, max_pixels)
        return open_image(path)
    except UserError as error:
        raise UserError(str(error).replace(path, name)) from error


def _check_size(path: str, max_pixels: int) -> None:
    try:
        with Image.open(path) as header:
            width, height = header.size
    except Exception:
        return  # open_image says what is wrong
    if width * height > max_pixels:
        raise UserError(
            f"image {path} has {width} x {height} pixels, {width * height / 1e6:.4g} million: at most "
            f"{max_pixels / 1e6:g} million are taken here"
        )
