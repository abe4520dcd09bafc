"""Scatters scikit-learn's handwritten digits over photographs: a small data set for segmentation, with masks.

python demo/make_digit_scenes.py data/digit_scenes

Writes images/{train,val}/N.png and masks/{train,val}/N.png; a mask is 0 for the photograph and d + 1 on the ink of
digit d. The digits and the photograph of the validation scenes appear in no training scene.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from sklearn.model_selection import train_test_split

from vrwkv.runtime.errors import UserError, command_line

PHOTOGRAPHS = {
    "train": ("china.jpg", "astronaut", "chelsea", "coffee", "rocket"),
    "val": ("flower.jpg",),
}


def photograph(name: str) -> Image.Image:
    """A photograph that scikit-learn (with a suffix) or scikit-image brings along."""
    return Image.fromarray(load_sample_image(name) if "." in name else getattr(skimage.data, name)())


def draw_digit(scene: np.ndarray, mask: np.ndarray, digit: np.ndarray, label: int, rng: np.random.Generator) -> None:
    """Draws a digit ``(8, 8)``, 0 to 16, of random size, angle and colour at a free place, if one is found soon."""
    height = int(rng.integers(len(scene) * 5 // 16, len(scene) * 13 // 32))
    ink = Image.fromarray((digit * (255 / 16)).astype(np.uint8)).resize((height, height), Image.Resampling.BICUBIC)
    ink = np.asarray(ink.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    for _ in range(10):
        y, x = rng.integers(0, len(scene) - height, size=2)
        place = np.s_[y : y + height, x : x + height]
        if not mask[place].any():
            break
    else:
        return
    colour = rng.uniform(160, 255, 3)
    alpha = np.clip(2.5 * ink - 0.5, 0, 1)[..., None]
    scene[place] = scene[place] * (1 - alpha) + colour * alpha
    mask[place][ink > 0.4] = label


def make_scene(
    photographs: list[Image.Image], digits: np.ndarray, targets: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A scene ``(size, size, 3)`` and its mask ``(size, size)``, both uint8."""
    picture = photographs[rng.integers(len(photographs))]
    side = int(rng.integers(size, min(picture.size)))
    left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
    crop = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    scene = np.asarray(crop, dtype=np.float32) * 0.6  # darker than the ink
    mask = np.zeros((size, size), np.uint8)
    for i in rng.integers(0, len(digits), size=rng.integers(3, 7)):
        draw_digit(scene, mask, digits[i], targets[i] + 1, rng)
    return scene.round().astype(np.uint8), mask


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", type=int, default=3000, metavar="SCENES")
    parser.add_argument("--val", type=int, default=100, metavar="SCENES")
    parser.add_argument("--size", type=int, default=96, help="height and width in pixels (default: 96)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.output.exists():
        raise UserError(f"{args.output} exists already")

    digits = load_digits()  # images (1797, 8, 8) with values 0 to 16
    parts = train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=args.seed
    )
    temporary = args.output.with_name(f"{args.output.name}.tmp")  # renamed when complete
    shutil.rmtree(temporary, ignore_errors=True)
    for place, (split, count) in enumerate((("train", args.train), ("val", args.val))):
        rng = np.random.default_rng([args.seed, place])
        photographs = [photograph(name) for name in PHOTOGRAPHS[split]]
        for kind in ("images", "masks"):
            (temporary / kind / split).mkdir(parents=True)
        for i in range(count):
            scene, mask = make_scene(photographs, parts[place], parts[2 + place], args.size, rng)
            Image.fromarray(scene).save(temporary / "images" / split / f"{i:04d}.png", compress_level=1)
            Image.fromarray(mask).save(temporary / "masks" / split / f"{i:04d}.png")
    os.replace(temporary, args.output)
    print(f"{args.output}: {args.train} training, {args.val} validation scenes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
