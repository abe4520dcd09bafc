"""What the tests of this folder share: a small image folder of coloured pictures, and the scripts' main functions."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
CLASSES = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (210, 40, 30)}
Main = Callable[[list[str]], int]


def load_tool(name: str) -> Main:
    """The `main` of tools/<name>.py."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def picture(colour: tuple[int, int, int], seed: int) -> Image.Image:
    """A noisy picture of one colour, 24 pixels high and 20 wide."""
    noise = np.random.default_rng(seed).normal(0, 25, (24, 20, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def write_images(root: Path, train: int = 12, val: int = 5) -> Path:
    """Writes root/{train,val}/{blue,green,red}/N.png."""
    for split, count in (("train", train), ("val", val)):
        for name, colour in CLASSES.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(colour, seed=i + 1000 * (split == "val")).save(folder / f"{i}.png")
    return root
