"""Datasets in few large files: tars and zips of class folders, WebDataset shards, Hugging Face datasets.

Each is indexed once, at the start, so that any picture can be read at any time: what a run that is resumed needs.
"""

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from vrwkv.classification.archives import Member, find_archives, members_of
from vrwkv.classification.folder import Pictures, natural_order
from vrwkv.runtime.errors import MissingExtra, UserError, first_line, nearest
from vrwkv.runtime.images import Packed, Picture, picture_endings


def _by_class(pictures: Pictures, found: Iterable[tuple[str, Packed]], names: list[str] | None = None) -> None:
    """Fills in what was found, in the order of `names`."""
    classes: dict[str, list[Picture]] = {}
    for name, picture in found:
        classes.setdefault(name, []).append(picture)
    order = names or sorted(classes, key=natural_order)
    pictures.pictures = {name: classes[name] for name in order if name in classes}
    if not pictures.pictures:
        raise UserError(f"{pictures.path} holds no pictures")


class ArchiveFolders(Pictures):
    """`root/split.zip` with `class/picture`, `root/split/class.zip` with pictures and folders in them, or a file `root`
    with `split/class/picture`; and the same with tars, which may hold tars.

    As in timm's reader, the last folder or archive around a picture is its class.

    Raises:
        UserError: an archive cannot be read, a picture lies in no class, or all do in one of several folders.
    """

    def __init__(self, root: str, split: str) -> None:
        super().__init__(Path(root, split))
        self._folders: set[PurePosixPath] = set()
        _by_class(self, self._find(root, split))
        if len(self.pictures) == 1 < len(self._folders):
            one, other = sorted(map(str, self._folders))[:2]
            raise UserError(f"all of {self.path} is one class, by {one} and {other}: required is class/picture")

    def _find(self, root: str, split: str) -> Iterator[tuple[str, Packed]]:
        endings = picture_endings()
        for archive in find_archives(root, split):
            inner = split if archive == root else ""
            outer = Path(archive).stem if Path(archive).parent == self.path else ""
            for member in members_of(archive):
                if not PurePosixPath(member.name).is_relative_to(inner):
                    continue
                path = PurePosixPath(outer, PurePosixPath(member.name).relative_to(inner))
                self.files += 1
                if path.suffix.lower() not in endings:
                    continue
                if not path.parent.name:
                    raise UserError(f"picture {member} lies in no class: required is class/picture")
                self._folders.add(path.parent)
                yield path.parent.name, member


class Shards(Pictures):
    """WebDataset shards, `root/split/*.tar` or those that `root/split` matches as a pattern: `KEY.jpg` (or another
    picture) and its class in `KEY.cls`, which is a number as a rule, and is the class's name here.

    Raises:
        UserError: there are no shards, one cannot be read, or a picture has no class.
    """

    def __init__(self, root: str, split: str) -> None:
        super().__init__(Path(root, split))
        found = self.path.glob("*.tar") if self.path.is_dir() else Path(root).glob(split)
        shards = sorted(map(str, found), key=natural_order)
        if not shards:
            raise UserError(f"no shards {self.path}/*.tar, and none that match {self.path}")
        _by_class(self, (pair for shard in shards for pair in self._find(shard)))

    def _find(self, shard: str) -> Iterator[tuple[str, Packed]]:
        endings = picture_endings()
        pictures: dict[str, Member] = {}
        classes: dict[str, str] = {}
        for member in members_of(shard):
            self.files += 1
            folder, _, file = member.name.rpartition("/")
            key, _, ending = file.partition(".")
            key = f"{folder}/{key}"
            if ending == "cls":
                classes[key] = member.read().decode(errors="replace").strip()
            elif f".{ending.lower()}" in endings:
                if key in pictures:
                    raise UserError(f"picture {member} is not the only one of its sample, nor is {pictures[key]}")
                pictures[key] = member
        for key, picture in pictures.items():
            if not classes.get(key):
                raise UserError(f"picture {picture} has no class: required is a file of its name that ends in .cls")
            yield classes[key], picture


@dataclass(frozen=True, slots=True)
class Row(Packed):
    """A picture in a dataset of Hugging Face's."""

    dataset: Any
    name: str
    index: int

    def open(self) -> BinaryIO:
        """See `Packed`."""
        picture = self.dataset[self.index]["image"]
        return io.BytesIO(picture["bytes"]) if picture["bytes"] else open(picture["path"], "rb")

    def __str__(self) -> str:
        return f"{self.name}[{self.index}]"


class HuggingFace(Pictures):
    """A dataset with the columns `image` and `label`: a folder of `save_to_disk`, or whatever `load_dataset` takes.
    Classes have the dataset's order.

    Raises:
        UserError: it cannot be read, has no such split or columns, or a picture has no label.
        MissingExtra: `datasets` is not installed.
    """

    def __init__(self, name: str, split: str) -> None:
        super().__init__(Path(name, split))
        dataset = _load(name, split)
        if absent := {"image", "label"} - set(dataset.column_names):
            raise UserError(f"{self.path} has no column {min(absent)}, but {', '.join(dataset.column_names)}")
        import datasets

        rows = dataset.cast_column("image", datasets.Image(decode=False)).select_columns("image")
        labels = np.asarray(dataset.select_columns("label").with_format("numpy")[:]["label"])
        names = getattr(dataset.features["label"], "names", None)
        if names and len(labels) and labels.min() < 0:
            raise UserError(f"picture {self.path}[{labels.argmin()}] has no label")
        self.files = len(labels)
        named = (names[label] if names else str(label) for label in labels.tolist())
        _by_class(self, ((name, Row(rows, str(self.path), i)) for i, name in enumerate(named)), names)


def _load(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("data roots of the form hfds/PATH need datasets: pip install datasets") from error
    try:
        if os.path.isfile(os.path.join(name, split, "state.json")):
            return datasets.load_from_disk(os.path.join(name, split))
        saved = os.path.isfile(os.path.join(name, "dataset_dict.json"))
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # of many packages
        raise UserError(f"cannot load dataset {name}: {first_line(error)}") from error
    if split not in found:
        raise UserError(f"dataset {name} has no split {split!r}, but {', '.join(found)}{nearest(split, list(found))}")
    return found[split]
