"""All that changes while a run trains: what a checkpoint holds for the loop, and how it is taken up again."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from timm.utils import ModelEmaV3

from vrwkv.runtime import checkpoint, sharding
from vrwkv.runtime.config import Section, check, differences
from vrwkv.runtime.errors import UserError, first_line
from vrwkv.runtime.processes import World
from vrwkv.runtime.progress import Meters, say
from vrwkv.runtime.recipe import RunConfig, create_optimizer
from vrwkv.runtime.task import Task

Count = Annotated[int, Field(ge=0)]


class _Saved(Section, extra="ignore"):
    """What a checkpoint that can be resumed from holds for the loop."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    config: dict[str, Any]
    processes: int
    data: dict[str, str] | None = None  # of checkpoints of old: not known
    epoch: Count
    step: Count
    meters: torch.Tensor
    best_metric: float | None
    state_dict: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]


class TrainingState:
    """The state between two updates, when no gradients are under way and no random numbers are owed: those are seeded
    before each step, and the schedule is a function of the number of updates."""

    def __init__(self, task: Task, config: RunConfig, world: World) -> None:
        self.task, self.config, self.world, self.data = task, config, world, task.data()
        world.check_same(_told(self.data), "all processes need the same data, and were given different ones")
        sampler, accumulate = task.train_loader.batch_sampler, config.optim.accumulate
        self.updates_per_epoch = len(sampler) // accumulate
        self.steps_per_epoch = self.updates_per_epoch * accumulate
        self.update_size = update_size = sampler.batch_size * accumulate * world.size
        if not self.updates_per_epoch:
            given = len(sampler) * sampler.batch_size * world.size
            raise UserError(f"the training data fill batches of {given} samples; one update needs {update_size}")
        decay, warmup = config.optim.ema_decay, config.optim.ema_warmup
        mixed = config.fsdp and any(True for _ in task.model.buffers())  # which stay whole beside shards
        self.ema = ModelEmaV3(task.model, decay, use_warmup=warmup, foreach=not mixed) if decay else None
        if config.fsdp:
            sharding.check_optimizer(lambda model: create_optimizer(model, config, update_size, 1)[0], world)
            for model in (task.model, *([self.ema.module] if self.ema else [])):
                sharding.shard(model, world)
        self.optimizer, self.scheduler = create_optimizer(task.model, config, update_size, self.updates_per_epoch)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "float16")
        self.meters = Meters(task.measures, world)
        self.epoch = 0  # epochs done
        self.step = 0  # steps of the running epoch done
        self.best: float | None = None  # value of the task's judge

    @property
    def updates(self) -> int:
        """Updates of the whole run done."""
        return self.epoch * self.updates_per_epoch + self.step // self.config.optim.accumulate

    @property
    def steps_left(self) -> int:
        """Steps to the end of the run."""
        return (self.config.epochs - self.epoch) * self.steps_per_epoch - self.step

    def next_epoch(self) -> None:
        """Counts the running epoch as done."""
        self.epoch, self.step, self.meters = self.epoch + 1, 0, Meters(self.task.measures, self.world)

    def is_finite(self, loss: float) -> bool:
        """Whether the mean loss and all weights are. All processes call it together."""
        parts = map(sharding.local_part, self.task.model.parameters())
        here = math.isfinite(loss) and bool(torch.stack([each.isfinite().all() for each in parts]).all())
        return not self.world.agree(int(not here))

    def content(self, meters: torch.Tensor, metrics: Mapping[str, float]) -> dict[str, Any]:
        """What a checkpoint holds, in the primary process. All processes call it together.

        Args:
            meters: The sums of the running epoch of all processes, as `Meters.gather` gives them.
            metrics: Of the evaluation that was done with these weights, if any.
        """
        content = {
            **self.task.content(),
            "config": self.config.model_dump(),
            "processes": self.world.size,
            "data": self.data,
            "epoch": self.epoch,
            "step": self.step,
            "meters": meters.cpu(),
            "metrics": metrics,
            "best_metric": self.best,
            "state_dict": self.task.model.state_dict(),
            **({"state_dict_ema": self.ema.module.state_dict()} if self.ema else {}),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return sharding.gather(content, self.world.primary) if self.config.fsdp else content

    def restore(self, content: Mapping[str, Any], path: Path) -> None:
        """Takes up what a checkpoint holds.

        Args:
            content: The checkpoint.
            path: Its file, for messages.

        Raises:
            UserError: it is of another run, or entries are missing or no good.
        """
        if "optimizer" not in content:
            raise UserError(f"checkpoint {path} has no training state; model.checkpoint starts from its weights")
        saved = check(_Saved, content, f"checkpoint {path}: entry")
        self._check_same_run(saved, content, path)
        checkpoint.load(self.task.model, {"state_dict": content["state_dict"]}, path)
        if self.ema:
            checkpoint.load(self.ema.module, {"state_dict": content.get("state_dict_ema", {})}, path)
        try:
            self.optimizer.load_state_dict(sharding.shard_optimizer_state(content["optimizer"], self.optimizer))
            self.scaler.load_state_dict(content["scaler"])
        except Exception as error:  # they trust what they are given
            raise UserError(f"checkpoint {path} has no state of this optimizer: {first_line(error)}") from error
        try:
            self.meters.restore(saved.meters)
        except Exception as error:
            raise UserError(f"checkpoint {path} has no sums of this task's measures: {first_line(error)}") from error
        for group, lr in zip(self.optimizer.param_groups, self.scheduler.base_values, strict=True):
            group["initial_lr"] = lr  # of this configuration; lr follows from it before the next step
        self.epoch, self.step, self.best = saved.epoch, saved.step, saved.best_metric
        if self.step > self.steps_per_epoch or self.step % self.config.optim.accumulate:
            wanted = f"a multiple of {self.config.optim.accumulate} and at most {self.steps_per_epoch}"
            raise UserError(f"checkpoint {path}: entry step must be {wanted}, not {self.step}")

    def _check_same_run(self, saved: _Saved, content: Mapping[str, Any], path: Path) -> None:
        """What makes the numbers may not differ; where and for how long they are made may."""
        config = check(type(self.config), saved.config, f"checkpoint {path}: config key")
        changed = differences(config, self.config)
        if saved.data not in (None, self.data):
            changed.append(f"the data were {_told(saved.data)}, are {_told(self.data)}")
        for name, value in self.task.content().items():
            if content.get(name) != value:
                changed.append(_difference(name, content.get(name), value))
        if saved.processes != self.world.size:
            changed.append(f"the number of processes was {saved.processes}, is {self.world.size}")
        if changed:
            raise UserError(f"checkpoint {path} is of another run: " + "; ".join(changed))
        if self.world.primary and (chosen := differences(config, self.config, may_change=True)):
            say(f"changed since checkpoint {path}: {'; '.join(chosen)}")


def _told(data: Mapping[str, str]) -> str:
    return ", ".join(f"{what} for {purpose}" for purpose, what in data.items())


def _difference(name: str, old: Any, new: Any) -> str:
    """How an entry differs: of lists, such as names of classes, what is missing and what is new."""
    if not (isinstance(old, list) and isinstance(new, list)):
        return name
    changes = {"missing": [each for each in old if each not in new], "new": [each for each in new if each not in old]}
    found = [
        f"{', '.join(map(str, values[:5]))}{', ...' * (len(values) > 5)} {'is' if len(values) == 1 else 'are'} {change}"
        for change, values in changes.items()
        if values
    ]
    return f"{name} ({len(old)} were, {len(new)} are{''.join(f'; {each}' for each in found)})"
