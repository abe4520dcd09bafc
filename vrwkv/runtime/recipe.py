"""What every training run is asked for, and timm's optimizer and schedule for it."""

from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vrwkv.runtime.config import MAY_CHANGE, NotNegative, Positive, PositiveShare, Section, Text
from vrwkv.runtime.errors import UserError, first_line, nearest
from vrwkv.runtime.processes import Amp


def _known_optimizer(name: str) -> str:
    known = [str(each) for each in list_optimizers()]
    if name not in known:
        raise ValueError(f"must be an optimizer of timm, not {name!r}{nearest(name, known)}")
    return name


class OptimConfig(Section):
    lr: Annotated[NotNegative, MAY_CHANGE]
    lr_batch_size: Annotated[int, Field(ge=1)] | None = None
    """lr is meant for this many samples per update and scaled to the real number."""
    name: Annotated[str, AfterValidator(_known_optimizer)] = "adamw"
    weight_decay: NotNegative = 0.05
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] | None = None
    """Of optimizers of Adam's kind; None: the optimizer's own."""
    layer_decay: PositiveShare | None = None
    """The learning rate falls by this factor from each layer of a timm model to the one below, from the head down."""
    clip_grad: Annotated[Positive | None, MAY_CHANGE] = None  # largest norm of all gradients
    accumulate: Annotated[int, Field(ge=1)] = 1  # steps per update
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of averaged weights, which are then the ones evaluated and used."""
    ema_warmup: bool = False
    """Let the decay rise to ema_decay, as 1 - (1 + updates)^(-2/3): for short runs from nothing."""


class ScheduleConfig(Section):
    name: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"] = "cosine"
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    warmup_lr: NotNegative = 1e-6
    min_lr: NotNegative = 0.0


class SaveConfig(Section):
    minutes: Annotated[Positive | None, MAY_CHANGE] = 10.0
    """Save last.pth so often within an epoch, which is as much as a kill can cost; None: after each epoch alone."""
    keep: Annotated[int, Field(ge=0, le=1000), MAY_CHANGE] = 1  # earlier ones, as last.1.pth, last.2.pth, ...


class WatchConfig(Section):
    tensorboard: Annotated[bool, MAY_CHANGE] = False  # scalars for TensorBoard in the output folder
    wandb: Annotated[Text | None, MAY_CHANGE] = None  # project that scalars are sent to


class RunConfig(Section):
    """What the training loop is asked for, whatever the task; tasks add sections of their own."""

    output: Annotated[Text, MAY_CHANGE]  # folder for checkpoints, summary.csv and curves.png
    epochs: Annotated[int, Field(ge=1), MAY_CHANGE]
    optim: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    save: SaveConfig = SaveConfig()
    watch: WatchConfig = WatchConfig()
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    device: Annotated[str, MAY_CHANGE] = "auto"  # cuda where there is one, else cpu
    amp: Amp = "none"
    fsdp: Annotated[bool, MAY_CHANGE] = False
    """Each process keeps a shard of the weights, gradients and optimizer states, in place of all of them."""


def create_optimizer(
    model: nn.Module, config: RunConfig, update_size: int, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Scheduler]:
    """The optimizer, and the schedule of its learning rate by updates.

    Args:
        model: What to train.
        config: The run's configuration.
        update_size: Samples per update, of all processes and accumulated steps.
        updates_per_epoch: Updates per epoch.

    Raises:
        UserError: the optimizer or the schedule cannot be had.
    """
    optim, schedule = config.optim, config.schedule
    lr = optim.lr * (update_size / optim.lr_batch_size if optim.lr_batch_size else 1)
    if schedule.name != "constant" and lr < schedule.min_lr:
        raise UserError(f"schedule.min_lr must not be above the learning rate of {lr:g}, not {schedule.min_lr:g}")
    try:
        options: dict[str, Any] = {"betas": tuple(optim.betas)} if optim.betas else {}
        optimizer = create_optimizer_v2(
            model, optim.name, lr, optim.weight_decay, layer_decay=optim.layer_decay, **options
        )
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
    except Exception as error:  # optimizers of other packages have their own types
        raise UserError(f"optim or schedule cannot be used: {first_line(error)}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"optim.name {optim.name} needs second derivatives, which are not computed")
    assert scheduler is not None  # every name of ScheduleConfig is one of timm's
    return optimizer, scheduler
