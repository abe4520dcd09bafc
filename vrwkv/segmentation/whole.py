"""Segmentors as plain functions from pictures to logits: as they are exported, and as exported files are used."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.facts import Facts
from vrwkv.runtime.onnx_model import OnnxModel
from vrwkv.runtime.processes import Amp


def class_logits(segmentor: Any, logits: Tensor) -> Tensor:
    """A logit for each class ``(B, classes, h, w)`` of a head's ``(B, C, h, w)``.

    A head of one channel, for two classes, says how much a pixel is of the second; beyond the head's threshold, a
    probability, it is. The first class gets the logit of the threshold everywhere, so that the larger one decides.
    """
    if segmentor.out_channels > 1:
        return logits
    logits = logits.float()  # the threshold must not be rounded
    threshold = min(max(segmentor.decode_head.threshold, 1e-6), 1 - 1e-6)
    return torch.cat([torch.full_like(logits, math.log(threshold / (1 - threshold))), logits], dim=1)


class WholePicture(nn.Module):
    """Backbone, neck and head of a segmentor, and the resizing of their logits to the picture's size.

    Args:
        segmentor: of `load_segmentor`.
    """

    def __init__(self, segmentor: Any) -> None:
        super().__init__()
        self.segmentor = segmentor
        self.takes_rgb = bool(segmentor.data_preprocessor._channel_conversion)  # files hold BGR for mmseg

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes, H, W)`` of normalised RGB images ``(B, 3, H, W)``."""
        model: Any = self.segmentor
        logits = model.decode_head(model.extract_feat(images if self.takes_rgb else images.flip(1)))
        logits = class_logits(model, logits)
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=model.align_corners)


def segmentor_facts(segmentor: Any) -> Facts:
    """What a file of an exported segmentor has to say.

    Raises:
        UserError: the config has no mean and deviation of colours.
    """
    preprocessor = segmentor.data_preprocessor
    if not getattr(preprocessor, "_enable_normalize", False):
        raise UserError("required: a data_preprocessor with mean and std in the config")
    mean, std = ((values.flatten() / 255).tolist() for values in (preprocessor.mean, preprocessor.std))
    if not preprocessor._channel_conversion:
        mean, std = mean[::-1], std[::-1]
    height, width = preprocessor.size or segmentor.backbone.vrwkv.patch_embed.img_size
    names, palette = segmentor.dataset_meta["classes"], segmentor.dataset_meta["palette"]
    return Facts(
        "segmentation",
        input_size=(3, height, width),
        mean=tuple(mean),
        std=tuple(std),
        class_names=list(names),
        palette=[[int(part) for part in colour] for colour in palette],
    )


class OnnxSegmentor(OnnxModel):
    """A segmentor in an ONNX file; pictures are taken whole, at their own size.

    Raises:
        UserError: the file, `device` or `amp` cannot be used, or it does not name its classes.
    """

    def __init__(self, path: Any, device: str = "auto", amp: Amp = "none") -> None:
        super().__init__(path, "segmentation", device, amp)
        names, palette = self.facts.class_names, self.facts.palette
        if names is None or palette is None or not len(names) == len(palette) == self.num_classes:
            raise UserError(f"{path} is damaged: it has {self.num_classes} classes and does not name as many")
        self.test_cfg = {"mode": "whole"}
        self.align_corners = False
        self.dataset_meta = {"classes": names, "palette": palette}

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """The input ``(1, 3, H, W)`` for RGB pixels ``(H, W, 3)``."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.facts.mean, self.facts.std))
        images = torch.tensor(pixels).permute(2, 0, 1).float()
        return images.div_(255).sub_(mean).div_(std).unsqueeze(0)
