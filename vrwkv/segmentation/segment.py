"""Segmenting pictures of any size with a trained segmentor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from mmengine.dataset import Compose
from mmseg.apis import init_model
from PIL import Image
from torch import Tensor, nn

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.images import Picture, open_image
from vrwkv.runtime.onnx_model import is_onnx
from vrwkv.runtime.processes import Amp, World, autocast, choose_device, usable_amp
from vrwkv.segmentation.checkpoint import load_segmentor_weights, read
from vrwkv.segmentation.classes import fill_classes, fill_from_top
from vrwkv.segmentation.config import dataset_meta, inference_pipeline, leave_first_weights, load_config, type_name
from vrwkv.segmentation.engine import config_errors, read_checkpoints_safely
from vrwkv.segmentation.resize import resize_rows
from vrwkv.segmentation.tiles import STEP, fill_by_tiles
from vrwkv.segmentation.whole import OnnxSegmentor, class_logits

MAX_ASPECT = 32  # beyond it, pictures are widened by repeating their border before they are segmented
ROWS = 64  # of logits that are resized at a time


@dataclass
class Segmentation:
    """The class of every pixel of a picture."""

    picture: Image.Image  # upright, RGB
    mask: np.ndarray  # (H, W), uint8 class indices
    classes: list[str]
    palette: list[tuple[int, int, int]]  # RGB of each class

    def shares(self) -> dict[str, float]:
        """The share of the area of each class that is present, the largest first; they add up to 1."""
        parts = np.split(self.mask, range(ROWS, len(self.mask), ROWS))  # counting takes eight bytes for each pixel
        counts = np.sum([np.bincount(part.ravel(), minlength=len(self.classes)) for part in parts], axis=0)
        order = sorted(np.flatnonzero(counts), key=lambda i: -counts[i])
        return {self.classes[i]: counts[i] / self.mask.size for i in order}


def load_segmentor(
    config: str | Path | Config | None,
    checkpoint: str | Path,
    device: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A segmentor for inference, with its classes and palette in `dataset_meta` and its config in `cfg`.

    Batch norms are folded into convolutions, whose weights lie channels last.

    Args:
        config: A config of mmsegmentation; None for an ONNX file, which needs none and is always used whole.
        checkpoint: File of `tools/train_segmentor.py`, of mmseg 0.x, or published by the authors; or an ONNX file of
            `tools/export.py`.
        device: A torch device, or "auto".
        options: Overrides of keys of the config, such as {"model.test_cfg.mode": "whole"}.

    Raises:
        UserError: config or checkpoint cannot be used, or do not fit each other.
    """
    if is_onnx(checkpoint):
        if config or options:
            raise UserError(f"{checkpoint} holds its own settings: required is no config, got {config or options}")
        return OnnxSegmentor(checkpoint, device)
    if config is None:
        raise UserError(f"checkpoint {checkpoint} needs a config: give --config CONFIG")
    cfg = load_config(config, options)
    leave_first_weights(cfg)
    content = read(checkpoint)
    read_checkpoints_safely()
    with config_errors("the model of the config cannot be built"):
        model = init_model(cfg, device="cpu")
    if model.out_channels == 1 and model.num_classes != 2:
        raise UserError(
            "a decode_head with out_channels=1 tells two classes apart: required is num_classes=2, "
            f"got {model.num_classes}"
        )
    load_segmentor_weights(model, content, checkpoint)
    model.dataset_meta = dataset_meta(content.get("meta", {}), cfg, model.num_classes)
    model = fuse_conv_bn(model.eval()).to(memory_format=torch.channels_last)
    return model.to(choose_device(device))


def segment(model: nn.Module, image: Picture, amp: Amp = "none", tile: int | None = None) -> Segmentation:
    """The class of every pixel of a picture, prepared and cut into windows as the config's test settings say.

    In slide mode the memory needed is, beside a window's own, that of the logits of one row of windows: 4 bytes times
    classes, height of a window and width of the picture, as the test pipeline resizes it. In whole mode it is that of
    the model on the whole picture, and with `tile` that of the model on a tile.

    Args:
        model: From `load_segmentor`.
        image: A picture file of any format that Pillow reads, or what Pillow has opened.
        amp: Number format of the forward pass; a processor that is no faster in it computes in float32 and says so.
        tile: Cut pictures that are larger, in pixels, into tiles of this size at most, which overlap and are blended,
            whatever the config's mode is. It must be a multiple of 32 and at least 256.

    Raises:
        UserError: the picture cannot be read, `tile` is out of range or the test pipeline resizes pictures.
    """
    check_tile(tile)
    picture = open_image(image, limit=tile is None)
    width, height = picture.size
    mask = torch.empty(height, width, dtype=torch.uint8)
    if isinstance(model, OnnxSegmentor) and amp != "none":
        raise UserError(f"an ONNX file computes in its own number format, not in {amp}")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.inference_mode(), autocast(World(device), usable_amp(amp, device.type)):
        if tile is not None and max(width, height) > tile:
            if model.align_corners:
                raise UserError("tiles need a decode_head with align_corners=False, that of the config has True")
            fill_by_tiles(mask, lambda box: _logits_of_tile(model, picture.crop(box)), tile)
        else:
            _fill_whole(model, picture, mask)
    meta: dict[str, Any] = model.dataset_meta  # type: ignore[assignment]
    palette = [(int(r), int(g), int(b)) for r, g, b in meta["palette"]]
    return Segmentation(picture, mask.numpy(), list(meta["classes"]), palette)


