"""Segmenting pictures of any size with a trained segmentor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import Compose
from mmseg.apis import init_model
from PIL import Image
from torch import Tensor, nn

from vrwkv.runtime.errors import UserError, first_line
from vrwkv.runtime.images import Picture, open_image
from vrwkv.runtime.processes import choose_device
from vrwkv.segmentation.checkpoint import load_segmentor_weights, read
from vrwkv.segmentation.config import dataset_meta, load_config

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
        counts = np.bincount(self.mask.ravel(), minlength=len(self.classes))
        order = sorted(np.flatnonzero(counts), key=lambda i: -counts[i])
        return {self.classes[i]: counts[i] / self.mask.size for i in order}


def load_segmentor(
    config: str | Path | Config,
    checkpoint: str | Path,
    device: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A segmentor in evaluation mode, with its classes and palette in `dataset_meta` and its config in `cfg`.

    Args:
        config: A config of mmsegmentation.
        checkpoint: File of `tools/train_segmentor.py`, of mmseg 0.x, or published by the authors.
        device: A torch device, or "auto".
        options: Overrides of keys of the config, such as {"model.test_cfg.mode": "whole"}.

    Raises:
        UserError: config or checkpoint cannot be used, or do not fit each other.
    """
    cfg = load_config(config, options)
    content = read(checkpoint)
    try:
        model = init_model(cfg, device="cpu")
    except Exception as error:  # constructors have their own types
        raise UserError(f"the model of the config cannot be built: {first_line(error)}") from error
    load_segmentor_weights(model, content, checkpoint)
    model.dataset_meta = dataset_meta(content.get("meta", {}), cfg, model.num_classes)
    return model.to(choose_device(device)).eval()


def segment(model: nn.Module, image: Picture) -> Segmentation:
    """The class of every pixel of a picture, prepared and cut into windows as the config's test settings say.

    In slide mode the memory needed is, beside a window's own, that of the logits of one row of windows: 4 bytes times
    classes, height of a window and width of the picture, as the test pipeline resizes it. In whole mode it is that of
    the model on the whole picture.

    Args:
        model: From `load_segmentor`.
        image: A picture file of any format that Pillow reads, or a picture.

    Raises:
        UserError: the picture cannot be read.
    """
    picture = open_image(image)
    width, height = picture.size
    pixels = np.asarray(picture)
    short = -(-max(width, height) // MAX_ASPECT)
    pixels = np.pad(pixels, ((0, max(0, short - height)), (0, max(0, short - width)), (0, 0)), mode="edge")
    with torch.inference_mode():
        inputs = _prepare(model, pixels)
        rows = _resize_rows(_logits(model, inputs), inputs.shape[-2], (pixels.shape[0], pixels.shape[1]))
        mask = torch.cat([logits.argmax(0).to(torch.uint8).cpu() for logits in rows]).numpy()[:height, :width]
    meta: dict[str, Any] = model.dataset_meta  # type: ignore[assignment]
    palette = [(int(r), int(g), int(b)) for r, g, b in meta["palette"]]
    return Segmentation(picture, np.ascontiguousarray(mask), list(meta["classes"]), palette)


def _prepare(model: Any, pixels: np.ndarray) -> Tensor:
    """The model's input ``(1, 3, h, w)`` for RGB pixels ``(H, W, 3)``, by the config's test pipeline."""
    steps = [step for step in model.cfg.test_pipeline if not step["type"].startswith("Load")]
    shape = pixels.shape[:2]
    results = Compose(steps)({"img": pixels[..., ::-1], "img_shape": shape, "ori_shape": shape, "seg_fields": []})
    data = {"inputs": [results["inputs"]], "data_samples": [results["data_samples"]]}
    return model.data_preprocessor(data, training=False)["inputs"]


def _logits(model: Any, inputs: Tensor) -> Iterator[Tensor]:
    """Logits of ``inputs (1, 3, h, w)`` from top to bottom, in blocks ``(C, n, w)``; windows average as in mmseg."""
    height, width = inputs.shape[-2:]
    if model.test_cfg.get("mode", "whole") == "whole":
        logits = model.decode_head(model.extract_feat(inputs))[0]
        yield from _resize_rows(iter([logits]), logits.shape[1], (height, width))
        return
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
        yield total[:, :done] / count[:done]
        total = F.pad(total[:, done:], (0, 0, 0, done))
        count = F.pad(count[done:], (0, 0, 0, done))


def _window_starts(size: int, crop: int, stride: int) -> list[int]:
    """First pixels of windows that cover `size` pixels, the last one moved back to end at the border."""
    return [min(i * stride, size - crop) for i in range(-(-(size - crop) // stride) + 1)]


def _resize_rows(blocks: Iterator[Tensor], rows: int, shape: tuple[int, int]) -> Iterator[Tensor]:
    """Resizes logits bilinearly, from top to bottom, so that never more than a few rows of the result are held.

    Args:
        blocks: logits ``(C, n, w)`` of consecutive rows.
        rows: how many rows they are together.
        shape: ``(H, W)`` that is wanted.

    Returns:
        Blocks ``(C, m, W)``: together what interpolate with ``align_corners=False`` gives.
    """
    height, width = shape
    # The place of each row that is wanted among the rows that are given.
    places = ((torch.arange(height, dtype=torch.float32) + 0.5) * (rows / height) - 0.5).clamp(0, rows - 1)
    above = places.long()
    below = (above + 1).clamp(max=rows - 1)
    first = done = 0  # first row at hand, rows that have been returned
    kept: Tensor | None = None
    for block in blocks:
        kept = block if kept is None else torch.cat([kept, block], dim=1)
        ready = int((below < first + kept.shape[1]).sum())
        for part in torch.arange(done, ready).split(ROWS):
            weight = (places[part] - above[part]).to(kept.device).unsqueeze(-1)
            upper, lower = (kept[:, (index[part] - first).to(kept.device)] for index in (above, below))
            mixed = torch.lerp(upper, lower, weight).unsqueeze(0)  # (1, C, m, w)
            yield F.interpolate(mixed, size=(len(part), width), mode="bilinear", align_corners=False)[0]
        done = ready
        if done < height:
            keep = int(above[done]) - first
            first, kept = first + keep, kept[:, keep:]
