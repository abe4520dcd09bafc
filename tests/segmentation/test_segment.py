"""Segmenting pictures: the same classes as mmseg's own inference, odd pictures, and what is written."""

import json

import numpy as np
import pytest
import torch
from mmseg.apis import inference_model
from PIL import Image

from vrwkv.segmentation import draw_mask, draw_overlay, load_segmentor, segment


@pytest.fixture(scope="module")
def model(config_path, checkpoint):
    model = load_segmentor(config_path, checkpoint)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)  # many classes, where a short training finds one
    return model


def noise(height, width, channels=3):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


@pytest.mark.parametrize("mode", ["slide", "whole"])
@pytest.mark.parametrize("resized", [False, True])
def test_same_as_mmseg(model, mode, resized, monkeypatch):
    resize = [dict(type="Resize", scale=(100, 70), keep_ratio=True)] if resized else []
    monkeypatch.setitem(model.test_cfg, "mode", mode)
    pipeline = [dict(type="LoadImageFromFile"), *resize, dict(type="PackSegInputs")]
    monkeypatch.setitem(model.cfg, "test_pipeline", pipeline)
    picture = noise(75, 121)
    mask = segment(model, picture).mask
    expected = inference_model(model, np.asarray(picture)[..., ::-1].copy()).pred_sem_seg.data[0].numpy()
    assert len(np.unique(mask)) > 3
    assert (mask != expected).mean() < 1e-3  # where two classes are equal but for rounding


@pytest.mark.parametrize("size", [(1, 1), (200, 1), (3, 300), (31, 33), (64, 600)])
def test_any_size(model, size):
    result = segment(model, noise(*size))
    assert result.mask.shape == size
    assert result.mask.dtype == np.uint8
    assert sum(result.shares().values()) == pytest.approx(1)


def test_pictures_of_a_result(model):
    result = segment(model, noise(40, 50))
    mask = draw_mask(result)
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.asarray(mask), result.mask)
    colours = np.asarray(mask.convert("RGB"))
    np.testing.assert_array_equal(colours, np.array(result.palette, np.uint8)[result.mask])
    overlay = np.asarray(draw_overlay(result, opacity=1.0))
    np.testing.assert_array_equal(overlay[:40, :50], colours)
    assert overlay.shape[1] > 50
    plain = np.asarray(draw_overlay(result, opacity=0.0))
    np.testing.assert_array_equal(plain[:40, :50], np.asarray(result.picture))


def test_odd_files(segment_main, config_path, checkpoint, tmp_path, capsys):
    """One folder of odd pictures, two of one name, and a broken one: it is named at the end, the others are done."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    upright = noise(30, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright.save(folder / "turned.jpg", exif=exif)
    upright.save(folder / "same.jpg")
    upright.save(folder / "same.png")
    noise(30, 40, 1).save(folder / "grey.png")
    noise(30, 40, 4).save(folder / "transparent.png")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(folder / "deep.png")
    noise(1, 1).save(folder / "dot.png")
    (folder / "broken.png").write_bytes((folder / "grey.png").read_bytes()[:100])
    argv = [str(folder), "--config", str(config_path), "--checkpoint", str(checkpoint), "--out", str(out), "--json"]
    assert segment_main(argv) == 1
    captured = capsys.readouterr()
    results = {result["image"].rpartition("/")[2]: result for result in json.loads(captured.out)}
    assert len(results) == 8
    assert "error" in results.pop("broken.png")
    assert f"error: cannot read image {folder / 'broken.png'}: " in captured.err.splitlines()[-1]
    assert len(list(out.iterdir())) == 14
    for result in results.values():
        assert sum(result["shares"].values()) == pytest.approx(1, abs=1e-5)
        assert Image.open(result["mask"]).mode == "P"
    assert Image.open(results["turned.jpg"]["mask"]).size == (30, 40)
    assert Image.open(results["dot.png"]["mask"]).size == (1, 1)
