"""Classification as a task of the training loop."""

from pathlib import Path
from typing import Any

from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from vrwkv.classification.config import AugmentConfig, Config, PictureConfig
from vrwkv.classification.data import ImageFolder, create_eval_loader, create_train_loader
from vrwkv.classification.evaluate import MEASURES, evaluate, right_answers
from vrwkv.classification.model import check_model, create_model, data_config_of
from vrwkv.runtime import checkpoint, trainer
from vrwkv.runtime.errors import UserError
from vrwkv.runtime.processes import World
from vrwkv.runtime.progress import say
from vrwkv.runtime.trainer import StepResult, Task


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
            ImageFolder(config.data.root, split) for split in (config.data.train_split, config.data.val_split)
        ]
        self.class_names = list(self.folders[0].pictures)
        self.model_args = {**config.model.args, "num_classes": self._num_classes()}
        self.model = create_model(config.model.name, self.model_args, config.model.pretrained)
        if path := config.model.checkpoint:
            checkpoint.load(self.model, checkpoint.read(path), path, new_head=True)
        if config.model.grad_checkpointing:
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        self.model.to(world.device)
        self._create_loaders()
        check_model(self.model, self.data_config["input_size"], len(self.class_names))
        self.mixup, self.loss = create_loss(config.augment, len(self.class_names))
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
        self.batch_size = data.batch_size
        train, val = self.folders
        rest = (self.class_names, self.data_config, data)
        self.train_loader = create_train_loader(train, *rest, self.config.augment, world)
        self.val_loader = create_eval_loader(val, *rest, world)
        if world.primary:
            say(f"{train.describe()}; {val.describe()}")

    def training_step(self, model: nn.Module, batch: Any) -> StepResult:
        """The loss of pictures (B, C, H, W) and their classes (B,), mixed where that is asked for."""
        images, target = self.mixup(*batch) if self.mixup else batch
        logits = model(images)
        classes = target.argmax(1) if target.ndim == 2 else target
        return StepResult(self.loss(logits, target), right_answers(logits, classes), len(images))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """See `vrwkv.classification.evaluate`."""
        return evaluate(model, self.val_loader, self.world, self.config.amp)

    def content(self) -> dict[str, Any]:
        """What `load_classifier` needs."""
        return {
            "arch": self.config.model.name,
            "model_args": self.model_args,
            "class_names": self.class_names,
            "data_config": self.data_config,
        }


def create_loss(augment: AugmentConfig, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """The mixing of a batch's pictures and targets, if any, and the loss for what comes out of it."""
    if not (augment.mixup or augment.cutmix):
        return None, LabelSmoothingCrossEntropy(augment.label_smoothing)
    mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing, num_classes=num_classes)
    return mixup, SoftTargetCrossEntropy()
