"""What is exported: a network, and the facts that go with it."""

import json
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.facts import Facts
from vrwkv.runtime.onnx_model import OnnxModel


class Subject(NamedTuple):
    network: nn.Module  # from normalised RGB images (B, C, H, W) to logits
    facts: Facts


def subject_of(model: Any) -> Subject:
    """What to export of a timm model, a `Classifier`, or a segmentor of `load_segmentor`.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(getattr(model, "model", model), OnnxModel):
        raise UserError("required: a model with layers, got an ONNX file")
    if hasattr(model, "dataset_meta"):
        from vrwkv.segmentation.whole import WholePicture, segmentor_facts

        return Subject(WholePicture(model), segmentor_facts(model))
    if hasattr(model, "data_config"):
        return Subject(model.model, model.facts())
    if not isinstance(model, nn.Module) or not (hasattr(model, "pretrained_cfg") and hasattr(model, "num_classes")):
        raise UserError(f"required: a timm model, a Classifier or a segmentor, got {type(model).__name__}")
    return Subject(model, _facts_of(model))


def _facts_of(model: Any) -> Facts:
    """What a file of a timm model has to say."""
    from vrwkv.classification.classifier import class_names_of
    from vrwkv.classification.model import data_config_of

    arch, args = model.pretrained_cfg["architecture"], _model_args(model)
    # Of a folder or a hub, what its configuration says of pictures goes before what its model was made with.
    source: Any = getattr(model, "pretrained_model_args", {})
    own = {name: value for name, value in args.items() if source.get(name) != value}
    config = data_config_of(model, own, {})
    return Facts("classification", **config, class_names=class_names_of(model), arch=arch, model_args=args)


def _model_args(model: Any) -> dict[str, Any]:
    """The keywords that a timm model was made with, those that can be kept in a file."""
    if hasattr(model, "_model_args"):
        args = dict(model._model_args, num_classes=model.num_classes)  # a new head is not noted there
    else:  # an older timm, or a model that it did not make: what shows, where its architecture has it otherwise
        with torch.random.fork_rng(devices=[]):  # a model draws its first weights
            usual = _shown(timm.create_model(model.pretrained_cfg["architecture"]))
        args = {name: value for name, value in _shown(model).items() if value != usual[name]}
    return {name: value for name, value in args.items() if _is_json(value)}


def _shown(model: Any) -> dict[str, Any]:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return {"num_classes": model.num_classes, "in_chans": getattr(model, "in_chans", 3), "img_size": size}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
