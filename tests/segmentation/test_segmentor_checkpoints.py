"""Checkpoints of other programs: as mmseg 0.x wrote them, and files that must be refused."""

import numpy as np
import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.apis import init_model
from mmseg.registry import MODELS
from PIL import Image
from support.golden import load_adapter_golden

from vrwkv.segmentation import load_segmentor, segment

PALETTE = [[7, 8, 9], [10, 200, 30], [250, 0, 120]]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A config, and a checkpoint for it with the authors' names and mmseg 0.x's meta, around a golden backbone."""
    golden = load_adapter_golden("vrwkv_adapter_post_norm")
    head = dict(in_channels=24, channels=8, num_classes=3, norm_cfg=dict(type="SyncBN"))
    config = Config(
        dict(
            model=dict(
                type="EncoderDecoder",
                data_preprocessor=dict(type="SegDataPreProcessor", mean=[120.0] * 3, std=[60.0] * 3),
                backbone=dict(type="VRWKVAdapter", norm_cfg=dict(type="SyncBN"), **golden.args),
                decode_head=dict(type="LeanUPerHead", **head | dict(in_channels=[24] * 4, in_index=[0, 1, 2, 3])),
                auxiliary_head=dict(type="FCNHead", in_index=2, **head),
                test_cfg=dict(mode="whole"),
            ),
            test_pipeline=[dict(type="LoadImageFromFile"), dict(type="PackSegInputs")],
        )
    )
    init_default_scope("mmseg")
    torch.manual_seed(0)
    heads = {k: v for k, v in MODELS.build(config.model).state_dict().items() if not k.startswith("backbone.")}
    weights = heads | {f"backbone.{name}": tensor for name, tensor in golden.weights.items()}
    meta = dict(env_info="", epoch=1, CLASSES=("wall", "tree", "cat"), PALETTE=PALETTE, config="model = dict()")
    path = tmp_path_factory.mktemp("published") / "published.pth"
    torch.save({"state_dict": weights, "meta": meta}, path)
    return config, path, golden, weights


@torch.no_grad()
def test_published_checkpoint(published):
    config, path, golden, weights = published
    model = load_segmentor(config, path)
    images, expected = golden.cases[0]
    for actual, wanted in zip(model.backbone(images), expected, strict=True):
        assert (actual - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    torch.testing.assert_close(model.auxiliary_head.conv_seg.weight, weights["auxiliary_head.conv_seg.weight"])
    result = segment(model, Image.fromarray(np.zeros((40, 50, 3), np.uint8)))
    assert result.classes == ["wall", "tree", "cat"]
    assert result.palette == [tuple(colour) for colour in PALETTE]


def test_mmsegs_own_loader_takes_it(published):
    """The names are converted wherever a backbone is filled: here by `mmseg.apis.init_model`."""
    config, path, _, _ = published
    ours, theirs = load_segmentor(config, path), fuse_conv_bn(init_model(config.copy(), str(path), device="cpu"))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
