"""The training loop: epochs, steps, accumulation, averaged weights, saving, resuming. It knows no task."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.utils import dispatch_clip_grad, distribute_bn, random_seed
from torch import nn

from vrwkv.runtime import checkpoint, sharding
from vrwkv.runtime.errors import Interrupted, UserError
from vrwkv.runtime.processes import World, autocast, join_world
from vrwkv.runtime.progress import Progress, clock, say, text_of
from vrwkv.runtime.recipe import RunConfig, WatchConfig
from vrwkv.runtime.run_folder import RunFolder
from vrwkv.runtime.sampling import Draw, seed_all
from vrwkv.runtime.signals import StopSignals
from vrwkv.runtime.state import TrainingState
from vrwkv.runtime.task import StepResult, Task
from vrwkv.runtime.watch import Scalars

C = TypeVar("C", bound=RunConfig)

GO_ON, SAVE, STOP, FAIL = range(4)
"""What a process wishes after an update or an evaluation; the strongest wish of all is followed."""
ESTIMATE_AFTER = 100  # steps
WATCH_EVERY = 50  # updates


def run(make_task: Callable[[C, World], Task], config: C, resume: str | None = None, overwrite: bool = False) -> Path:
    """Trains until `config.epochs` epochs are done.

    The newest `last.pth` in the output folder holds a state between two updates; whatever ends the process, resuming
    goes on from there and gives what an unbroken run gives.

    Args:
        make_task: Builds the task; random numbers are seeded before.
        config: What to train, on what, and how.
        resume: None starts anew, "auto" goes on from the output folder's last.pth if there is one, or a checkpoint.
        overwrite: Replace the files of another run in the output folder.

    Returns:
        The path of the best checkpoint.

    Raises:
        UserError: anything that does not fit, found before training starts where possible.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came; the state of that moment is saved.
    """
    with StopSignals() as signals, join_world(config.device) as world:
        random_seed(config.seed)  # the same initial weights in each process
        trainer = Trainer(make_task(config, world), config, world, signals)
        with trainer.folder.locked() if world.primary else contextlib.nullcontext():
            trainer.start(resume, overwrite)
            try:
                with signals.deferred():
                    trainer.train()
            finally:
                trainer.scalars.close()
        return trainer.folder.best


class Trainer:
    """A run's parts, and what is done with them."""

    def __init__(self, task: Task, config: RunConfig, world: World, signals: StopSignals) -> None:
        self.task, self.config, self.world, self.signals = task, config, world, signals
        self.folder = RunFolder(Path(config.output))
        self.state = TrainingState(task, config, world)
        self._saved = time.monotonic()
        self._steps_here, self._begin = 0, 0.0  # of this process, of which the first warms up
        Scalars.check(config)

    def start(self, resume: str | None, overwrite: bool) -> None:
        """Takes up an earlier run's state where asked to, makes the processes' models equal, and writes last.pth."""
        path, content, damaged = self._find(resume, overwrite)
        if path:
            self._restore(content, path)
        is_new = not path or path.resolve() not in map(Path.resolve, self.folder.states())
        replicates = self.world.distributed and not self.config.fsdp
        distribute = nn.parallel.DistributedDataParallel if replicates else lambda model: model
        self.distributed_model: Any = distribute(self.task.model)
        meters = self.state.meters.gather()
        if self.state.steps_left > 0:
            if self.world.primary:
                self.folder.prepare(self.state.epoch if path and self.folder.owns(path) else None, damaged)
                self.folder.write_config(self.config)
            if is_new:
                self._save(meters)
            if self.world.primary:
                say(self._description())
        watched = self.config if self.world.primary else self.config.model_copy(update={"watch": WatchConfig()})
        self.scalars = Scalars(watched, self.state.updates)

    def _find(self, resume: str | None, overwrite: bool) -> tuple[Path | None, Mapping[str, Any], list[Path]]:
        """The checkpoint to go on from, what is in it, and newer ones that cannot be read. All processes wait for each
        other, so that none looks for a last.pth that the first then writes."""
        path, content, damaged = Path(resume) if resume else None, dict[str, Any](), list[Path]()
        problem = None
        try:
            if resume == "auto":
                path, content, damaged = self.folder.read_newest()
            elif path:
                content = checkpoint.read(path)
            if not overwrite:
                self.folder.check_free(path, damaged)
            found = f"epoch {content.get('epoch')}, step {content.get('step')}" if path else "nothing"
        except UserError as error:
            problem, found = error, str(error)
        self.world.check_same(
            found, "processes found different states to start from; output must be a folder that all of them share"
        )
        if problem:
            raise problem
        if resume == "auto" and not path and self.world.primary:
            say(f"no {self.folder.last} to resume from: starting anew")
        return path, content, damaged

    def _description(self) -> str:
        parameters = sum(each.numel() for each in self.task.model.parameters()) / 1e6
        lr = max(group["initial_lr"] for group in self.state.optimizer.param_groups)
        gmac = f", {self.task.gmac:.2f} GMAC" if self.task.gmac else ""
        return f"{self.state.update_size} images per update, lr {lr:g}, {parameters:.2f} M parameters{gmac}"

    def _restore(self, content: Mapping[str, Any], path: Path) -> None:
        state = self.state
        state.restore(content, path)
        if not (self.folder.owns(path) and self.folder.best.exists()):  # elsewhere, the best is yet to come
            state.best = None
            if state.steps_left <= 0:
                raise UserError(f"checkpoint {path} has done {state.epoch} epochs, which is all that epochs asks for")
        if self.world.primary:
            within = f" and {state.step} of {state.steps_per_epoch} steps" if state.step else ""
            say(f"resuming from {path} after epoch {state.epoch}{within}")

    def train(self) -> None:
        """Trains the epochs that are left; after each, the primary process writes all files."""
        state, begin, first = self.state, time.monotonic(), self.state.steps_left
        while state.epoch < self.config.epochs:
            speed = self._train_epoch()
            if self.world.distributed:
                distribute_bn(self.task.model, self.world.size, reduce=True)
            meters = state.meters.gather()
            trained = state.meters.values(meters)
            self._check_finite(trained["loss"])
            evaluated = self._evaluate(meters)
            state.next_epoch()
            if self.world.primary:
                left = (time.monotonic() - begin) / max(1, first - state.steps_left) * state.steps_left
                say(
                    f"epoch {state.epoch}/{self.config.epochs}: training {text_of(self.task.measures, trained)}; "
                    f"validation {text_of(self.task.measures, evaluated)}; {speed:.0f} images/s, {clock(left)} left"
                )
            self._write(trained, evaluated)

    def _train_epoch(self) -> float:
        """Trains what is left of an epoch, and returns the images per second of all processes."""
        state, accumulate = self.state, self.config.optim.accumulate
        self.task.train_loader.batch_sampler.start(state.epoch, state.step)
        self.distributed_model.train()
        state.scheduler.step_update(state.updates)
        title, size = f"epoch {state.epoch + 1}/{self.config.epochs}", self.task.train_loader.batch_sampler.batch_size
        with Progress(title, state.steps_per_epoch, size, self.world, state.step) as progress:
            batches = itertools.islice(self.task.train_loader, state.steps_per_epoch - state.step)
            for batch in progress.waiting(batches):
                seed_all(self.config.seed, Draw.STEP, state.epoch, state.step, self.world.rank)
                completes_update = (state.step + 1) % accumulate == 0
                result = self._add_gradients(batch, completes_update)
                state.step += 1
                state.meters.update({**result.sums, "loss": result.loss * result.samples}, result.samples)
                progress.step(state.meters)
                self._estimate()
                if completes_update:
                    self._update()
                    self._watch()
                    self._save_or_stop()
            return progress.images_per_second

    def _estimate(self) -> None:
        """Says how long all will take, at the speed of the first hundred steps."""
        self._steps_here += 1
        if self._steps_here == 1:
            self._begin = time.monotonic()
        elif self._steps_here == ESTIMATE_AFTER and self.world.primary:
            seconds = (time.monotonic() - self._begin) / (ESTIMATE_AFTER - 1)
            total = seconds * self.state.steps_per_epoch * self.config.epochs
            left = seconds * self.state.steps_left
            say(f"{seconds:.3g} s per step: {clock(total)} for the whole run, {clock(left)} left")

    def _add_gradients(self, batch: Any, completes_update: bool) -> StepResult:
        """One step; the processes share their gradients in the step that completes an update."""
        with contextlib.nullcontext() if completes_update else self._alone():
            with autocast(self.world, self.config.amp):
                result = self.task.training_step(self.distributed_model, batch)
            self.state.scaler.scale(result.loss / self.config.optim.accumulate).backward()
        return result

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Within it, gradients are not shared."""
        if self.config.fsdp:
            return sharding.no_sync(self.task.model)
        return self.distributed_model.no_sync() if self.world.distributed else contextlib.nullcontext()

    def _update(self) -> None:
        """Changes the weights by the gradients."""
        state = self.state
        if self.config.optim.clip_grad:
            state.scaler.unscale_(state.optimizer)
            dispatch_clip_grad(self.task.model.parameters(), self.config.optim.clip_grad)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        state.scheduler.step_update(state.updates)
        if state.ema:
            state.ema.update(self.task.model, state.updates)

    def _watch(self) -> None:
        if self.scalars and self.state.updates % WATCH_EVERY == 0:
            now = {f"train_{name}": value for name, value in self.state.meters.values().items()}
            self.scalars.add(now | {"lr": self._lr}, self.state.updates)

    def _save_or_stop(self) -> None:
        """After an update: saves when it is time to, or where a process got a signal, which ends all of them."""
        minutes = self.config.save.minutes
        is_due = self.world.primary and minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        agreed = self.world.agree(STOP if self.signals.received else SAVE if is_due else GO_ON)
        if agreed == GO_ON:
            return
        meters = self.state.meters.gather()
        self._check_finite(self.state.meters.values(meters)["loss"])
        self._save(meters)
        if agreed == STOP:
            raise self._interrupted()

    def _evaluate(self, meters: torch.Tensor) -> dict[str, float]:
        """Of the weights that are to be used. A signal ends it, or a file that cannot be read: the processes agree
        before they share what they measured, and what was trained before is saved. With sharded weights a signal waits:
        to save, and to compute, the processes must be at the same place."""
        model = self.state.ema.module if self.state.ema else self.task.model
        wish, failure = GO_ON, UserError("another process could not evaluate, and says why")
        try:
            with self.signals.deferred(self.config.fsdp):
                measured = self.task.evaluate(model)
        except Interrupted:
            wish = STOP
        except UserError as error:
            if self.config.fsdp:
                raise
            wish, failure = FAIL, error
        agreed = self.world.agree(wish)
        if agreed == GO_ON:
            return measured.values(measured.gather())
        self._save(meters)
        raise failure if agreed == FAIL else self._interrupted()

    def _interrupted(self) -> Interrupted:
        state, received = self.state, self.signals.received or "signal to another process"
        return Interrupted(
            f"{received}: saved after {state.step} of {state.steps_per_epoch} steps of epoch {state.epoch + 1}"
        )

    def _check_finite(self, loss: float) -> None:
        if not self.state.is_finite(loss):
            what = "weights became infinite" if math.isfinite(loss) else f"the loss became {loss}"
            raise UserError(
                f"{what} in epoch {self.state.epoch + 1}: try a lower optim.lr, or optim.clip_grad, with --resume; "
                f"{self.folder.last} holds the last state before"
            )

    def _save(self, meters: torch.Tensor) -> None:
        content = self.state.content(meters, {})
        if self.world.primary:
            self._save_last(content)

    def _save_last(self, content: dict[str, Any]) -> None:
        checkpoint.save(content, self.folder.last, self.config.save.keep)
        self._saved = time.monotonic()

    @property
    def _lr(self) -> float:
        return max(group["lr"] for group in self.state.optimizer.param_groups)

    def _write(self, trained: Mapping[str, float], evaluated: Mapping[str, float]) -> None:
        state, judge = self.state, self.task.judge
        metrics = {each.name: evaluated[each.name] for each in self.task.measures}
        content = state.content(torch.zeros(self.world.size, len(metrics) + 1), metrics)
        if not self.world.primary:
            return
        self.folder.log(state.epoch, trained, evaluated, self._lr, self.task.measures)
        self.scalars.add({f"eval_{name}": value for name, value in evaluated.items()}, state.updates)
        value = metrics[judge.name]
        if state.best is None or (value >= state.best if judge.higher_is_better else value <= state.best):
            state.best = content["best_metric"] = value if math.isfinite(value) else None
            checkpoint.save(content, self.folder.best)
        self._save_last(content)  # last: until here, resuming repeats the evaluation
