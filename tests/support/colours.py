"""A small image folder of coloured pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (210, 40, 30)}


def picture(colour: tuple[int, int, int], seed: int) -> Image.Image:
    """A noisy picture of one colour, 24 pixels high and 20 wide."""
    noise = np.random.default_rng(seed).normal(0, 25, (24, 20, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def half_and_half(left: str, right: str, seed: int = 0) -> Image.Image:
    """64 pixels high and 96 wide: the left third has one colour, the rest another."""
    pixels = np.random.default_rng(seed).normal(0, 10, (64, 96, 3))
    pixels[:, :32] += CLASSES[left]
    pixels[:, 32:] += CLASSES[right]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_images(root: Path, train: int = 12, val: int = 5) -> Path:
    """Writes root/{train,val}/{blue,green,red}/N.png."""
    for split, count in (("train", train), ("val", val)):
        for name, colour in CLASSES.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(colour, seed=i + 1000 * (split == "val")).save(folder / f"{i}.png")
    return root
