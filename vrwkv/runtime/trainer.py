"""The training loop: epochs, steps, accumulation, averaged weights, checkpoints, resuming. It knows no task."""

import contextlib
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import Field
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn, random_seed
from torch import Tensor, nn

from vrwkv.runtime import checkpoint
from vrwkv.runtime.config import Section, check, differences
from vrwkv.runtime.errors import UserError, first_line
from vrwkv.runtime.processes import World, autocast, join_world
from vrwkv.runtime.progress import Measure, Meters, Progress, clock, say, text_of
from vrwkv.runtime.recipe import RunConfig, create_optimizer
from vrwkv.runtime.run_folder import RunFolder

C = TypeVar("C", bound=RunConfig)


class StepResult(NamedTuple):
    """What a model makes of a batch."""

    loss: Tensor  # mean over the samples, a scalar
    sums: Mapping[str, Tensor]  # over the samples, for each of the task's measures but the loss
    samples: int


class Task(ABC):
    """What is trained, to be told to the loop."""

    measures: Sequence[Measure]
    """One of them is named loss: the mean of what `training_step` returns."""
    judge: Measure
    """The measure of `evaluate` that says which weights are the best."""
    model: nn.Module
    """On the device, at its initial weights."""
    train_loader: Any
    """Batches of one size; has `len`, and a `sampler` with `set_epoch` where there are several processes."""
    batch_size: int
    """Samples of a batch."""

    @abstractmethod
    def training_step(self, model: nn.Module, batch: Any) -> StepResult:
        """The loss of a batch, with gradients. `model` is the task's, perhaps inside DistributedDataParallel."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """All measures by name, and what else is to stand in summary.csv. All processes call it together."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state of the training: all that is needed to use the model. A run that is
        resumed must have the same."""


def run(make_task: Callable[[C, World], Task], config: C, resume: str | None = None, overwrite: bool = False) -> Path:
    """Trains until `config.epochs` epochs are done.

    `last.pth` in the output folder always holds the state at the start of the running epoch, so that whatever ends
    the process, resuming repeats that epoch from its start and gives what an unbroken run gives.

    Args:
        make_task: Builds the task; random numbers are seeded before.
        config: What to train, on what, and how.
        resume: None starts anew, "auto" goes on from the output folder's last.pth if there is one, or a checkpoint.
        overwrite: Replace the files of another run in the output folder.

    Returns:
        The path of the best checkpoint.

    Raises:
        UserError: anything that does not fit, found before training starts where possible.
    """
    with join_world(config.device) as world:
        random_seed(config.seed)  # the same initial weights in each process
        trainer = Trainer(make_task(config, world), config, world)
        with trainer.folder.locked() if world.primary else contextlib.nullcontext():
            trainer.start(resume, overwrite)
            trainer.train()
        return trainer.folder.best


class _SavedState(Section, extra="ignore"):
    """What a checkpoint that can be resumed from holds for the loop."""

    config: dict[str, Any]
    processes: int
    epoch: Annotated[int, Field(ge=0)]
    best_metric: float | None
    state_dict: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]


class Trainer:
    """A run's parts and state."""

    def __init__(self, task: Task, config: RunConfig, world: World) -> None:
        self.task, self.config, self.world = task, config, world
        self.folder = RunFolder(Path(config.output))
        self.epoch = 0  # epochs done
        self.best: float | None = None  # value of the task's judge
        self.updates_per_epoch = len(task.train_loader) // config.optim.accumulate
        update_size = task.batch_size * config.optim.accumulate * world.size
        if not self.updates_per_epoch:
            given = len(task.train_loader) * task.batch_size * world.size
            raise UserError(f"the training data fill batches of {given} samples; one update needs {update_size}")
        self.optimizer, self.scheduler = create_optimizer(task.model, config, update_size, self.updates_per_epoch)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "float16")
        decay = config.optim.ema_decay
        self.ema = ModelEmaV3(task.model, decay, use_warmup=True) if decay else None

    def start(self, resume: str | None, overwrite: bool = False) -> None:
        """Takes up an earlier run's state where asked to, makes the processes' models equal, and writes last.pth."""
        path = self.folder.last if resume == "auto" else Path(resume) if resume else None
        if resume == "auto" and not self.folder.last.is_file():
            path = None
            if self.world.primary:
                say(f"no {self.folder.last} to resume from: starting anew")
        if not overwrite:
            self.folder.check_free(path)
        if path:
            self._restore(path)
        # Waits for all processes, so that none looks for a last.pth that the first writes below.
        distribute = nn.parallel.DistributedDataParallel if self.world.distributed else lambda model: model
        self.distributed_model: Any = distribute(self.task.model)
        if self.world.primary and self.epoch < self.config.epochs:
            self.folder.prepare(self.epoch if path and self.folder.owns(path) else 0)
            checkpoint.save(self.state({}), self.folder.last)

    def state(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """What a checkpoint holds. The scheduler is a function of the number of updates and needs no state."""
        return {
            **self.task.content(),
            "config": self.config.model_dump(),
            "processes": self.world.size,
            "epoch": self.epoch,
            "metrics": metrics,
            "best_metric": self.best,
            "state_dict": self.task.model.state_dict(),
            **({"state_dict_ema": self.ema.module.state_dict()} if self.ema else {}),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def _restore(self, path: Path) -> None:
        try:
            content = checkpoint.read(path)
        except UserError as error:
            if path != self.folder.last or not self.folder.best.is_file():
                raise
            raise UserError(f"{error}; to go on from the best: --resume {self.folder.best} --overwrite") from error
        if "optimizer" not in content:
            raise UserError(f"checkpoint {path} has no training state; model.checkpoint starts from its weights")
        saved = check(_SavedState, content, f"checkpoint {path}: entry")
        self._check_same_run(saved, content, path)
        checkpoint.load(self.task.model, {"state_dict": content["state_dict"]}, path)
        if self.ema:
            checkpoint.load(self.ema.module, {"state_dict": content.get("state_dict_ema", {})}, path)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
        except Exception as error:  # they trust what they are given
            raise UserError(f"checkpoint {path} has no state of this optimizer: {first_line(error)}") from error
        self.epoch = saved.epoch
        if self.folder.owns(path) and self.folder.best.exists():  # elsewhere, the best is yet to come
            self.best = saved.best_metric
        elif self.epoch >= self.config.epochs:
            raise UserError(f"checkpoint {path} has done {self.epoch} epochs, which is all that epochs asks for")
        if self.world.primary:
            say(f"resuming from {path} after epoch {self.epoch}")

    def _check_same_run(self, saved: "_SavedState", content: Mapping[str, Any], path: Path) -> None:
        """What makes the numbers may not differ; where and for how long they are made may."""
        changed = differences(check(type(self.config), saved.config, f"checkpoint {path}: config key"), self.config)
        changed += [name for name, value in self.task.content().items() if content.get(name) != value]
        if saved.processes != self.world.size:
            changed.append(f"the number of processes was {saved.processes}, is {self.world.size}")
        if changed:
            raise UserError(f"checkpoint {path} is of another run: " + "; ".join(changed))

    def train(self) -> None:
        """Trains the epochs that are left; after each, the primary process writes all files."""
        begin, first = time.monotonic(), self.epoch
        while self.epoch < self.config.epochs:
            trained = self._train_epoch()
            if not math.isfinite(trained["loss"]):
                raise UserError(
                    f"the loss became {trained['loss']} in epoch {self.epoch + 1}: try a lower optim.lr, or "
                    f"optim.clip_grad; {self.folder.last} holds the state before this epoch"
                )
            # The weights to be used are the ones to judge.
            evaluated = self.task.evaluate(self.ema.module if self.ema else self.task.model)
            self.epoch += 1
            if self.world.primary:
                left = (time.monotonic() - begin) / (self.epoch - first) * (self.config.epochs - self.epoch)
                say(
                    f"epoch {self.epoch}/{self.config.epochs}: training {text_of(self.task.measures, trained)}; "
                    f"validation {text_of(self.task.measures, evaluated)}; "
                    f"{trained['images_per_second']:.0f} images/s, {clock(left)} left"
                )
                self._write(trained, evaluated)

    def _write(self, trained: dict[str, float], evaluated: dict[str, float]) -> None:
        self.folder.log(self.epoch, trained, evaluated, self.optimizer.param_groups[0]["lr"], self.task.measures)
        # Without the speed, so that a rerun gives the same file.
        metrics = {each.name: evaluated[each.name] for each in self.task.measures}
        value, higher = metrics[self.task.judge.name], self.task.judge.higher_is_better
        is_best = self.best is None or (value >= self.best if higher else value <= self.best)
        if is_best:
            self.best = value
            checkpoint.save(self.state(metrics), self.folder.best)
        checkpoint.save(self.state(metrics), self.folder.last)  # last: until here, resuming repeats the epoch

    def _train_epoch(self) -> dict[str, float]:
        accumulate, loader = self.config.optim.accumulate, self.task.train_loader
        steps, updates = self.updates_per_epoch * accumulate, self.epoch * self.updates_per_epoch
        random_seed(self.config.seed + self.epoch * self.world.size, self.world.rank)
        if self.world.distributed:
            loader.sampler.set_epoch(self.epoch)
        self.distributed_model.train()
        self.scheduler.step_update(updates)
        meters = Meters(self.task.measures, self.world)
        title = f"epoch {self.epoch + 1}/{self.config.epochs}"
        with Progress(title, steps, self.task.batch_size, self.world) as progress:
            for step, batch in itertools.islice(enumerate(loader, 1), steps):
                completes_update = step % accumulate == 0
                result = self._add_gradients(batch, completes_update)
                if completes_update:
                    updates += 1
                    self._update(updates)
                meters.update({**result.sums, "loss": result.loss * result.samples}, result.samples)
                progress.step(meters)
            speed = progress.images_per_second
        if self.world.distributed:
            distribute_bn(self.task.model, self.world.size, reduce=True)
        meters.reduce()
        return {**meters.values(), "images_per_second": speed}

    def _add_gradients(self, batch: Any, completes_update: bool) -> StepResult:
        """One step; the processes share their gradients in the step that completes an update."""
        alone = self.world.distributed and not completes_update
        with self.distributed_model.no_sync() if alone else contextlib.nullcontext():
            with autocast(self.world, self.config.amp):
                result = self.task.training_step(self.distributed_model, batch)
            self.scaler.scale(result.loss / self.config.optim.accumulate).backward()
        return result

    def _update(self, updates: int) -> None:
        """Changes the weights by the gradients, as the `updates`-th time of the run."""
        if self.config.optim.clip_grad:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.task.model.parameters(), self.config.optim.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step_update(updates)
        if self.ema:
            self.ema.update(self.task.model, updates)
