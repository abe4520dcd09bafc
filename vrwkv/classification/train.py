"""Training, from a configuration to best.pth."""

import contextlib
import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn, random_seed, trim_summary, update_summary
from torch import nn

from vrwkv.classification.config import Config
from vrwkv.classification.data import create_eval_loader, create_train_loader, find_classes, split_folder
from vrwkv.classification.evaluate import autocast, evaluate
from vrwkv.classification.model import create_model, data_config_of
from vrwkv.classification.recipe import create_loss, create_optimizer
from vrwkv.runtime import checkpoint
from vrwkv.runtime.errors import UserError
from vrwkv.runtime.processes import World, join_world
from vrwkv.runtime.progress import Meters, Progress, clock, draw_curves, say


def train(config: Config, resume: str | None = None) -> Path:
    """Trains until `config.epochs` epochs are done.

    `last.pth` in the output folder always holds the state at the start of the running epoch, so that whatever ends
    the process, resuming repeats that epoch from its start and gives what an unbroken run gives.

    Args:
        config: What to train, on what, and how.
        resume: None starts anew, "auto" goes on from the output folder's last.pth if there is one, or a checkpoint.

    Returns:
        The path of the best checkpoint.

    Raises:
        UserError: anything that does not fit, found before training starts where possible.
    """
    with join_world(config.device) as world:
        trainer = Trainer(config, world)
        trainer.start(resume)
        trainer.run()
        return trainer.best_path


