"""timm's loss, optimizer and schedule, as a configuration asks for them."""

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vrwkv.classification.config import AugmentConfig, Config
from vrwkv.runtime.errors import UserError, first_line


def create_loss(augment: AugmentConfig, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """The mixing of a batch's pictures and targets, if any, and the loss for what comes out of it."""
    if not (augment.mixup or augment.cutmix):
        return None, LabelSmoothingCrossEntropy(augment.label_smoothing)
    mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing, num_classes=num_classes)
    return mixup, SoftTargetCrossEntropy()


def create_optimizer(
    model: nn.Module, config: Config, batch_size: int, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Scheduler]:
    """The optimizer, and the schedule of its learning rate by updates.

    Args:
        model: What to train.
        config: The run's configuration.
        batch_size: Pictures per update, of all processes and accumulated steps.
        updates_per_epoch: Updates per epoch.

    Raises:
        UserError: timm knows no such optimizer or schedule.
    """
    optim, schedule = config.optim, config.schedule
    lr = optim.lr * (batch_size / optim.lr_batch_size if optim.lr_batch_size else 1)
    try:
        optimizer = create_optimizer_v2(model, optim.name, lr, optim.weight_decay)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            schedule.name,
            config.epochs,
            warmup_epochs=schedule.warmup_epochs,
            warmup_lr=schedule.warmup_lr,
            min_lr=schedule.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"optim or schedule cannot be used: {first_line(error)}") from error
    if scheduler is None:
        raise UserError("schedule.name none is not supported; constant keeps the learning rate after warm-up")
    return optimizer, scheduler
