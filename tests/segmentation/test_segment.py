"""Segmenting pictures: the same classes as mmseg's own inference, odd pictures, and what is written."""

import json

import numpy as np
import pytest
import torch
from mmseg.apis import MMSegInferencer, inference_model, init_model
from PIL import Image
from support.small_segmentors import write_detail_config

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.processes import usable_amp
from vrwkv.segmentation import draw_mask, draw_overlay, load_segmentor, segment
from vrwkv.segmentation.config import load_config
from vrwkv.segmentation.files import segment_files
from vrwkv.segmentation.whole import WholePicture


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
    """Odd pictures, two of one name beside one of the name the second would get, a broken one: the others are done."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    upright = noise(30, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright.save(folder / "turned.jpg", exif=exif)
    upright.save(folder / "same.jpg")
    upright.save(folder / "same.png")
    upright.save(folder / "same-2.png")
    noise(30, 40, 1).save(folder / "grey.png")
    noise(30, 40, 4).save(folder / "transparent.png")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(folder / "deep.png")
    noise(1, 1).save(folder / "dot.png")
    (folder / "broken.png").write_bytes((folder / "grey.png").read_bytes()[:100])
    argv = [str(folder), "--config", str(config_path), "--checkpoint", str(checkpoint), "--out", str(out), "--json"]
    assert segment_main(argv) == 1
    captured = capsys.readouterr()
    results = {result["image"].rpartition("/")[2]: result for result in json.loads(captured.out)}
    assert len(results) == 9
    assert "error" in results.pop("broken.png")
    assert f"error: cannot read image {folder / 'broken.png'}: " in captured.err.splitlines()[-1]
    assert len(list(out.iterdir())) == 16
    for result in results.values():
        assert sum(result["shares"].values()) == pytest.approx(1, abs=1e-5)
        assert Image.open(result["mask"]).mode == "P"
    assert Image.open(results["turned.jpg"]["mask"]).size == (30, 40)
    assert Image.open(results["dot.png"]["mask"]).size == (1, 1)


@pytest.mark.parametrize(
    "problem",
    [RuntimeError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()],
)
def test_picture_that_does_not_fit_into_memory(problem, model, tmp_path, monkeypatch):
    """It is an error of this picture, whether or not the model has been seen to work; the others are done."""
    paths = [tmp_path / name for name in ("large.png", "small.png", "larger.png")]
    for path in paths:
        noise(8, 30 if path.stem == "small" else 300).save(path)

    def limited(model, path, amp, tile):
        if "large" in path.name:
            raise problem
        return segment(model, path, amp, tile)

    monkeypatch.setattr("vrwkv.segmentation.files.segment", limited)
    results = segment_files(model, paths, tmp_path / "out")
    text = "picture {} needs more memory than there is; --tile 1024 needs less"
    assert [each.get("error") for each in results] == [text.format(paths[0]), None, text.format(paths[2])]
    problem = RuntimeError("a fault of the program")
    with pytest.raises(RuntimeError, match="a fault"):
        segment_files(model, paths[1:], tmp_path / "out")


def test_pictures_are_not_overwritten(segment_main, error, config_path, checkpoint, tmp_path):
    noise(30, 40).save(tmp_path / "photo.png")
    noise(30, 40).save(tmp_path / "photo_mask.png")
    before = (tmp_path / "photo_mask.png").read_bytes()
    argv = [str(tmp_path), "--config", str(config_path), "--checkpoint", str(checkpoint), "--out", str(tmp_path)]
    assert f"picture {tmp_path / 'photo_mask.png'} would be overwritten" in error(segment_main, argv)
    assert (tmp_path / "photo_mask.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope="module")
def detail_model(config_path, scenes, tmp_path_factory):
    """A detail segmentor with random weights, which takes pictures whole, and its files."""
    folder = tmp_path_factory.mktemp("detail")
    write_detail_config(folder / "config.py", size=32, width=4)
    torch.manual_seed(0)
    model = init_model(str(folder / "config.py"), device="cpu")
    model.train()  # so that the norms learn their statistics, and folding them has something to do
    with torch.no_grad():
        for _ in range(50):
            model.decode_head(model.extract_feat(torch.randn(2, 3, 64, 64)))
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    torch.save({"state_dict": model.state_dict(), "meta": {}}, folder / "weights.pth")
    return folder / "config.py", folder / "weights.pth"


def test_detail_segmentor_is_that_of_mmseg(detail_model):
    """Norms folded, weights channels last, nothing resized as a whole: the classes of mmseg's own inference."""
    picture = noise(75, 121)
    plain = init_model(*map(str, detail_model), device="cpu")
    expected = inference_model(plain, np.asarray(picture)[..., ::-1].copy()).pred_sem_seg.data[0].numpy()
    ours = load_segmentor(*detail_model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in ours.modules())
    mask = segment(ours, picture).mask
    assert len(np.unique(mask)) > 3
    assert (mask != expected).mean() < 1e-3


