"""Classification as a task of the training loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vrwkv.classification.config import AugmentConfig, Config, PictureConfig
from vrwkv.classification.data import create_eval_loader, create_train_loader, describe_data, find_pictures
from vrwkv.classification.evaluate import MEASURES, evaluate, right_answers
from vrwkv.classification.model import check_model, create_model, data_config_of, memory_format, recompute_blocks
from vrwkv.runtime import checkpoint, trainer
from vrwkv.runtime.errors import UserError
from vrwkv.runtime.processes import World
from vrwkv.runtime.progress import Meters, say
from vrwkv.runtime.task import StepResult, Task


def train(config: Config, resume: str | None = None, overwrite: bool = False) -> Path:
    """Trains a classifier: `vrwkv.runtime.trainer.run`, which see."""
    return trainer.run(ClassificationTask, config, resume, overwrite)


class ClassificationTask(Task):
    """A timm model, an image folder, cross-entropy and accuracy."""

    measures = MEASURES
    judge = MEASURES[1]

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.folders = [
            find_pictures(config.data.root, split) for split in (config.data.train_split, config.data.val_split)
        ]
        self.class_names = list(self.folders[0].pictures)
        self.model_args = {**config.model.args, "num_classes": self._num_classes()}
        self.model = create_model(config.model.name, self.model_args, config.model.pretrained)
        if path := config.model.checkpoint:
            checkpoint.load(self.model, checkpoint.read(path), path, new_head=True)
        if config.model.head_only:
            self.model.requires_grad_(False)
            self.model.get_classifier().requires_grad_(True)  # type: ignore[operator] # every timm model has it
        recompute_blocks(self.model, config.model.grad_checkpointing)
        self.memory_format = memory_format(config.model.channels_last)
        self.model.to(world.device, memory_format=self.memory_format)  # type: ignore[call-overload] # of its docs
        self._create_loaders()
        self.gmac = check_model(self.model, self.data_config["input_size"], len(self.class_names))
        self.mixing, self.loss = create_mixing(config.augment, len(self.class_names), world)
        if config.model.compile:
            self.model.compile()

    def _num_classes(self) -> int:
        folders = len(self.class_names)
        wanted = self.config.model.args.get("num_classes", folders)
        if wanted != folders:
            raise UserError(f"model.args.num_classes is {wanted}, {self.config.data.root} has {folders} class folders")
        return folders

    def _create_loaders(self) -> None:
        data, world = self.config.data, self.world
        picture = data.model_dump(include=set(PictureConfig.model_fields))
        self.data_config = data_config_of(self.model, self.model_args, picture)
        train, val = self.folders
        rest = (self.class_names, self.data_config, data)
        self.train_loader = create_train_loader(train, *rest, self.config.augment, self.config.seed, world)
        self.val_loader = create_eval_loader(val, *rest, world)
        if world.primary:
            say(f"{train.describe()}; {val.describe()}")

    def training_step(self, model: nn.Module, batch: Any) -> StepResult:
        """The loss of pictures (B, C, H, W) and their classes (B,), erased and mixed where that is asked for."""
        if self.config.model.head_only:
            model.eval()
        images, target = self.mixing(*batch)
        logits = model(images.to(memory_format=self.memory_format))
        classes = target.argmax(1) if target.ndim == 2 else target
        return StepResult(self.loss(logits, target), right_answers(logits, classes), len(images))

    def evaluate(self, model: nn.Module) -> Meters:
        """See `vrwkv.classification.evaluate`."""
        return evaluate(model, self.val_loader, self.world, self.config.amp)

    def data(self) -> dict[str, str]:
        """The pictures of both splits."""
        return describe_data(self.train_loader, self.val_loader)

    def content(self) -> dict[str, Any]:
        """What `load_classifier` needs."""
        return {
            "arch": self.config.model.name,
            "model_args": self.model_args,
            "class_names": self.class_names,
            "data_config": self.data_config,
        }


Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Changes pictures (B, C, H, W), in place, and their classes (B,), which may become shares (B, classes)."""


def create_mixing(augment: AugmentConfig, num_classes: int, world: World) -> tuple[Mixing, nn.Module]:
    """What is done to whole batches, and the loss for what comes out of it."""
    erase = RandomErasing(augment.erase_prob, mode="pixel", device=world.device)
    if not (augment.mixup or augment.cutmix):
        return lambda images, target: (erase(images), target), LabelSmoothingCrossEntropy(augment.label_smoothing)
    mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing, num_classes=num_classes)
    return lambda images, target: mixup(erase(images), target), SoftTargetCrossEntropy()
