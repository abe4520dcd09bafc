"""Validation and prediction from a trained checkpoint, and the opening of all kinds of pictures."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.colours import CLASSES, picture

from vrwkv.classification import load_classifier
from vrwkv.runtime.images import open_image


def test_validate_gives_the_metrics_of_training(run, validate, capsys):
    assert validate(["--checkpoint", str(run / "best.pth"), "--workers", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    metrics = torch.load(run / "best.pth", weights_only=True)["metrics"]
    assert result["images"] == 15
    for key in ("loss", "top1", "top5"):
        assert result[key] == pytest.approx(metrics[key], rel=1e-5)


def test_predictions_agree_with_validation(run, data_root, validate, predict, capsys):
    """The same preprocessing: as many pictures are right one by one as in batches of the loader."""
    assert validate(["--checkpoint", str(run / "best.pth"), "--workers", "0", "--json"]) == 0
    top1 = json.loads(capsys.readouterr().out)["top1"]
    paths = sorted((data_root / "val").glob("*/*.png"))
    assert predict([*map(str, paths), "--checkpoint", str(run / "best.pth"), "--topk", "2", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["image"] for result in results] == [str(path) for path in paths]
    right = [path.parent.name == result["predictions"][0]["class"] for path, result in zip(paths, results, strict=True)]
    assert 100 * sum(right) / len(right) == pytest.approx(top1)
    for result in results:
        first, second = (each["probability"] for each in result["predictions"])
        assert 1 >= first >= second >= 0


def test_predict_prints_classes_and_probabilities(run, data_root, predict, capsys):
    path = next((data_root / "val" / "red").iterdir())
    assert predict([str(path), "--checkpoint", str(run / "best.pth")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(path)
    assert {line.split()[-1] for line in lines[1:]} == set(CLASSES)
    assert sum(float(line.split()[0]) for line in lines[1:]) == pytest.approx(100, abs=0.2)


def test_weights_without_metadata_need_the_model_name(tmp_path, predict, error, capsys):
    model = timm.create_model("test_vrwkv", num_classes=1000)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    picture((9, 9, 9), seed=0).save(tmp_path / "x.png")
    argv = [str(tmp_path / "x.png"), "--checkpoint", str(tmp_path / "bare.pth"), "--json"]
    assert "give --model" in error(predict, argv)
    assert predict([*argv, "--model", "test_vrwkv"]) == 0
    best = json.loads(capsys.readouterr().out)[0]["predictions"][0]
    assert best["class"].startswith("n0") or best["class"].startswith("n1")  # ImageNet's folder name
    assert not best["label"].startswith(best["class"])  # and its words


def test_validate_img_size(run, validate):
    assert validate(["--checkpoint", str(run / "best.pth"), "--workers", "0", "--img-size", "32"]) == 0
    classifier = load_classifier(run / "best.pth", img_size=32)
    assert classifier.data_config["input_size"] == (3, 32, 32)


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


def test_cmyk(run, predict, tmp_path):
    picture((10, 10, 10), seed=1).convert("CMYK").save(tmp_path / "x.jpg")
    assert predict([str(tmp_path / "x.jpg"), "--checkpoint", str(run / "best.pth")]) == 0
