"""Pictures by class: image folders, and what every other form of a dataset has in common with them."""

import os
from pathlib import Path

from timm.utils.misc import natural_key

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.images import Picture, picture_endings


def natural_order(name: str) -> tuple[list[int | str], str]:
    """A key to sort by: digits by value, and names that differ in zeros or case alone always in the same order."""
    return natural_key(name), name


class Pictures:
    """The pictures of one split, found once.

    Args:
        path: What holds them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = 0  # of any kind
        self.pictures: dict[str, list[Picture]] = {}  # by class, classes in timm's order: digits by value

    def describe(self) -> str:
        """How many pictures of how many files were found."""
        pictures = sum(map(len, self.pictures.values()))
        return f"{self.path}: {pictures} pictures of {self.files} files in {len(self.pictures)} classes"


class ImageFolder(Pictures):
    """The pictures of one split, found once: `root/split/class/**/picture`, of every format that Pillow reads.

    Links to folders are followed; a folder is read once, so that circles end. What is hidden is left out.

    Args:
        root: The data's folder.
        split: The folder in it.

    Raises:
        UserError: there is no such folder; it holds no classes; a class has no pictures, or its folder is named as a
            picture is; a folder lies in two classes.
    """

    def __init__(self, root: str, split: str) -> None:
        super().__init__(Path(root, split))
        if not os.path.isdir(self.path):
            what = f"data root {root} has no folder {split!r}" if os.path.isdir(root) else f"no data root {root}"
            raise UserError(f"{what}; pictures are expected as {self.path}/class/picture")
        above = [self.path.resolve(), *self.path.resolve().parents]
        self._owners = {_identity(folder): "" for folder in above}  # the class of each folder that was read
        for name in sorted((entry.name for entry in _scan(self.path) if _is_folder(entry)), key=natural_order):
            self.pictures[name] = self._find(name)
        if not self.pictures:
            raise UserError(f"{self.path} holds no class folders")

    def _find(self, name: str) -> list[Picture]:
        folder, endings = os.path.join(self.path, name), picture_endings()
        if os.path.splitext(name)[1].lower() in endings:
            raise UserError(f"{folder} is a folder and no picture: rename it if it is a class, or move it away")
        found: list[Picture] = []
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            if (identity := _identity(here)) in self._owners:
                if self._owners[identity] not in ("", name):
                    raise UserError(f"folder {here} lies in two classes, {self._owners[identity]} and {name}")
                continue  # a circle of links
            self._owners[identity] = name
            for entry in _scan(here):
                if _is_folder(entry):
                    waiting.append(entry.path)
                    continue
                self.files += 1
                if os.path.splitext(entry.name)[1].lower() in endings and _is_file(entry):
                    found.append(entry.path)
        if not found:
            raise UserError(f"class folder {folder} is empty: no file in it has the ending of a picture")
        return found


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {error.strerror}") from error


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Asks the file system about links alone."""
    return entry.is_file(follow_symlinks=False) or (entry.is_symlink() and os.path.isfile(entry.path))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))
