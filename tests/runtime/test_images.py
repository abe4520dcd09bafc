"""Pictures of all kinds are opened upright, with 8 bits a channel."""

import os
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile
from support.colours import picture

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.images import open_image


def test_exif_orientation_is_applied(tmp_path):
    upright = picture((200, 40, 30), seed=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "turned.png"), upright)


def test_grey_and_16_bit_grey_look_alike(tmp_path):
    grey = np.asarray(picture((200, 40, 30), seed=1).convert("L"))
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    for name in ("8.png", "16.png"):
        opened = open_image(tmp_path / name)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_parts_become_white(mode, tmp_path):
    image = picture((10, 10, 10), seed=1).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat([[0] * 10 + [255] * 10], 24, axis=0).astype(np.uint8)))
    if mode == "PA":
        image.quantize().save(tmp_path / "x.png")  # a palette with transparency
    else:
        image.convert(mode).save(tmp_path / "x.png")
    pixels = np.asarray(open_image(tmp_path / "x.png"))
    assert (pixels[:, :10] == 255).all()
    assert (pixels[:, 10:] < 150).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_opened_pictures_are_treated_as_files(mode, tmp_path):
    image = picture((10, 200, 10), seed=1).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat([[0] * 10 + [255] * 10], 24, axis=0).astype(np.uint8)))
    image.save(tmp_path / "x.png")
    assert open_image(image, mode).mode == mode
    assert np.array_equal(open_image(image, mode), open_image(tmp_path / "x.png", mode))


def test_bad_files(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, expected in (
        ("absent.png", "does not exist"),
        ("text.png", "cannot read image .*text.png: cannot identify image file"),
        ("pipe.png", "cannot read image .*pipe.png: not a file"),
        ("folder.png", "cannot read image .*folder.png: not a file"),
    ):
        with pytest.raises(UserError, match=expected):
            open_image(tmp_path / name)


def test_damaged_exif_data(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.XResolution] = 6, 72.0
    fraction, raw = struct.pack(">HH", ExifTags.Base.XResolution, 5), struct.pack(">HH", ExifTags.Base.XResolution, 7)
    assert fraction in exif.tobytes()
    picture((1, 2, 3), seed=0).save(tmp_path / "x.jpg", exif=exif.tobytes().replace(fraction, raw))
    with pytest.raises(UserError, match=r"cannot read image .*x\.jpg: "):
        open_image(tmp_path / "x.jpg")


def test_memory_that_is_full_is_no_fault_of_the_picture(tmp_path, monkeypatch):
    def load(image):
        raise MemoryError

    picture((1, 2, 3), seed=0).save(tmp_path / "x.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        open_image(tmp_path / "x.png")


def test_picture_that_would_fill_the_memory(tmp_path, monkeypatch):
    picture((1, 2, 3), seed=0).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"cannot read image .*x.png: Image size \(480 pixels\) exceeds limit"):
        open_image(tmp_path / "x.png")
