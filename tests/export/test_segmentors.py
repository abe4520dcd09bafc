"""Segmentors as ONNX: logits at the picture's size, and the masks that the checkpoint gives."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.scripts import REPOSITORY, load_tool
from support.stir import stir
from torch import nn

from vrwkv.export import to_onnx
from vrwkv.export.formats import OPSET
from vrwkv.export.program import trace
from vrwkv.runtime.errors import UserError
from vrwkv.runtime.onnx_model import OnnxModel

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mmseg") is None, reason="needs mmsegmentation")
CONFIG = REPOSITORY / "configs" / "segmentation" / "vrwkv_detail_nano_digit_scenes.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Weights that make a mask of many classes."""
    from mmseg.apis import init_model

    from vrwkv.segmentation.config import load_config

    torch.manual_seed(1)
    model = init_model(load_config(CONFIG), device="cpu")
    stir(model)
    path = tmp_path_factory.mktemp("checkpoint") / "segmentor.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def segmentor(checkpoint):
    from vrwkv.segmentation import load_segmentor

    return load_segmentor(CONFIG, checkpoint, "cpu")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory, segmentor) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "segmentor.onnx"
    to_onnx(segmentor, path)
    return path


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((119, 90), Image.Resampling.BICUBIC).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@torch.no_grad()
def test_logits_at_the_size_of_the_picture(segmentor, onnx_file):
    exported = OnnxModel(onnx_file, "segmentation")
    for batch, height, width in ((1, 1, 1), (2, 33, 70), (1, 100, 64)):
        images = torch.randn(batch, 3, height, width)
        expected = segmentor.encode_decode(images, [{"img_shape": (height, width)}])
        torch.testing.assert_close(exported(images), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@torch.no_grad()
def test_pooling_of_upernet_serves_every_size(tmp_path):
    """Maps smaller than the bins, and such that the bins part evenly and unevenly."""
    import onnxruntime

    from vrwkv.segmentation.uper_head import BinMeans

    pool = nn.Sequential(nn.Conv2d(3, 2, 1), BinMeans(6))
    torch.onnx.export(trace(pool, 3), f=tmp_path / "pool.onnx", opset_version=OPSET, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "pool.onnx"))
    for height, width in ((1, 4), (12, 7), (13, 36)):
        images = torch.randn(2, 3, height, width)
        (means,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(means), pool(images))


def test_tool_takes_it_without_a_config(checkpoint, onnx_file, picture, tmp_path, capsys):
    segment, masks = load_tool("segment"), []
    for number, options in enumerate((["--config", str(CONFIG), "--checkpoint", str(checkpoint)],
                                      ["--checkpoint", str(onnx_file)])):  # fmt: skip
        assert segment([str(picture), *options, "--out", str(tmp_path / str(number)), "--json"]) == 0
        (result,) = json.loads(capsys.readouterr().out)
        masks.append(np.asarray(Image.open(result["mask"])))
    assert len(np.unique(masks[0])) > 3
    assert (masks[0] == masks[1]).mean() > 0.999
    assert result["shares"].keys() <= {"photograph", *map(str, range(10))}


def test_tiles_agree_with_the_whole(onnx_file, tmp_path):
    from vrwkv.segmentation import load_segmentor, segment

    model = load_segmentor(None, onnx_file)
    picture = Image.new("RGB", (400, 300), (90, 120, 30))
    masks = [segment(model, picture, tile=tile).mask for tile in (None, 256)]
    assert (masks[0] == masks[1]).mean() > 0.99


def test_bad_input(checkpoint, onnx_file, picture, tmp_path, error):
    from vrwkv.segmentation import load_segmentor, segment

    tool, out = load_tool("segment"), ["--out", tmp_path / "out"]
    assert "needs a config: give --config" in error(tool, [picture, "--checkpoint", checkpoint, *out])
    assert "required is no config" in error(tool, [picture, "--config", CONFIG, "--checkpoint", onnx_file, *out])
    with pytest.raises(UserError, match="computes in its own number format, not in bfloat16"):
        segment(load_segmentor(None, onnx_file), picture, amp="bfloat16")
    safetensors = ["--format", "safetensors", "--output", tmp_path / "model.safetensors"]
    assert "written of classifiers" in error(load_tool("export"), [checkpoint, "--config", CONFIG, *safetensors])
