"""mmengine's Runner for training and testing, with what mmengine leaves to the user settled."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader, Runner, find_latest_checkpoint

from vrwkv.runtime.errors import UserError, first_line
from vrwkv.segmentation.checkpoint import load_segmentor_weights, read
from vrwkv.segmentation.config import check_data, load_config, loaders
from vrwkv.segmentation.loading import load_strictly


def train(
    config: str | Path,
    work_dir: str | Path | None = None,
    resume: str | None = None,
    amp: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Trains a segmentor, alone or as one of torchrun's processes.

    Args:
        config: A config of mmsegmentation.
        work_dir: Where checkpoints and logs go; by default the config's, or output/ and the config's name.
        resume: None starts anew, "auto" goes on from the latest checkpoint in the work folder, if there is one, or a
            checkpoint.
        amp: Mixed precision, on a GPU.
        options: Overrides of keys of the config.

    Returns:
        The work folder.

    Raises:
        UserError: anything that does not fit, found before training starts where possible.
    """
    cfg = _prepare(config, work_dir, options, ("train_dataloader", "val_dataloader"))
    if amp:
        if not torch.cuda.is_available():
            raise UserError("mixed precision needs a GPU")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.loss_scale = "dynamic"
    path = find_latest_checkpoint(cfg.work_dir) if resume in (None, "auto") else resume
    if resume and path:
        if "optimizer" not in read(path):
            raise UserError(f"checkpoint {path} has no training state; load_from starts from its weights")
        cfg.load_from, cfg.resume = str(path), True
    elif path:
        raise UserError(f"{cfg.work_dir} holds an earlier run: add --resume, or choose another work folder")
    _build(cfg).train()
    return Path(cfg.work_dir)


def test(
    config: str | Path,
    checkpoint: str | Path,
    tta: bool = False,
    options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Measures a segmentor on the config's test data.

    Args:
        config: A config of mmsegmentation.
        checkpoint: File of `train`, of mmseg 0.x, or published by the authors.
        tta: Average over the flips and scales of the config's `tta_pipeline`.
        options: Overrides of keys of the config.

    Returns:
        aAcc, mIoU and mAcc in percent.

    Raises:
        UserError: anything that does not fit.
    """
    with tempfile.TemporaryDirectory() as work_dir:  # the Runner's log
        cfg = _prepare(config, work_dir, options, ("test_dataloader",))
        # mmengine keeps one visualizer per name for the life of the process, and this one's folder will be gone.
        cfg.visualizer, cfg.experiment_name = None, Path(work_dir).name
        cfg.load_from = None
        cfg.model.backbone.init_cfg = None
        if tta:
            if "tta_pipeline" not in cfg or "tta_model" not in cfg:
                raise UserError(f"config {config} has no tta_pipeline and tta_model")
            cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
            cfg.model = dict(cfg.tta_model, module=cfg.model)
        runner = _build(cfg)
        model: Any = runner.model
        while hasattr(model, "module"):  # of DDP, of the average over flips and scales
            model = model.module
        load_segmentor_weights(model, read(checkpoint), checkpoint)
        return {name: float(value) for name, value in runner.test().items()}


def _prepare(
    config: str | Path, work_dir: str | Path | None, options: Mapping[str, Any] | None, used: tuple[str, ...]
) -> Config:
    cfg = load_config(config, options)
    check_data(cfg, used)
    cfg.work_dir = str(work_dir or cfg.get("work_dir") or Path("output", Path(config).stem))
    num_classes = cfg.model.decode_head.num_classes
    for name, dataset in loaders(cfg):
        load_strictly(dataset.pipeline, num_classes)
        if not cfg[name].get("num_workers"):
            cfg[name].persistent_workers = False
    load_strictly(cfg.get("tta_pipeline", []), num_classes)
    if "RANK" in os.environ:  # torchrun
        cfg.launcher = "pytorch"
    if not torch.cuda.is_available():
        _fall_back_to_cpu(cfg)
    return cfg


def _fall_back_to_cpu(cfg: Config) -> None:
    """SyncBN to BN, nccl to gloo, and a DDP that is told of no GPU."""
    _replace_sync_bn(cfg.model)
    if cfg.get("launcher") == "pytorch":
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)


def _replace_sync_bn(settings: Any) -> None:
    for value in settings.values() if isinstance(settings, dict) else settings:
        if isinstance(value, dict) and value.get("type") == "SyncBN":
            value["type"] = "BN"
        elif isinstance(value, (dict, list, tuple)):
            _replace_sync_bn(value)


def _build(cfg: Config) -> Runner:
    # mmengine would otherwise load unsafely what cannot be loaded safely.
    CheckpointLoader.register_scheme("", lambda filename, map_location: read(filename), force=True)
    try:
        return Runner.from_cfg(cfg)
    except UserError:
        raise
    except Exception as error:  # constructors have their own types
        raise UserError(f"the config cannot be used: {first_line(error)}") from error
