"""Reading images and masks strictly: what is broken or wrong is named, never skipped or guessed at."""

from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS
from PIL import Image

from vrwkv.runtime.errors import UserError, first_line
from vrwkv.runtime.images import open_image
from vrwkv.segmentation.config import type_name

IGNORED = 255  # the value of pixels that count for no class


@TRANSFORMS.register_module()
class LoadImageStrictly(BaseTransform):
    """Reads `img_path` upright into `img`, ``(H, W, 3)`` BGR uint8, and its size into `img_shape` and `ori_shape`."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Raises UserError for a file that is missing, broken or no picture."""
        image = np.asarray(open_image(results["img_path"]))[..., ::-1]
        results["img"] = np.ascontiguousarray(image)
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results


@TRANSFORMS.register_module()
class LoadMaskStrictly(BaseTransform):
    """Reads `seg_map_path` into `gt_seg_map`, ``(H, W)`` uint8.

    Args:
        num_classes: pixels must be 0 to ``num_classes - 1``, or 255 to be ignored; one more where the dataset has
            `reduce_zero_label`, with 0 ignored too. Where a dataset maps the classes of its type to others, they are as
            many as its type has.
        reduce_zero_label: of the dataset, where given here too.
    """

    def __init__(self, num_classes: int, reduce_zero_label: bool | None = None) -> None:
        self.num_classes = num_classes
        self.reduce_zero_label = reduce_zero_label

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Raises UserError for a file that is missing, broken, no mask, of another size or with other values."""
        path, first = results["seg_map_path"], int(results["reduce_zero_label"])
        if self.reduce_zero_label is not None and self.reduce_zero_label != results["reduce_zero_label"]:
            raise UserError(
                f"LoadAnnotations has reduce_zero_label={self.reduce_zero_label}, the dataset of mask {path} has "
                f"{results['reduce_zero_label']}; set it in the dataset alone"
            )
        try:
            with Image.open(path) as file:
                mask = np.asarray(file)
        except FileNotFoundError as error:
            raise UserError(f"mask {path} does not exist (of image {results['img_path']})") from error
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"cannot read mask {path}: {first_line(error)}") from error
        if mask.ndim != 2:
            raise UserError(f"mask {path} must have one channel of class indices, it has {mask.shape[2]}")
        if mask.shape != tuple(results["ori_shape"]):
            sizes = f"{mask.shape}, image {results['img_path']} of size {tuple(results['ori_shape'])}"
            raise UserError(f"mask {path} is of size {sizes}")
        count = len(results.get("label_map") or range(self.num_classes))
        wrong = np.setdiff1d(mask, [*range(count + first), IGNORED])
        if wrong.size:
            raise UserError(
                f"mask {path} has the value {wrong[0]}; {count} classes have the values {first} to "
                f"{count + first - 1}, {IGNORED} is ignored"
            )
        mask = mask.astype(np.uint8)
        if first:
            mask = np.where(mask == 0, IGNORED, mask - 1).astype(np.uint8)
            mask[mask == IGNORED - 1] = IGNORED
        if results.get("label_map") is not None:
            table = np.arange(IGNORED + 1, dtype=np.uint8)
            for old, new in results["label_map"].items():
                table[old] = new
            mask = table[mask]
        results["gt_seg_map"] = mask
        results["seg_fields"].append("gt_seg_map")
        return results


def load_strictly(pipeline: Any, num_classes: int) -> None:
    """Replace mmseg's loading transforms in a pipeline, nested ones included, by the strict ones, in place."""
    for step in pipeline:
        if isinstance(step, list | tuple):
            load_strictly(step, num_classes)
        elif type_name(step) == "LoadImageFromFile":
            step.clear()
            step["type"] = "LoadImageStrictly"
        elif type_name(step) == "LoadAnnotations":
            reduce_zero_label = step.get("reduce_zero_label")
            step.clear()
            step.update(type="LoadMaskStrictly", num_classes=num_classes, reduce_zero_label=reduce_zero_label)
        elif "transforms" in step:
            load_strictly(step["transforms"], num_classes)
