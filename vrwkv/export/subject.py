"""What is exported: a network, and the facts that go with it."""

from typing import Any, NamedTuple, cast

from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.facts import DATA_CONFIG, Facts
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
    if not isinstance(model, nn.Module) or not hasattr(model, "pretrained_cfg"):
        raise UserError(f"required: a timm model, a Classifier or a segmentor, got {type(model).__name__}")
    config, pretrained_cfg = resolve_model_data_config(model), cast(dict[str, Any], model.pretrained_cfg)
    subset = infer_imagenet_subset(model)
    facts = Facts(
        task="classification",
        class_names=ImageNetInfo(subset).label_names() if subset else None,
        arch=pretrained_cfg["architecture"],
        **{name: config[name] for name in DATA_CONFIG},
    )
    return Subject(model, facts)
