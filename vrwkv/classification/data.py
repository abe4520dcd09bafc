"""Image folders (`root/split/class/picture`) and their loaders."""

import os
from pathlib import Path
from typing import Any

from timm.data import create_loader, create_transform
from timm.data.loader import PrefetchLoader
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from vrwkv.classification.config import AugmentConfig, DataConfig
from vrwkv.classification.corrupt import CountingLoader, ReplacingDataset
from vrwkv.runtime.errors import UserError, nearest
from vrwkv.runtime.images import open_image, picture_endings
from vrwkv.runtime.processes import World
from vrwkv.runtime.sampling import SeededDataset, StepSampler
from vrwkv.runtime.signals import outlive_stop_signals


class ImageFolder:
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
        self.path = Path(root, split)
        if not os.path.isdir(self.path):
            what = f"data root {root} has no folder {split!r}" if os.path.isdir(root) else f"no data root {root}"
            raise UserError(f"{what}; pictures are expected as {self.path}/class/picture")
        self.files = 0  # of any kind
        self.pictures: dict[str, list[str]] = {}  # paths by class, classes in timm's order: digits by value
        above = [self.path.resolve(), *self.path.resolve().parents]
        self._owners = {_identity(folder): "" for folder in above}  # the class of each folder that was read
        for name in sorted((entry.name for entry in _scan(self.path) if _is_folder(entry)), key=natural_key):
            self.pictures[name] = self._find(name)
        if not self.pictures:
            raise UserError(f"{self.path} holds no class folders")

    def describe(self) -> str:
        """How many pictures of how many files were found."""
        pictures = sum(map(len, self.pictures.values()))
        return f"{self.path}: {pictures} pictures of {self.files} files in {len(self.pictures)} classes"

    def _find(self, name: str) -> list[str]:
        folder, endings = os.path.join(self.path, name), picture_endings()
        if os.path.splitext(name)[1].lower() in endings:
            raise UserError(f"{folder} is a folder and no picture: rename it if it is a class, or move it away")
        found, waiting = [], [folder]
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
                if os.path.splitext(entry.name)[1].lower() in endings and os.path.isfile(entry.path):
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


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


class FolderDataset(Dataset[tuple[Any, int]]):
    """Pictures and their class's place in `class_names`; a picture that cannot be read stops with its name.

    Args:
        folder: The pictures.
        class_names: All classes.
        channels: 1 for grey pictures, 3 for RGB.

    Raises:
        UserError: a class folder is not among `class_names`.
    """

    def __init__(self, folder: ImageFolder, class_names: list[str], channels: int) -> None:
        index = {name: i for i, name in enumerate(class_names)}
        for name in folder.pictures:
            if name not in index:
                unknown = f"class folder {folder.path / name} is none of the {len(class_names)} known classes"
                raise UserError(f"{unknown}{nearest(name, class_names)}")
        samples = [(path, index[name]) for name, paths in folder.pictures.items() for path in paths]
        self.samples = sorted(samples, key=lambda sample: natural_key(sample[0]))
        self.mode = "L" if channels == 1 else "RGB"
        self.transform: Any = None  # to be set

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        return self.transform(open_image(path, self.mode)), target


def _init_worker(_: Any) -> int:
    outlive_stop_signals()
    return 0  # for timm, which seeds with it: `SeededDataset` does so for each picture


def create_train_loader(
    folder: ImageFolder,
    class_names: list[str],
    data_config: dict[str, Any],
    config: DataConfig,
    augment: AugmentConfig,
    seed: int,
    world: World,
) -> Any:
    """Shuffled, augmented batches of (B, C, H, W) pictures, normalised and on the device, and (B,) class indices."""
    dataset = FolderDataset(folder, class_names, data_config["input_size"][0])
    dataset.transform = create_transform(
        **data_config,
        is_training=True,
        scale=(augment.scale[0], augment.scale[1]),
        ratio=(augment.ratio[0], augment.ratio[1]),
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        use_prefetcher=True,
    )
    loader = CountingLoader(
        SeededDataset(ReplacingDataset(dataset, config.max_corrupt), seed),
        config.max_corrupt,
        batch_sampler=StepSampler(len(dataset), config.batch_size, seed, world),
        num_workers=config.workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_init_worker,  # type: ignore[arg-type] # what it returns is not looked at
    )
    statistics = {key: data_config[key] for key in ("mean", "std")}
    return PrefetchLoader(loader, **statistics, channels=data_config["input_size"][0], device=world.device)


def create_eval_loader(
    folder: ImageFolder, class_names: list[str], data_config: dict[str, Any], config: DataConfig, world: World
) -> Any:
    """All pictures in order, resized and cropped at the centre, likewise. Each process gets its share, padded to equal
    size."""
    return create_loader(
        FolderDataset(folder, class_names, data_config["input_size"][0]),  # type: ignore[arg-type] # has what timm needs
        **data_config,
        batch_size=config.batch_size,
        num_workers=config.workers,
        device=world.device,
        distributed=world.distributed,
        pin_memory=world.device.type == "cuda",
        persistent_workers=False,
        worker_seeding=_init_worker,  # type: ignore[arg-type] # timm: "all", "part" or a function
    )


def share_of(dataset: Dataset, world: World) -> int:
    """How many pictures of this process's share are no padding."""
    return len(range(world.rank, len(dataset), world.size))  # type: ignore[arg-type]