BINARY = {"num_classes": 2, "out_channels": 1, "threshold": 0.4, "loss_decode": {"use_sigmoid": True}}


@pytest.fixture
def variant(detail_model, tmp_path):
    """Makes a detail segmentor with other settings, as `load_segmentor` has it."""

    def make(**settings):
        loss = {"class_weight": None} if "num_classes" in settings.get("decode_head", {}) else {}
        cfg = load_config(detail_model[0])
        cfg.merge_from_dict({"model": settings, "model.decode_head.loss_decode": loss})
        torch.manual_seed(0)
        model = init_model(cfg.copy(), device="cpu")
        torch.nn.init.normal_(model.decode_head.conv_seg.weight)
        torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "weights.pth")
        return load_segmentor(cfg, tmp_path / "weights.pth")

    return make


@pytest.mark.parametrize("mode", ["slide", "whole"])
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"decode_head": {"align_corners": True}},
        {"decode_head": BINARY},
        {"data_preprocessor": {"test_cfg": {"size_divisor": 64}}},
    ],
    ids=["align_corners", "binary", "size_divisor"],
)
def test_other_settings_of_mmseg(variant, settings, mode, resized):
    model = variant(**settings, test_cfg=dict(mode=mode, crop_size=(32, 32), stride=(20, 20)))
    resize = [dict(type="Resize", scale=(100, 70), keep_ratio=True)] if resized else []
    model.cfg.test_pipeline = [dict(type="LoadImageFromFile"), *resize, dict(type="PackSegInputs")]
    picture = noise(75, 121)
    expected = inference_model(model, np.asarray(picture)[..., ::-1].copy()).pred_sem_seg.data[0].numpy()
    assert len(np.unique(expected)) > 1
    assert (segment(model, picture).mask != expected).mean() < 1e-3


def test_heads_that_do_not_fit(variant):
    smooth = noise(9, 12).resize((400, 300))
    with pytest.raises(UserError, match="required is num_classes=2, got 1"):
        variant(decode_head=BINARY | {"num_classes": 1})
    with pytest.raises(UserError, match="tiles need a decode_head with align_corners=False"):
        segment(variant(decode_head={"align_corners": True}), smooth, tile=256)
    padding = variant(decode_head=BINARY, data_preprocessor={"test_cfg": {"size_divisor": 64}})
    masks = [segment(padding, smooth, tile=tile).mask for tile in (None, 256)]
    assert len(np.unique(masks[1])) == 2
    assert WholePicture(padding)(torch.zeros(1, 3, 40, 50)).shape == (1, 2, 40, 50)  # as it is exported
    assert (masks[0] == masks[1]).mean() > 0.8


def test_inferencer_of_mmseg(detail_model, tmp_path):
    noise(40, 60).save(tmp_path / "picture.png")
    inferencer = MMSegInferencer(*map(str, detail_model), dataset_name="ade", device="cpu")
    found = inferencer(str(tmp_path / "picture.png"), return_datasamples=True).pred_sem_seg.data[0].numpy()
    assert (segment(load_segmentor(*detail_model), tmp_path / "picture.png").mask != found).mean() < 1e-3