def check_tile(tile: int | None) -> None:
    """Raises UserError where `tile` is no size of tiles."""
    if tile is not None and (tile < 256 or tile % STEP):
        raise UserError(f"tile must be a multiple of {STEP} and at least 256, not {tile}")


def _logits_of_tile(model: Any, picture: Image.Image) -> Tensor:
    """``(h, w, classes)`` of a part of a picture, which is taken whole and at its own size."""
    inputs, (height, width) = _prepare(model, np.asarray(picture))
    if (width, height) != picture.size:
        raise UserError(
            f"tiles need a test_pipeline that leaves pictures at their size, that of the config brings {picture.width} "
            f"x {picture.height} pixels to {width} x {height}"
        )
    return _logits(model, inputs[..., :height, :width])[0].permute(1, 2, 0)


def _fill_whole(model: Any, picture: Image.Image, mask: Tensor) -> None:
    """Write the classes of a picture that is prepared as a whole."""
    width, height = picture.size
    pixels = np.asarray(picture)
    short = -(-max(width, height) // MAX_ASPECT)
    pixels = np.pad(pixels, ((0, max(0, short - height)), (0, max(0, short - width)), (0, 0)), mode="edge")
    inputs, size = _prepare(model, pixels)
    padded = (inputs.shape[2], inputs.shape[3])
    slides = model.test_cfg.get("mode", "whole") != "whole"
    resized = size != pixels.shape[:2]
    wanted = pixels.shape[:2] if slides or resized else padded
    filled = mask if wanted == mask.shape else torch.empty(wanted, dtype=torch.uint8)
    if slides or resized:
        blocks = _windows(model, inputs) if slides else _resized(_logits(model, inputs), padded, model.align_corners)
        fill_from_top(filled, _without_padding(blocks, size), size, model.align_corners)
    else:
        logits = _logits(model, inputs)
        grid = (logits.shape[2], logits.shape[3])
        fill_classes(filled, logits[0].permute(1, 2, 0), (0, 0), grid, model.align_corners)
    if filled is not mask:
        mask.copy_(filled[:height, :width])


def _prepare(model: Any, pixels: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
    """The model's input for RGB pixels ``(H, W, 3)``, by the config's test pipeline.

    Returns:
        ``(1, 3, h, w)``, and its height and width without what the data preprocessor pads at the bottom and right.
    """
    if isinstance(model, OnnxSegmentor):
        return model.prepare(pixels), (pixels.shape[0], pixels.shape[1])
    steps = [step for step in inference_pipeline(model.cfg) if not type_name(step).startswith("Load")]
    shape = pixels.shape[:2]
    results = Compose(steps)({"img": pixels[..., ::-1], "img_shape": shape, "ori_shape": shape, "seg_fields": []})
    data = {"inputs": [results["inputs"]], "data_samples": [results["data_samples"]]}
    height, width = results["inputs"].shape[1:]
    return model.data_preprocessor(data, training=False)["inputs"], (height, width)


def _logits(model: Any, inputs: Tensor) -> Tensor:
    """Logits ``(1, C, h, w)`` of ``inputs (1, 3, H, W)``, at the head's stride or, of an ONNX file, at 1."""
    if isinstance(model, OnnxSegmentor):
        return model(inputs)
    return class_logits(model, model.decode_head(model.extract_feat(inputs)))


def _resized(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Iterator[Tensor]:
    """Logits ``(1, C, h, w)`` resized to the input's size, as mmseg does before it resizes them to the picture's."""
    for first in range(0, size[0], ROWS):
        yield resize_rows(logits, slice(first, first + ROWS), size, align_corners)[0].permute(1, 2, 0)


def _without_padding(blocks: Iterator[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
    """Of blocks of rows ``(n, W, C)`` the first rows and columns, ``size (h, w)`` in all."""
    left, width = size
    for block in blocks:
        if left > 0:
            yield block[:left, :width]
        left -= len(block)


def _windows(model: Any, inputs: Tensor) -> Iterator[Tensor]:
    """Logits of ``inputs (1, 3, h, w)`` from top to bottom, in blocks ``(n, w, C)``; windows average as in mmseg."""
    height, width = inputs.shape[-2:]
    crop_h, crop_w = (min(c, n) for c, n in zip(model.test_cfg["crop_size"], (height, width), strict=True))
    tops = _window_starts(height, crop_h, model.test_cfg["stride"][0])
    lefts = _window_starts(width, crop_w, model.test_cfg["stride"][1])
    total = inputs.new_zeros(model.out_channels, crop_h, width)
    count = inputs.new_zeros(crop_h, width)
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        for left in lefts:
            window = inputs[..., top : top + crop_h, left : left + crop_w]
            total[..., left : left + crop_w] += model.encode_decode(window, [{"img_shape": (crop_h, crop_w)}])[0]
            count[:, left : left + crop_w] += 1
        done = following - top  # rows that no later window touches
        yield class_logits(model, (total[:, :done] / count[:done])[None])[0].permute(1, 2, 0)
        total = F.pad(total[:, done:], (0, 0, 0, done))
        count = F.pad(count[done:], (0, 0, 0, done))


def _window_starts(size: int, crop: int, stride: int) -> list[int]:
    """First pixels of windows that cover `size` pixels, the last one moved back to end at the border."""
    return [min(i * stride, size - crop) for i in range(-(-(size - crop) // stride) + 1)]
