"""mmengine's Runner for training and testing, with what mmengine leaves to the user settled."""

import os
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.processes import is_primary
from vrwkv.runtime.progress import say
from vrwkv.runtime.run_folder import RunFolder
from vrwkv.runtime.signals import StopSignals
from vrwkv.segmentation.checkpoint import load_segmentor_weights, read
from vrwkv.segmentation.config import check_data, leave_first_weights, load_config, loaders
from vrwkv.segmentation.engine import StrictRunner, config_errors, read_checkpoints_safely, unwrap_model
from vrwkv.segmentation.hooks import FiniteHook
from vrwkv.segmentation.interruption import StopHook, TrainingRunner
from vrwkv.segmentation.loading import load_strictly
from vrwkv.segmentation.work_folder import find_start

CANNOT = "the config cannot be used"


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
        resume: See `find_start`.
        amp: Mixed precision, on a GPU.
        options: Overrides of keys of the config.

    Returns:
        The work folder.

    Raises:
        UserError: anything that does not fit, found before training starts where possible.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came.
    """
    cfg = _prepare(config, work_dir, options, ("train_dataloader", "val_dataloader"))
    if cfg.get("launcher", "none") == "none":
        _check_alone()
    if amp:
        if not torch.cuda.is_available():
            raise UserError("mixed precision needs a GPU")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.loss_scale = "dynamic"
    work = Path(cfg.work_dir)
    if path := find_start(work, resume):
        cfg.load_from, cfg.resume = str(path), True
        leave_first_weights(cfg)
        if is_primary():
            say(f"resuming from {path}")
    with StopSignals() as signals, RunFolder(work).locked() if is_primary() else nullcontext():
        runner = _build(cfg, TrainingRunner)
        runner.register_hook(FiniteHook())
        runner.register_hook(StopHook(signals))
        with signals.deferred(), config_errors(CANNOT, lambda: not runner.proven):
            runner.train()
    return work


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
        cfg.visualizer = None  # what the config's would write goes with this folder
        cfg.load_from = None
        leave_first_weights(cfg)
        if tta:
            if "tta_pipeline" not in cfg or "tta_model" not in cfg:
                raise UserError(f"config {config} has no tta_pipeline and tta_model")
            for name, dataset in loaders(cfg):
                if name == "test_dataloader":
                    dataset.pipeline = cfg.tta_pipeline
            cfg.model = dict(cfg.tta_model, module=cfg.model)
        runner = _build(cfg, StrictRunner)
        load_segmentor_weights(unwrap_model(runner.model), read(checkpoint), checkpoint)
        with config_errors(CANNOT, lambda: not runner.proven):
            result = runner.test()
        return {name: float(value) for name, value in result.items()}


def _prepare(
    config: str | Path, work_dir: str | Path | None, options: Mapping[str, Any] | None, used: tuple[str, ...]
) -> Config:
    cfg = load_config(config, options)
    check_data(cfg, used)
    cfg.work_dir = str(work_dir or cfg.get("work_dir") or Path("output", Path(config).stem))
    num_classes = cfg.model.decode_head.num_classes
    for name, dataset in loaders(cfg):
        load_strictly(dataset.get("pipeline", []), num_classes)
        if not cfg[name].get("num_workers"):
            cfg[name].persistent_workers = False
    load_strictly(cfg.get("tta_pipeline", []), num_classes)
    if "RANK" in os.environ:  # torchrun
        cfg.launcher = "pytorch"
    if not torch.cuda.is_available():
        _fall_back_to_cpu(cfg)
    return cfg


def _check_alone() -> None:
    """Raises a UserError where srun or mpirun, without torchrun, started several processes: each would run by itself.

    SLURM_NTASKS is of the whole job, and set in its shells too; SLURM_STEP_NUM_TASKS is of what srun started.
    """
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise UserError(
                f"segmentors take several processes from torchrun alone; started here were {count} ({name}) "
                "without it: start one on each node, and in it torchrun --nproc_per_node=GPUS"
            )


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


def _build(cfg: Config, kind: type[StrictRunner]) -> StrictRunner:
    read_checkpoints_safely()
    # mmengine keeps loggers and visualizers by name for the life of the process: one name, one folder, the first's.
    cfg.experiment_name = uuid.uuid4().hex  # mmengine's own changes by the second
    if cfg.get("visualizer"):
        cfg.visualizer.name = cfg.experiment_name  # "visualizer" in mmsegmentation's configs
    with config_errors(CANNOT):
        return kind.from_cfg(cfg)