class Trainer:
    """A run's parts and state, built from its configuration."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.output = Path(config.output)
        self.last_path, self.best_path = self.output / "last.pth", self.output / "best.pth"
        self.epoch = 0  # epochs done
        self.best_metric = -math.inf

        random_seed(config.seed)  # the same initial weights in each process
        self.class_names = find_classes(split_folder(config.data.root, config.data.train_split))
        self.model_args = {**config.model.args, "num_classes": self._num_classes()}
        self.model = create_model(config.model.name, self.model_args, config.model.pretrained)
        if path := config.model.checkpoint:
            checkpoint.load(self.model, checkpoint.read(path), path, new_head=True)
        if config.model.grad_checkpointing:
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        self.model.to(world.device)
        self._create_loaders()
        self.mixup, self.loss = create_loss(config.augment, len(self.class_names))
        self.optimizer, self.scheduler = create_optimizer(
            self.model, config, self._batch_size(), self.updates_per_epoch
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "float16")
        self.ema = ModelEmaV3(self.model, config.optim.ema_decay, use_warmup=True) if config.optim.ema_decay else None

    def _num_classes(self) -> int:
        folders = len(self.class_names)
        wanted = self.config.model.args.get("num_classes", folders)
        if wanted != folders:
            raise UserError(f"model.args.num_classes is {wanted}, {self.config.data.root} has {folders} class folders")
        return folders

    def _batch_size(self) -> int:
        return self.config.data.batch_size * self.config.optim.accumulate * self.world.size

    def _create_loaders(self) -> None:
        data, world = self.config.data, self.world
        overrides = {key: getattr(data, key) for key in ("img_size", "interpolation", "crop_pct", "mean", "std")}
        self.data_config = data_config_of(self.model, self.model_args, overrides)
        self.train_loader = create_train_loader(data, self.config.augment, self.class_names, self.data_config, world)
        val_folder = split_folder(data.root, data.val_split)
        self.val_loader = create_eval_loader(
            val_folder, self.class_names, self.data_config, data.batch_size, data.workers, world
        )
        self.updates_per_epoch = len(self.train_loader) // self.config.optim.accumulate
        if not self.updates_per_epoch:
            pictures = len(self.train_loader.dataset)
            raise UserError(f"{pictures} training pictures are less than the {self._batch_size()} of one update")

    def start(self, resume: str | None) -> None:
        """Takes up an earlier run's state where asked to, makes the processes' models equal, and writes last.pth."""
        if resume == "auto":
            path = self.last_path if self.last_path.is_file() else None
            if path is None and self.world.primary:
                say(f"no {self.last_path} to resume from: starting anew")
        else:
            path = Path(resume) if resume else None
            if path is None and self.last_path.exists():
                raise UserError(f"{self.last_path} holds an earlier run: add --resume, or set another output")
        if path:
            self._restore(path)
        forward = torch.compile(self.model) if self.config.model.compile else self.model
        # Wrapping waits for all processes, so that none looks for a last.pth that the first writes below.
        self.forward: Any = nn.parallel.DistributedDataParallel(forward) if self.world.distributed else forward
        if self.world.primary and self.epoch < self.config.epochs:
            try:
                self.output.mkdir(parents=True, exist_ok=True)
                trim_summary(self.output / "summary.csv", self.epoch + 1)
            except OSError as error:
                raise UserError(f"cannot write to output {self.output}: {error.strerror}") from error
            checkpoint.save(self.state({}), self.last_path)

    def state(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What a checkpoint holds. The scheduler is a function of the number of updates and needs no state."""
        return {
            "arch": self.config.model.name,
            "model_args": self.model_args,
            "class_names": self.class_names,
            "data_config": self.data_config,
            "config": dataclasses.asdict(self.config),
            "epoch": self.epoch,
            "metrics": metrics,
            "best_metric": self.best_metric,
            "state_dict": self.model.state_dict(),
            **({"state_dict_ema": self.ema.module.state_dict()} if self.ema else {}),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def _restore(self, path: Path) -> None:
        content = checkpoint.read(path)
        if "optimizer" not in content:
            raise UserError(f"checkpoint {path} has no training state; model.checkpoint starts from its weights")
        if content["class_names"] != self.class_names:
            raise UserError(f"checkpoint {path} was trained on other classes than {self.config.data.root} has")
        if content["arch"] != self.config.model.name:
            raise UserError(f"checkpoint {path} holds {content['arch']}, not {self.config.model.name}")
        checkpoint.load(self.model, {"state_dict": content["state_dict"]}, path)
        if self.ema:
            checkpoint.load(self.ema.module, content, path)
        if (name := content["config"]["optim"]["name"]) != self.config.optim.name:
            raise UserError(f"checkpoint {path} holds the state of optimizer {name}, not {self.config.optim.name}")
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.epoch = content["epoch"]
        if self.best_path.exists():  # in another output folder, the best is yet to come
            self.best_metric = content["best_metric"]
        if self.world.primary:
            say(f"resuming from {path} after epoch {self.epoch}")

    def run(self) -> None:
        """Trains the epochs that are left; after each, the primary process writes all files."""
        begin, first = time.monotonic(), self.epoch
        while self.epoch < self.config.epochs:
            trained = self._train_epoch()
            if not math.isfinite(trained["loss"]):
                raise UserError(
                    f"the loss became {trained['loss']} in epoch {self.epoch + 1}: try a lower optim.lr, or "
                    f"optim.clip_grad; {self.last_path} holds the state before this epoch"
                )
            model = self.ema.module if self.ema else self.model  # the weights to be used are the ones to judge
            metrics = evaluate(model, self.val_loader, self.world, self.config.amp)
            self.epoch += 1
            if self.world.primary:
                left = (time.monotonic() - begin) / (self.epoch - first) * (self.config.epochs - self.epoch)
                say(
                    f"epoch {self.epoch}/{self.config.epochs}: "
                    f"training loss {trained['loss']:.4f}, accuracy {trained['top1']:.2f} %; "
                    f"validation loss {metrics['loss']:.4f}, accuracy {metrics['top1']:.2f} %; "
                    f"{trained['images_per_second']:.0f} images/s, {clock(left)} left"
                )
                self._write(trained, metrics)

    def _write(self, trained: dict[str, float], metrics: dict[str, float]) -> None:
        summary = self.output / "summary.csv"
        try:
            update_summary(self.epoch, trained, metrics, summary, lr=self.optimizer.param_groups[0]["lr"])
            draw_curves(summary, self.output / "curves.png")
        except OSError as error:
            raise UserError(f"cannot write to output {self.output}: {error.strerror}") from error
        metrics = {key: metrics[key] for key in ("loss", "top1", "top5")}  # not the speed: a rerun gives the same file
        is_best = metrics["top1"] >= self.best_metric
        self.best_metric = max(self.best_metric, metrics["top1"])
        if is_best:
            checkpoint.save(self.state(metrics), self.best_path)
        checkpoint.save(self.state(metrics), self.last_path)  # last: until here, resuming repeats the epoch

    def _train_epoch(self) -> dict[str, float]:
        accumulate, clip_grad = self.config.optim.accumulate, self.config.optim.clip_grad
        batches = self.updates_per_epoch * accumulate
        updates = self.epoch * self.updates_per_epoch
        random_seed(self.config.seed + self.epoch * self.world.size, self.world.rank)
        if self.world.distributed:
            self.train_loader.sampler.set_epoch(self.epoch)
        self.forward.train()
        self.scheduler.step_update(updates)
        meters = Meters(self.world)
        title = f"epoch {self.epoch + 1}/{self.config.epochs}"
        with Progress(title, batches, self.config.data.batch_size, self.world) as progress:
            for step, (images, target) in itertools.islice(enumerate(self.train_loader, 1), batches):
                if self.mixup:
                    images, target = self.mixup(images, target)
                last = step % accumulate == 0
                wait = contextlib.nullcontext() if last or not self.world.distributed else self.forward.no_sync()
                with wait:
                    with autocast(self.world, self.config.amp):
                        logits = self.forward(images)
                        loss = self.loss(logits, target)
                    self.scaler.scale(loss / accumulate).backward()
                if last:
                    if clip_grad:
                        self.scaler.unscale_(self.optimizer)
                        dispatch_clip_grad(self.model.parameters(), clip_grad)
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                    self.optimizer.zero_grad()
                    updates += 1
                    self.scheduler.step_update(updates)
                    if self.ema:
                        self.ema.update(self.model, updates)
                meters.update(loss, logits, target)
                progress.step(meters)
            speed = progress.images_per_second
        if self.world.distributed:
            distribute_bn(self.model, self.world.size, reduce=True)
        meters.reduce()
        return {**meters.values(), "images_per_second": speed}
