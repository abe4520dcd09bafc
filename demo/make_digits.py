"""Writes scikit-learn's 1797 handwritten digits as an image folder: train/, val/ and ten samples/ in neither.

python demo/make_digits.py data/digits
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from vrwkv.runtime.errors import UserError, command_line


@command_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args(argv)
    if args.output.exists():
        raise UserError(f"{args.output} exists already")

    digits = load_digits()  # images (1797, 8, 8) with values 0..16
    rest, val = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=args.seed
    )
    samples = [next(i for i in rest if digits.target[i] == digit) for digit in range(10)]
    train = np.setdiff1d(rest, samples)

    temporary = args.output.with_name(f"{args.output.name}.tmp")  # renamed when complete
    shutil.rmtree(temporary, ignore_errors=True)
    for split, indices in (("train", train), ("val", val), ("samples", samples)):
        for i in indices:
            folder = temporary / split / (str(digits.target[i]) if split != "samples" else "")
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{digits.target[i]}_{i:04d}.png"  # the class, and the place in scikit-learn's data
            picture = Image.fromarray((digits.images[i] * (255 / 16)).round().astype(np.uint8))
            picture.resize((args.size, args.size), Image.Resampling.BICUBIC).save(folder / name)
    os.replace(temporary, args.output)
    print(f"{args.output}: {len(train)} training, {len(val)} validation, {len(samples)} sample pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
