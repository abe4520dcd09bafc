"""Every config builds, runs a loss, a backward and an inference on a small crop; widths are shrunk, nothing else."""

import re

import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from support.scripts import REPOSITORY

from vrwkv.segmentation.config import load_config

SIZE = (60, 100)
CONFIGS = sorted((REPOSITORY / "configs" / "segmentation").glob("vrwkv*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    torch.manual_seed(0)
    model = load_config(path).model
    if path.stem.startswith("vrwkv6"):
        size = re.search(r"tiny|small|base", path.stem)[0]
        assert model.backbone.model == f"vrwkv6_{size}_patch16_224"
        assert model.backbone.init_cfg.checkpoint == f"pretrained/vrwkv6_{size[0]}_in1k_224.pth"
    backbone, dim = model.backbone, 2 * model.backbone.get("deform_num_heads", 12)
    backbone.init_cfg = None
    backbone.model_args.embed_dim = dim
    if "vrwkv6" in backbone.model:
        backbone.model_args.head_size = dim // 2
    in_channels = [dim] * 4
    if backbone.type == "VRWKVDetail":
        backbone.detail_width, in_channels = 2, [4, 8, dim]
    model.decode_head.update(in_channels=in_channels, channels=8)
    if model.auxiliary_head:
        model.auxiliary_head.update(in_channels=dim, channels=8)
    model.data_preprocessor.size = (64, 96)
    segmentor = revert_sync_batchnorm(MODELS.build(model))
    segmentor.init_weights()
    sample = SegDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96)))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, segmentor.num_classes, (1, 64, 96)))
    data = dict(
        inputs=[torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)] * 2, data_samples=[sample, sample.clone()]
    )
    batch = segmentor.data_preprocessor(data, training=True)
    losses = segmentor(**batch, mode="loss")
    sum(value for name, value in losses.items() if "loss" in name).backward()
    for name, parameter in segmentor.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    segmentor.eval()
    with torch.no_grad():
        results = segmentor.test_step(dict(inputs=data["inputs"][:1], data_samples=[sample]))
    assert results[0].pred_sem_seg.data.shape == (1, 64, 96)


def test_there_are_nineteen():
    assert len(CONFIGS) == 19


def scales(steps, **keys):
    """By which factors of their own size pictures go through a pipeline."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    made = Compose([step for step in steps if "Load" not in step["type"]])(
        dict(img=pixels, img_shape=SIZE, ori_shape=SIZE, seg_fields=[], **keys)
    )
    samples = made["data_samples"]
    return [each.metainfo["scale_factor"][0] for each in (samples if isinstance(samples, list) else [samples])]


def test_own_data_of_the_docs(tmp_path):
    """Pictures are trained, tested and averaged over at scales around their own, whatever their size."""
    text = (REPOSITORY / "docs/segmentation.md").read_text()
    block = next(each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "_base_" in each)
    (tmp_path / "streets.py").write_text(block.replace('"./', f'"{REPOSITORY}/configs/segmentation/'))
    cfg = load_config(tmp_path / "streets.py")
    train = [scales(cfg.train_dataloader.dataset.pipeline, gt_seg_map=np.zeros(SIZE, np.uint8)) for _ in range(30)]
    assert {factor for (factor,) in train} <= {0.5, 0.75, 1.0, 1.25, 1.5, 2.0}
    assert len({factor for (factor,) in train}) > 3
    assert cfg.test_dataloader.dataset.pipeline[1:] == cfg.val_dataloader.dataset.pipeline[1:]
    assert "Resize" not in str(cfg.test_dataloader.dataset.pipeline)
    steps = cfg.tta_pipeline[1].copy()
    steps.transforms = [each for each in steps.transforms if "Load" not in each[0]["type"]]
    assert scales([steps]) == [factor for factor in (0.5, 0.75, 1.0, 1.25, 1.5) for _ in range(2)]
