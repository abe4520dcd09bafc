"""Classes of single pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform

from vrwkv.classification.model import Classifier, load_classifier
from vrwkv.runtime.errors import UserError
from vrwkv.runtime.images import open_image
from vrwkv.runtime.processes import choose_device

BATCH_SIZE = 32


def predict(
    images: Sequence[str | Path],
    checkpoint: str | Path | None = None,
    *,
    model_name: str | None = None,
    pretrained: bool = False,
    topk: int = 5,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Classifies pictures, prepared as in validation.

    Args:
        images: Picture files.
        checkpoint: File of `tools/train.py`, or any weights of `model_name`.
        model_name: timm's name.
        pretrained: Take the published weights of `model_name`.
        topk: How many classes to name for each picture.
        device: A torch device, or "auto".

    Returns:
        For each picture {"image": path, "predictions": [{"class", "label", "probability"}, ...]}, the likeliest
        class first: `class` is the class folder's name, `label` is ImageNet's words for it where it is one of theirs.
        A picture that cannot be read has {"image": path, "error": message} instead.

    Raises:
        UserError: anything about the model or the checkpoint that does not fit.
    """
    classifier = load_classifier(checkpoint, model_name, pretrained, choose_device(device))
    results: list[dict[str, Any]] = []
    for start in range(0, len(images), BATCH_SIZE):
        results += _predict_batch(classifier, images[start : start + BATCH_SIZE], topk)
    return results


@torch.inference_mode()
def _predict_batch(classifier: Classifier, paths: Sequence[str | Path], topk: int) -> list[dict[str, Any]]:
    transform = create_transform(**classifier.data_config)
    mode = "L" if classifier.data_config["input_size"][0] == 1 else "RGB"
    pictures: dict[int, torch.Tensor] = {}  # by place in `paths`
    results: list[dict[str, Any]] = [{"image": str(path)} for path in paths]
    for place, path in enumerate(paths):
        try:
            pictures[place] = transform(open_image(path, mode))
        except UserError as error:
            results[place]["error"] = str(error)
    if pictures:
        device = next(classifier.model.parameters()).device
        logits = classifier.model(torch.stack(list(pictures.values())).to(device))  # (B, classes)
        top = logits.float().softmax(-1).topk(min(topk, logits.shape[1]))
        labels = classifier.describe()
        names = classifier.class_names or labels
        for place, values, indices in zip(pictures, top.values.tolist(), top.indices.tolist(), strict=True):
            results[place]["predictions"] = [
                {"class": names[i], "label": labels[i], "probability": p} for p, i in zip(values, indices, strict=True)
            ]
    return results