def test_tiles(detail_model, monkeypatch):
    """Only tiles go through the model; most classes are those of the picture as a whole; small pictures stay whole."""
    model = load_segmentor(*detail_model)
    smooth = noise(9, 12).resize((600, 450))
    whole = segment(model, smooth).mask
    shapes = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[2:])))
    tiled = segment(model, smooth, tile=256).mask
    assert len(shapes) == 6
    assert all(max(shape) <= 256 for shape in shapes)
    assert tiled.shape == (450, 600)
    assert (tiled == whole).mean() > 0.8
    np.testing.assert_array_equal(segment(model, smooth, tile=608).mask, whole)
    assert len(shapes) == 7


def test_tiles_of_pictures_that_would_be_resized(model, monkeypatch):
    resize = dict(type="Resize", scale=(100, 70), keep_ratio=True)
    monkeypatch.setitem(model.cfg, "test_pipeline", [resize, dict(type="PackSegInputs")])
    with pytest.raises(UserError, match="tiles need a test_pipeline that leaves pictures at their size"):
        segment(model, noise(300, 300), tile=256)


def test_pictures_that_pillow_takes_for_an_attack(detail_model, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    noise(60, 60).save(tmp_path / "large.png")
    model = load_segmentor(*detail_model)
    with pytest.raises(UserError, match="exceeds limit"):
        segment(model, tmp_path / "large.png")
    assert segment(model, tmp_path / "large.png", tile=256).mask.shape == (60, 60)
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("faster", [True, False])
def test_bfloat16(detail_model, faster, monkeypatch, capsys):
    """The model computes in it; where that would be no faster a line says so once, and nothing changes."""
    speeds = {torch.float32: 1.0, torch.bfloat16: 2.0 if faster else 1.0}
    monkeypatch.setattr("vrwkv.runtime.processes._speed", speeds.get)
    usable_amp.cache_clear()
    model = load_segmentor(*detail_model)
    dtypes = []
    model.decode_head.convs[0].register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    masks = [segment(model, noise(64, 64), amp=amp).mask for amp in ("none", "bfloat16", "bfloat16")]
    usable_amp.cache_clear()
    message = "this processor is no faster in bfloat16: computing in float32\n"
    assert capsys.readouterr().err == ("" if faster else message)
    assert dtypes[1] == (torch.bfloat16 if faster else torch.float32)
    assert (masks[0] == masks[1]).mean() >= (0.9 if faster else 1)


def test_some_classes_alone(detail_model, segment_main, error, tmp_path):
    """The overlay has them alone, mask and shares have all; a class that is not known is named with the nearest."""
    result = segment(load_segmentor(*detail_model), noise(40, 50))
    name = next(iter(result.shares()))
    overlay = np.asarray(draw_overlay(result, 1.0, [name]))[:40, :50]
    inside = result.mask == result.classes.index(name)
    assert 0 < inside.mean() < 1
    np.testing.assert_array_equal(
        overlay[inside], np.broadcast_to(result.palette[result.classes.index(name)], overlay.shape)[inside]
    )
    np.testing.assert_array_equal(overlay[~inside], np.asarray(result.picture)[~inside])
    noise(40, 50).save(tmp_path / "x.png")
    config, weights = detail_model
    argv = [tmp_path / "x.png", "--config", config, "--checkpoint", weights, "--out", tmp_path / "out"]
    assert "the model knows no class 'fotograph'; nearest: photograph" in error(
        segment_main, [*argv, "--classes", "fotograph"]
    )
    assert "tile must be a multiple of 32 and at least 256, not 100" in error(segment_main, [*argv, "--tile", "100"])
    assert segment_main([*map(str, argv), "--classes", name, "photograph", "--tile", "256", "--amp", "bfloat16"]) == 0
