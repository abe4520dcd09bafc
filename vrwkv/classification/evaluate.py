"""Accuracy of a model on an image folder."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vrwkv.classification.classifier import load_classifier
from vrwkv.classification.config import DataConfig
from vrwkv.classification.data import create_eval_loader, find_pictures, without_padding
from vrwkv.classification.reports import Reporter, Reports, leave_out, read_class_map
from vrwkv.runtime.config import check
from vrwkv.runtime.errors import UserError
from vrwkv.runtime.onnx_model import is_onnx
from vrwkv.runtime.processes import Amp, World, autocast, join_world
from vrwkv.runtime.progress import Measure, Meters, Progress, say

MEASURES = (
    Measure("loss", "loss"),
    Measure("top1", "accuracy", percent=True, higher_is_better=True),
    Measure("top5", percent=True, higher_is_better=True),
)


def right_answers(logits: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """How many of `logits` (B, classes) have their class (B,) first, and among the first five."""
    best = logits.detach().topk(min(5, logits.shape[1])).indices  # (B, 5)
    right = best == classes[:, None]
    return {"top1": right[:, 0].sum(), "top5": right.sum()}


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Any, world: World, amp: Amp = "none", on_logits: Callable[[Tensor], None] | None = None
) -> Meters:
    """Runs `model` over this process's share of `loader`.

    Args:
        model: What to measure.
        loader: From `create_eval_loader`.
        world: This process.
        amp: Number format of the forward pass.
        on_logits: Is given the logits (B, classes) of each batch of this process's share.

    Returns:
        The sums of `MEASURES`, with cross-entropy as the loss.
    """
    model.eval()
    meters = Meters(MEASURES, world)
    with Progress("val", len(loader), loader.loader.batch_size, world) as progress:
        for images, target, count in without_padding(loader, world):
            with autocast(world, amp):
                logits = model(images)
            logits, target = logits[:count].float(), target[:count]
            if count:
                loss = nn.functional.cross_entropy(logits, target, reduction="sum")
                meters.update({"loss": loss, **right_answers(logits, target)}, count)
                if on_logits:
                    on_logits(logits)
            progress.step(meters)
    return meters


def validate(
    checkpoint: str | Path | None = None,
    data_root: str | None = None,
    *,
    model_name: str | None = None,
    pretrained: bool = False,
    split: str | None = None,
    batch_size: int = 64,
    workers: int = 4,
    device: str = "auto",
    amp: Amp = "none",
    reports: Reports | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Loads a model and evaluates it on `data_root/split`.

    Args:
        checkpoint: File of `tools/train.py`, or any weights of `model_name`.
        data_root: As `data.root` of configurations; the one that the checkpoint was trained on if None.
        model_name: timm's name.
        pretrained: Take the published weights of `model_name`.
        split: Folder below `data_root`; the one that validated the checkpoint's training if None.
        batch_size: Pictures at a time.
        workers: Processes that read pictures.
        device: A torch device, or "auto".
        amp: Number format of the forward pass.
        reports: What else to read and write.
        overrides: Keys of `PictureConfig`, such as img_size, as in `load_classifier`.

    Returns:
        loss (mean cross-entropy), top1 and top5 (percent), images_per_second, the number of images, and real_top1 and
        real_top5 where real labels are given.

    Raises:
        UserError: anything about the model, the checkpoint or the data that does not fit.
    """
    with join_world("cpu" if device == "auto" and is_onnx(checkpoint) else device) as world:
        classifier = load_classifier(checkpoint, model_name, pretrained, world.device, amp, **overrides)
        root = data_root or classifier.data_root
        if root is None:
            raise UserError("required: --data-root DIR, because the checkpoint does not name one")
        keys = {"root": root, "val_split": split or classifier.val_split, "batch_size": batch_size, "workers": workers}
        data = check(DataConfig, keys, "option")
        pictures = find_pictures(data.root, data.val_split)
        class_names, told = classifier.class_names or list(pictures.pictures), pictures.describe()
        if reports and reports.class_map:
            class_names = read_class_map(reports.class_map, classifier.num_classes)
            told += f"; {leave_out(pictures, class_names, reports.class_map)}"
        if len(class_names) != classifier.num_classes:
            raise UserError(f"the model has {classifier.num_classes} classes, {pictures.path} has {len(class_names)}")
        loader = create_eval_loader(pictures, class_names, classifier.data_config, data, world)
        reporter = Reporter(reports, loader.dataset.samples, class_names, world) if reports and any(reports) else None
        if world.primary:
            say(told)
        begin, images = time.monotonic(), len(loader.dataset)
        meters = evaluate(classifier.model, loader, world, amp, reporter.add if reporter else None)
        result = meters.values(meters.gather())
        result["images_per_second"] = images / (time.monotonic() - begin)
        return {**result, **(reporter.finish() if reporter else {}), "images": images}
