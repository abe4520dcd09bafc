"""Image folders (`root/split/class/picture`) and their loaders."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from vrwkv.classification.config import AugmentConfig, DataConfig
from vrwkv.runtime.errors import UserError, nearest
from vrwkv.runtime.images import open_image
from vrwkv.runtime.processes import World


class FolderDataset(ImageDataset):
    """timm's dataset, except that a picture that cannot be read stops with its name instead of being skipped."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.reader.samples[index]
        image: Image.Image = open_image(path, self.input_img_mode)
        return self.transform(image), target


def split_folder(root: str, split: str) -> Path:
    """The folder of one split.

    Raises:
        UserError: there is none.
    """
    folder = Path(root) / split
    if not folder.is_dir():
        what = f"data root {root} has no folder {split!r}" if Path(root).is_dir() else f"no data root {root}"
        raise UserError(f"{what}; pictures are expected as {folder}/class/picture")
    return folder


def find_classes(folder: Path) -> list[str]:
    """The class folders' names in timm's order (digits by value).

    Raises:
        UserError: there are none, or one holds no picture.
    """
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    if not names:
        raise UserError(f"{folder} holds no class folders")
    extensions = get_img_extensions()
    for name in names:
        with os.scandir(folder / name) as entries:
            if not any(entry.name.lower().endswith(extensions) for entry in entries):
                raise UserError(f"class folder {folder / name} is empty: no file ends in {', '.join(extensions)}")
    return sorted(names, key=natural_key)


def open_folder(folder: Path, class_names: list[str], channels: int) -> FolderDataset:
    """The pictures of `folder`, labelled by their class's place in `class_names`.

    Raises:
        UserError: a class folder is empty or not among `class_names`.
    """
    index = {name: i for i, name in enumerate(class_names)}
    for name in find_classes(folder):
        if name not in index:
            hint = nearest(name, class_names)
            raise UserError(f"class folder {folder / name} is none of the {len(class_names)} known classes{hint}")
    return FolderDataset(os.fspath(folder), class_map=index, input_img_mode="L" if channels == 1 else "RGB")


def _seed_worker(info: Any) -> int:
    # Ctrl-C and job managers signal all processes at once: a worker then leaves without a traceback, and without an
    # exit code that the main process would report before its own interruption.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    return info.seed


def _create_loader(dataset: FolderDataset, data_config: dict[str, Any], world: World, **kwargs: Any) -> Any:
    """Batches of (B, C, H, W) pictures, normalised and on the device, and (B,) class indices."""
    return create_loader(
        dataset,
        **data_config,
        **kwargs,
        device=world.device,
        distributed=world.distributed,
        pin_memory=world.device.type == "cuda",
        persistent_workers=False,  # workers seeded anew each epoch make a resumed run the same as an unbroken one
        worker_seeding=_seed_worker,  # type: ignore[arg-type] # timm: "all", "part" or a function
    )


def create_train_loader(
    config: DataConfig, augment: AugmentConfig, class_names: list[str], data_config: dict[str, Any], world: World
) -> Any:
    """Shuffled, augmented batches; the last incomplete one is dropped."""
    folder = split_folder(config.root, config.train_split)
    return _create_loader(
        open_folder(folder, class_names, data_config["input_size"][0]),
        data_config,
        world,
        is_training=True,
        batch_size=config.batch_size,
        num_workers=config.workers,
        scale=tuple(augment.scale),
        ratio=tuple(augment.ratio),
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        re_prob=augment.erase_prob,
        re_mode="pixel",
    )


def create_eval_loader(
    folder: Path, class_names: list[str], data_config: dict[str, Any], config: DataConfig, world: World
) -> Any:
    """All pictures in order, resized and cropped at the centre. Each process gets its share, padded to equal size."""
    dataset = open_folder(folder, class_names, data_config["input_size"][0])
    return _create_loader(dataset, data_config, world, batch_size=config.batch_size, num_workers=config.workers)


def share_of(dataset: torch.utils.data.Dataset, world: World) -> int:
    """How many pictures of this process's share are no padding."""
    return len(range(world.rank, len(dataset), world.size))  # type: ignore[arg-type]
