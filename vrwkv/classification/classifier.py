"""A trained classifier: loaded once, called often."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from PIL import Image
from pydantic import Field
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import nn

from vrwkv.classification.config import DataSettings, PictureConfig
from vrwkv.classification.model import check_model, create_model, data_config_of
from vrwkv.runtime import checkpoint
from vrwkv.runtime.config import Section, Text, check
from vrwkv.runtime.errors import UserError
from vrwkv.runtime.facts import DATA_CONFIG, Facts
from vrwkv.runtime.images import Packed, Picture, mode_of, open_image
from vrwkv.runtime.onnx_model import OnnxModel, is_onnx
from vrwkv.runtime.processes import Amp, World, autocast, choose_device

BATCH_SIZE = 32


class Prediction(NamedTuple):
    class_name: str  # as the class folder
    label: str  # ImageNet's words for it where it is one of theirs, class_name otherwise
    probability: float


class Classifier:
    """A model in evaluation mode with all that is needed to use it.

    Args:
        model: On its device.
        data_config: input_size (C, H, W), interpolation, mean, std, crop_pct, crop_mode.
        class_names: By output index, named as the class folders; None where unknown.
        data_root: The folder that it was trained on.
        val_split: The folder in it that validated the training.
        amp: Number format of the forward pass.
        arch: timm's name of the model, where it has one.
        model_args: Keywords of its constructor.

    Raises:
        UserError: the number of names is not that of the model's classes.
    """

    def __init__(
        self,
        model: nn.Module,
        data_config: dict[str, Any],
        class_names: list[str] | None = None,
        data_root: str | None = None,
        val_split: str = "val",
        amp: Amp = "none",
        arch: str | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.data_config, self.class_names = model.eval(), data_config, class_names
        self.data_root, self.val_split, self.amp = data_root, val_split, amp
        self.arch, self.model_args = arch, model_args or {}
        self.num_classes: int = model.num_classes  # type: ignore[assignment] # every timm model has it
        if class_names is not None and len(class_names) != self.num_classes:
            raise UserError(f"the model has {self.num_classes} classes, {len(class_names)} names are given")
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._mode = mode_of(data_config["input_size"][0])
        self._transform = create_transform(**data_config)
        self._names = class_names or [str(i) for i in range(self.num_classes)]
        info = _imagenet_info(self.num_classes)
        self._labels = info.label_descriptions() if info and info.label_names() == self._names else self._names

    def facts(self) -> Facts:
        """What a file of the exported model has to say."""
        settings = {key: self.data_config[key] for key in DATA_CONFIG}
        names = self.class_names
        return Facts("classification", **settings, class_names=names, arch=self.arch, model_args=self.model_args)

    def open(self, image: Picture) -> Any:
        """The picture (PIL) in the mode that the model is given.

        Raises:
            UserError: it cannot be read.
        """
        return open_image(image, self._mode)

    def prepare(self, image: Picture) -> torch.Tensor:
        """What the model is given for a picture: (C, H, W), as in validation.

        Raises:
            UserError: it cannot be read.
        """
        return self._transform(self.open(image))

    @overload  # a path is no sequence of pictures, though mypy takes it for a sequence of strings
    def predict(self, images: Picture, topk: int = 5) -> list[Prediction]: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, images: Sequence[Picture], topk: int = 5) -> list[list[Prediction]]: ...

    @torch.inference_mode()
    def predict(self, images: Any, topk: int = 5) -> Any:
        """What is in pictures.

        Args:
            images: A file or a picture of Pillow's, or a sequence of them.
            topk: How many classes to name.

        Returns:
            The likeliest classes, the first one first; a list of such lists for a sequence.

        Raises:
            UserError: a picture cannot be read, or `topk` is less than 1.
        """
        if topk < 1:
            raise UserError(f"topk must be at least 1, not {topk}")
        if isinstance(images, (str, os.PathLike, Image.Image, Packed)):
            return self.predict([images], topk)[0]
        found: list[list[Prediction]] = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = torch.stack([self.prepare(image) for image in images[start : start + BATCH_SIZE]])
            with autocast(World(self.device), self.amp):
                logits = self.model(batch.to(self.device))  # (B, classes)
            found += self.rank(logits, topk)
        return found

    def rank(self, logits: torch.Tensor, topk: int = 5) -> list[list[Prediction]]:
        """The likeliest classes by logits (B, classes), for each image the first one first."""
        top = logits.float().softmax(-1).topk(min(topk, self.num_classes))
        return [
            [Prediction(self._names[i], self._labels[i], p) for p, i in zip(values, indices, strict=True)]
            for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]


def predict_files(classifier: Classifier, paths: Sequence[str | Path], topk: int = 5) -> list[dict[str, Any]]:
    """`Classifier.predict` for files of which some may be bad, in a form for JSON.

    Returns:
        For each picture {"image": path, "predictions": [{"class", "label", "probability"}, ...]}, or {"image": path,
        "error": message} where it cannot be read.
    """
    results: list[dict[str, Any]] = [{"image": str(path)} for path in paths]
    for start in range(0, len(paths), BATCH_SIZE):
        opened = {}  # by place
        for place in range(start, min(start + BATCH_SIZE, len(paths))):
            try:
                opened[place] = classifier.open(paths[place])
            except UserError as error:
                results[place]["error"] = str(error)
        for place, found in zip(opened, classifier.predict(list(opened.values()), topk), strict=True):
            results[place]["predictions"] = [
                {"class": each.class_name, "label": each.label, "probability": each.probability} for each in found
            ]
    return results


class _DataKeys(Section, extra="ignore"):
    root: Text | None = None
    val_split: Text = "val"


class _Keys(Section, extra="ignore"):
    data: _DataKeys = _DataKeys()


class _Saved(Section, extra="ignore"):
    """What a checkpoint may say beside the weights; `tools/train.py` says all of it."""

    arch: Text | None = None
    model_args: dict[str, Any] = Field(default_factory=dict)
    class_names: list[Text] | None = None
    data_config: DataSettings | None = None
    config: _Keys = _Keys()


def load_classifier(
    checkpoint_path: str | Path | None = None,
    model_name: str | None = None,
    pretrained: bool = False,
    device: str | torch.device = "auto",
    amp: Amp = "none",
    **overrides: Any,
) -> Classifier:
    """A trained model: of `tools/train.py`, of `tools/export.py`, or from any timm model's name and weights.

    Args:
        checkpoint_path: Checkpoint, or an ONNX file of `tools/export.py`, whose `model` takes pictures and gives logits
            and has no layers. One that was not written here needs `model_name` as well.
        model_name: timm's name.
        pretrained: Take the published weights of `model_name`.
        device: Where the model is to run: a torch device, or "auto".
        amp: Number format of the forward pass.
        overrides: Keys of `PictureConfig`, such as img_size, that are to be other than the checkpoint's; None where
            they are not.

    Raises:
        UserError: no or bad checkpoint, unknown model, weights of another model.
    """
    if not (checkpoint_path or (model_name and pretrained)):
        raise UserError("required: --checkpoint PATH, or --model NAME with --pretrained")
    picture = check(PictureConfig, overrides, "option").model_dump(exclude_none=True)
    if checkpoint_path and is_onnx(checkpoint_path):
        return _load_onnx(checkpoint_path, model_name, str(device), amp, picture)
    content = checkpoint.read(checkpoint_path) if checkpoint_path else {}
    saved = check(_Saved, content, f"checkpoint {checkpoint_path}: entry")
    name = model_name or saved.arch
    if not name:
        raise UserError(f"checkpoint {checkpoint_path} does not say its model: give --model NAME")
    if saved.arch and saved.arch != name:
        raise UserError(f"checkpoint {checkpoint_path} holds {saved.arch}, not {name}")
    model = create_model(name, saved.model_args, pretrained and not checkpoint_path)
    if checkpoint_path:
        checkpoint.load(model, content, checkpoint_path)
    model.to(choose_device(device) if isinstance(device, str) else device)
    settings = saved.data_config.model_dump() if saved.data_config else {}
    data_config = data_config_of(model, saved.model_args, settings | picture)
    num_classes: int = model.num_classes  # type: ignore[assignment] # every timm model has it
    if "img_size" in picture:
        check_model(model, data_config["input_size"], num_classes)
    names = class_names_of(model) if saved.class_names is None else saved.class_names
    data = saved.config.data
    return Classifier(model, data_config, names, data.root, data.val_split, amp, name, saved.model_args)


def _load_onnx(path: str | Path, model_name: str | None, device: str, amp: Amp, picture: dict[str, Any]) -> Classifier:
    model = OnnxModel(path, "classification", device, amp)
    facts = model.facts
    if model_name and model_name != facts.arch:
        raise UserError(f"checkpoint {path} holds {facts.arch}, not {model_name}")
    settings = check(DataSettings, facts.data_config(), f"metadata of {path}: entry").model_dump()
    if size := picture.pop("img_size", None):
        settings["input_size"] = (settings["input_size"][0], size, size)
    return Classifier(model, settings | picture, facts.class_names, arch=facts.arch, model_args=facts.model_args)


def class_names_of(model: Any) -> list[str] | None:
    """What the classes of a timm model are called, by output index; None where unknown.

    Its configuration may have `label_names`, those of a folder or a hub; models without are taken for ImageNet's where
    they have as many classes.
    """
    count, labels = model.num_classes, model.pretrained_cfg.get("label_names") or ()
    if isinstance(labels, Mapping):  # by index, as text where it comes from JSON, and perhaps not for all
        named = {int(index): label for index, label in labels.items()}
        labels = [named.get(index, str(index)) for index in range(max(count - 1, *named) + 1)]
    if len(labels) == count > 0:  # otherwise the model has a new head
        return [str(label) for label in labels]
    info = _imagenet_info(count)
    return info.label_names() if info else None


def _imagenet_info(num_classes: int) -> ImageNetInfo | None:
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return ImageNetInfo(subset) if subset else None
