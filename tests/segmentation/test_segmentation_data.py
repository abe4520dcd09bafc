"""What a config's data may be wrapped in or named by: it is read and checked strictly all the same."""

import shutil

import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS
from PIL import Image

from vrwkv.runtime.errors import UserError
from vrwkv.segmentation import load_segmentor, segment
from vrwkv.segmentation.config import check_data, leave_first_weights, load_config, loaders
from vrwkv.segmentation.loading import LoadMaskStrictly, load_strictly


@pytest.fixture
def own_cfg(config_path, scenes, tmp_path):
    """The config for training with a data set that a test may spoil."""
    root = shutil.copytree(scenes, tmp_path / "scenes")
    cfg = load_config(config_path, {"train_dataloader.dataset.data_root": str(root)})
    return cfg, root


def wrap(cfg):
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type="RepeatDataset", times=2, dataset=dict(type="ConcatDataset", datasets=[inner.copy(), inner.copy()])
    )


def scope(cfg):
    for step in cfg.train_dataloader.dataset.pipeline:
        step.type = {"LoadImageFromFile": "mmcv.", "LoadAnnotations": "mmseg."}.get(step.type, "") + step.type


def name_classes(cfg):
    for step in cfg.train_dataloader.dataset.pipeline:
        step.type = {each.__name__: each for each in (LoadImageFromFile, LoadAnnotations)}.get(step.type, step.type)


@pytest.mark.parametrize("change", [wrap, scope, name_classes])
def test_masks_are_read_strictly(change, own_cfg):
    cfg, root = own_cfg
    mask = np.asarray(Image.open(root / "masks/train/0000.png")).copy()
    mask[0, 0] = 11
    Image.fromarray(mask).save(root / "masks/train/0000.png")
    change(cfg)
    for _, dataset in loaders(cfg):
        load_strictly(dataset.pipeline, 11)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    with pytest.raises(UserError, match=r"masks/train/0000.png has the value 11"):
        dataset[0]
    assert dataset[1]["data_samples"].gt_sem_seg.data.max() < 256


def test_wrapped_data_are_checked(own_cfg):
    cfg, root = own_cfg
    wrap(cfg)
    check_data(cfg, ("train_dataloader",))
    cfg.train_dataloader.dataset.dataset.datasets[1].metainfo = dict(classes=("a", "b"))
    with pytest.raises(UserError, match=r"train_dataloader has 2 classes, model.decode_head.num_classes is 11"):
        check_data(cfg, ("train_dataloader",))
    shutil.rmtree(root / "masks/train")
    with pytest.raises(UserError, match=r"the seg_map_path folder .* does not exist"):
        check_data(cfg, ("train_dataloader",))


def test_endings_of_pictures(own_cfg, capsys):
    cfg, root = own_cfg
    dataset = cfg.train_dataloader.dataset
    ending = next((root / "images/train").iterdir()).suffix
    (root / "images/train/0000.gif").touch()
    (root / "images/train/.hidden").touch()
    check_data(cfg, ("train_dataloader",))
    folder = root / "images/train"
    expected = f"train_dataloader: 8 of the 9 files in {folder} end in {ending}, the others are left out\n"
    assert capsys.readouterr().err == expected
    dataset.img_suffix = ".bmp"
    with pytest.raises(
        UserError, match=r"none of the 9 files in .* ends in .bmp; set train_dataloader.dataset.img_suf"
    ):
        check_data(cfg, ("train_dataloader",))
    (root / "none.txt").touch()
    dataset.ann_file = "none.txt"
    with pytest.raises(UserError, match=r"none.txt names no pictures"):
        check_data(cfg, ("train_dataloader",))


@pytest.mark.parametrize("value", [2, 256, 300])
def test_values_of_masks_whose_classes_are_mapped(value, tmp_path):
    """Two classes of which one is left; numbers beyond a byte must not come round to one of theirs."""
    path = tmp_path / "mask.png"
    results = dict(seg_map_path=path, img_path="x", ori_shape=(1, 3), reduce_zero_label=False, label_map={0: 255, 1: 0})
    Image.fromarray(np.array([[0, 1, 255]], np.uint16)).save(path)
    found = LoadMaskStrictly(1).transform(results | {"seg_fields": []})["gt_seg_map"]
    np.testing.assert_array_equal(found, [[255, 0, 255]])
    Image.fromarray(np.array([[0, 1, value]], np.uint16)).save(path)
    with pytest.raises(UserError, match=f"has the value {value}; 2 classes have the values 0 to 1"):
        LoadMaskStrictly(1).transform(results | {"seg_fields": []})


def test_contradicting_reduce_zero_label(own_cfg):
    cfg, _ = own_cfg
    dataset = cfg.train_dataloader.dataset
    next(step for step in dataset.pipeline if step.type == "LoadAnnotations").reduce_zero_label = True
    load_strictly(dataset.pipeline, 11)
    with pytest.raises(
        UserError, match=r"LoadAnnotations has reduce_zero_label=True, the dataset of mask .* has False"
    ):
        DATASETS.build(dataset)[0]


def test_test_pipeline(config_path, checkpoint):
    """With scopes and classes, that of the test data where it has no name of its own, and none at all."""
    model = load_segmentor(config_path, checkpoint)
    picture = Image.new("RGB", (40, 30), (200, 20, 90))
    expected = segment(model, picture).mask
    loading = [dict(type="mmcv.LoadImageFromFile"), dict(type=LoadAnnotations)]
    model.cfg.test_pipeline = [*loading, dict(type="mmseg.PackSegInputs")]
    np.testing.assert_array_equal(segment(model, picture).mask, expected)
    model.cfg.pop("test_pipeline")
    np.testing.assert_array_equal(segment(model, picture).mask, expected)
    model.cfg.pop("test_dataloader")
    with pytest.raises(UserError, match=r"has neither a test_pipeline nor a test_dataloader.dataset.pipeline"):
        segment(model, picture)


def test_published_weights_are_not_asked_for(config_path, checkpoint, monkeypatch):
    """A checkpoint replaces them, and the Hub may be out of reach."""
    options = {"model.backbone.model_args.pretrained": True}
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: pytest.fail("weights are asked for"))
    model = load_segmentor(config_path, checkpoint, options=options)
    assert "pretrained" not in model.cfg.model.backbone.model_args
    cfg = load_config(config_path)
    cfg.model.backbone.model_args = None
    leave_first_weights(cfg)
