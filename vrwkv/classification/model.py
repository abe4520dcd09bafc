"""Building a model, filling it with weights, and what else is needed to classify pictures with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from vrwkv.runtime import checkpoint
from vrwkv.runtime.errors import UserError, first_line, nearest


@dataclass
class Classifier:
    """A model in evaluation mode with all that is needed to use it."""

    model: nn.Module
    num_classes: int
    class_names: list[str] | None  # by output index, named as the class folders; None where unknown
    data_config: dict[str, Any]  # input_size (C, H, W), interpolation, mean, std, crop_pct, crop_mode
    data_root: str | None = None  # the folder that it was trained on

    def describe(self) -> list[str]:
        """A name to read for each class: ImageNet's words for its folder names, the folder name otherwise."""
        names = self.class_names or [str(i) for i in range(self.num_classes)]
        info = _imagenet_info(len(names))
        return list(info.label_descriptions()) if info and info.label_names() == names else names


def _imagenet_info(num_classes: int) -> ImageNetInfo | None:
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return ImageNetInfo(subset) if subset else None


def create_model(name: str, args: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """A timm model.

    Raises:
        UserError: unknown name, keywords that the model does not take, weights that cannot be had.
    """
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"unknown model {name!r}{nearest(name, timm.list_models())}")
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except Exception as error:  # the constructor, the network, the hub: each has its own types
        weights = " and its published weights" if pretrained else ""
        raise UserError(f"model {name} cannot be built with {dict(args)}{weights}: {first_line(error)}") from error


def data_config_of(model: nn.Module, args: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """timm's data configuration of a model, changed by those `overrides` that are not None.

    Args:
        model: A timm model.
        args: Its constructor's keywords: img_size and in_chans count.
        overrides: timm's keys (input_size is (C, H, W)), and img_size, which goes before all others.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    config = resolve_model_data_config(model, args={k: v for k, v in given.items() if k != "img_size"})
    channels, *size = config["input_size"]
    if "img_size" in given or "input_size" not in given:
        channels = args.get("in_chans", channels)
        size = given.get("img_size", args.get("img_size", size))
    config["input_size"] = (channels, *((size, size) if isinstance(size, int) else size))
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def load_classifier(
    checkpoint_path: str | Path | None = None,
    model_name: str | None = None,
    pretrained: bool = False,
    device: str | torch.device = "cpu",
    **overrides: Any,
) -> Classifier:
    """A trained model from a checkpoint of `tools/train.py`, or from any timm model's name and weights.

    Args:
        checkpoint_path: Checkpoint; one that was not written here needs `model_name` as well.
        model_name: timm's name.
        pretrained: Take the published weights of `model_name`.
        device: Where the model is to run.
        overrides: img_size or crop_pct other than the checkpoint's.

    Raises:
        UserError: no or bad checkpoint, unknown model, weights of another model.
    """
    if not (checkpoint_path or (model_name and pretrained)):
        raise UserError("required: --checkpoint PATH, or --model NAME with --pretrained")
    content = checkpoint.read(checkpoint_path) if checkpoint_path else {}
    name = model_name or content.get("arch")
    if not name:
        raise UserError(f"checkpoint {checkpoint_path} does not say its model: give --model NAME")
    if content.get("arch", name) != name:
        raise UserError(f"checkpoint {checkpoint_path} holds {content['arch']}, not {name}")
    args = content.get("model_args", {})
    model = create_model(name, args, pretrained and not checkpoint_path)
    if checkpoint_path:
        checkpoint.load(model, content, checkpoint_path)
    num_classes: int = model.num_classes  # type: ignore[assignment] # every timm model has it
    class_names = content.get("class_names")
    if class_names is None and (info := _imagenet_info(num_classes)):
        class_names = info.label_names()
    config = data_config_of(model, args, {**content.get("data_config", {}), **overrides})
    root = content.get("config", {}).get("data", {}).get("root")
    return Classifier(model.to(device).eval(), num_classes, class_names, config, root)
