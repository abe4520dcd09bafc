"""Masked pre-training as a task of the training loop."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vrwkv.classification.config import AugmentConfig, PictureConfig
from vrwkv.classification.data import (
    create_eval_loader,
    create_train_loader,
    describe_data,
    find_pictures,
    without_padding,
)
from vrwkv.classification.model import create_model, data_config_of, memory_format, recompute_blocks, try_model
from vrwkv.models import VisionRWKVBase
from vrwkv.pretraining.config import PretrainingConfig
from vrwkv.pretraining.masked_autoencoder import MaskedAutoencoder
from vrwkv.runtime import trainer
from vrwkv.runtime.errors import UserError
from vrwkv.runtime.processes import World, autocast
from vrwkv.runtime.progress import Measure, Meters, Progress, say
from vrwkv.runtime.task import StepResult, Task


def pretrain(config: PretrainingConfig, resume: str | None = None, overwrite: bool = False) -> Path:
    """Trains a masked autoencoder: `vrwkv.runtime.trainer.run`, which see.

    A classifier's `model.checkpoint` takes the files that this writes: of them, the backbone.
    """
    return trainer.run(PretrainingTask, config, resume, overwrite)


class PretrainingTask(Task):
    """A masked autoencoder of one of our models, and an image folder of which the classes do not matter."""

    measures = (Measure("loss", "loss"),)
    judge = measures[0]
    model: MaskedAutoencoder

    def __init__(self, config: PretrainingConfig, world: World) -> None:
        self.config, self.world = config, world
        train, val = (
            find_pictures(config.data.root, split) for split in (config.data.train_split, config.data.val_split)
        )
        picture = config.data.model_dump(include=set(PictureConfig.model_fields))
        self._create_model(picture)
        augment = AugmentConfig(**config.augment.model_dump(), color_jitter=0.0)
        names = sorted({*train.pictures, *val.pictures})
        self.train_loader = create_train_loader(
            train, names, self.data_config, config.data, augment, config.seed, world
        )
        self.val_loader = create_eval_loader(val, names, self.data_config, config.data, world)
        if world.primary:
            say(f"{train.describe()}; {val.describe()}")
        try_model(self.model, self.data_config["input_size"], f"{config.model.name} cannot be pre-trained on")
        if config.model.compile:
            self.model.compile()

    def _create_model(self, picture: dict[str, Any]) -> None:
        model, decoder = self.config.model, self.config.decoder
        if "num_classes" in model.args:
            raise UserError("model.args.num_classes is for classifiers: leave it out")
        self.model_args = {"img_size": picture["img_size"]} if picture["img_size"] else {}
        self.model_args |= model.args
        backbone = create_model(model.name, {**self.model_args, "num_classes": 0})
        if not isinstance(backbone, VisionRWKVBase):
            raise UserError(
                f"model.name must be a model of vrwkv, which can leave out masked patches, not {model.name}"
            )
        recompute_blocks(backbone, model.grad_checkpointing)
        self.data_config = data_config_of(backbone, self.model_args, picture)
        try:
            self.model = MaskedAutoencoder(backbone, decoder.dim, decoder.depth, self.config.mask_ratio)
        except ValueError as error:
            raise UserError(f"model {model.name} cannot be pre-trained: {error}") from error
        self.memory_format = memory_format(model.channels_last)
        self.model.to(self.world.device, memory_format=self.memory_format)  # type: ignore[call-overload] # of its docs

    def training_step(self, model: nn.Module, batch: Any) -> StepResult:
        """The loss of pictures (B, C, H, W), whatever their classes."""
        images, _ = batch
        loss = model(images.to(memory_format=self.memory_format)).loss.mean()
        return StepResult(loss, {}, len(images))

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> Meters:
        """The loss of this process's share of the validation pictures, under masks that are the same each time."""
        model.eval()
        generator = torch.Generator(self.world.device).manual_seed(self.config.seed)
        meters = Meters(self.measures, self.world)
        with Progress("val", len(self.val_loader), self.config.data.batch_size, self.world) as progress:
            for images, _, count in without_padding(self.val_loader, self.world):
                with autocast(self.world, self.config.amp):
                    loss = model(images, generator).loss[:count]
                meters.update({"loss": loss.sum()}, count)
                progress.step(meters)
        return meters

    def data(self) -> dict[str, str]:
        """The pictures of both splits."""
        return describe_data(self.train_loader, self.val_loader)

    def content(self) -> dict[str, Any]:
        """What builds the autoencoder anew, see `load_autoencoder`."""
        return {
            "arch": self.config.model.name,
            "model_args": self.model_args,
            "decoder": self.config.decoder.model_dump(),
            "mask_ratio": self.config.mask_ratio,
            "data_config": self.data_config,
        }
