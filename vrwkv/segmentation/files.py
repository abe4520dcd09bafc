"""Segmenting many picture files into a folder."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.images import picture_endings
from vrwkv.runtime.processes import Amp
from vrwkv.segmentation.draw import draw_mask, draw_overlay, drawn_classes
from vrwkv.segmentation.engine import config_errors
from vrwkv.segmentation.segment import check_tile, segment


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The given files, and for a folder all pictures in it by name.

    Raises:
        UserError: a folder holds no pictures.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if file.suffix.lower() in picture_endings()]
            if not inside:
                raise UserError(f"folder {path} holds no pictures")
            found += inside
        else:
            found.append(path)
    return found


def segment_files(
    model: nn.Module,
    pictures: Sequence[Path],
    out: Path,
    opacity: float = 0.5,
    classes: Sequence[str] | None = None,
    amp: Amp = "none",
    tile: int | None = None,
) -> list[dict[str, Any]]:
    """Writes NAME_overlay.png and NAME_mask.png for each picture; shows a bar on stderr where there are many.

    Args:
        model: From `load_segmentor`.
        pictures: Picture files; a second one of a name gets a number.
        out: Folder to write to.
        opacity: Of the colours in the overlay, 0 to 1.
        classes: Draw these alone in the overlay; the mask and the shares have all.
        amp: See `segment`.
        tile: See `segment`.

    Returns:
        For each picture {"image", "overlay", "mask", "shares"}: paths, and the share of the area by class, the largest
        first; or {"image", "error"} where it cannot be read, needs too much memory or cannot be written.

    Raises:
        UserError: `out` cannot be created, a result would overwrite a picture, or `opacity`, `classes` or `tile` is out
            of range.
    """
    check_tile(tile)
    meta: dict[str, Any] = model.dataset_meta  # type: ignore[assignment]
    drawn_classes(meta["classes"], classes)
    if not 0 <= opacity <= 1:
        raise UserError(f"opacity must lie between 0 and 1, not {opacity}")
    files = _results(pictures, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error
    results: list[dict[str, Any]] = []
    for path, (overlay, mask) in zip(tqdm(pictures, unit="picture", disable=len(pictures) == 1), files, strict=True):
        result: dict[str, Any] = {"image": str(path)}
        try:
            with (
                config_errors("the model cannot be run", lambda: not any("mask" in each for each in results)),
                _memory_errors(path, tile),
            ):
                found = segment(model, path, amp, tile)
            with _memory_errors(path, tile):
                draw_overlay(found, opacity, classes).save(overlay)
                draw_mask(found).save(mask)
        except (UserError, OSError) as error:
            result["error"] = str(error)
        else:
            shares = {label: round(share, 6) for label, share in found.shares().items()}
            result.update(overlay=str(overlay), mask=str(mask), shares=shares)
        results.append(result)
    return results


@contextmanager
def _memory_errors(path: Path, tile: int | None) -> Iterator[None]:
    """Turns what torch and NumPy raise where memory runs out into a UserError that names a way to need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        way = f"a smaller --tile than {tile}" if tile else "--tile 1024"
        raise UserError(f"picture {path} needs more memory than there is; {way} needs less") from error


def _results(pictures: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """For each picture the overlay and the mask, none of them a picture.

    Raises:
        UserError: one of them is one of the pictures.
    """
    names: dict[str, None] = {}  # a set in order
    numbers: Counter[str] = Counter()  # of each stem the last
    for path in pictures:
        name = path.stem
        while name in names:
            numbers[path.stem] += 1
            name = f"{path.stem}-{numbers[path.stem] + 1}"
        names[name] = None
    files = [(out / f"{name}_overlay.png", out / f"{name}_mask.png") for name in names]
    read = {path.resolve() for path in pictures}
    for file in chain.from_iterable(files):
        if file.resolve() in read:
            raise UserError(f"picture {file} would be overwritten; write to another folder than {out}")
    return files
