"""Datasets of every form that `data.root` can have, and their loaders."""

import zlib
from collections.abc import Iterator
from typing import Any

from timm.data import create_loader, create_transform
from timm.data.loader import PrefetchLoader
from torch.utils.data import Dataset

from vrwkv.classification.archives import find_archives
from vrwkv.classification.config import AugmentConfig, DataConfig
from vrwkv.classification.corrupt import CountingLoader, ReplacingDataset
from vrwkv.classification.folder import ImageFolder, Pictures, natural_order
from vrwkv.classification.packed import ArchiveFolders, HuggingFace, Shards
from vrwkv.runtime.errors import UserError, nearest
from vrwkv.runtime.images import mode_of, open_image
from vrwkv.runtime.processes import World
from vrwkv.runtime.sampling import SeededDataset, StepSampler
from vrwkv.runtime.signals import outlive_stop_signals


def find_pictures(root: str, split: str) -> Pictures:
    """The pictures of a split, in the form that `root` names.

    Args:
        root: A folder with `split/class/picture`, `split.zip` or `split/*.zip`, or a zip with `split/class/picture`, or
            the same with tars; `wds/ROOT` has WebDataset shards, `hfds/PATH` a dataset of Hugging Face's.
        split: Its part.

    Raises:
        UserError: there is no such thing, or it cannot be read.
    """
    form, _, rest = root.partition("/")
    if form == "wds":
        return Shards(rest, split)
    if form == "hfds":
        return HuggingFace(rest, split)
    if form in ("hfids", "tfds"):
        raise UserError(f"data root {root} is a stream, from whose middle no run could be resumed: use hfds/ or wds/")
    return ArchiveFolders(root, split) if find_archives(root, split) else ImageFolder(root, split)


class PictureDataset(Dataset[tuple[Any, int]]):
    """Pictures and their class's place in `class_names`; a picture that cannot be read stops with its name.

    Args:
        pictures: By class.
        class_names: All classes.
        channels: 1 for grey pictures, 3 for RGB.

    Raises:
        UserError: a class is not among `class_names`.
    """

    def __init__(self, pictures: Pictures, class_names: list[str], channels: int) -> None:
        index = {name: i for i, name in enumerate(class_names)}
        for name in pictures.pictures:
            if name not in index:
                unknown = f"class {pictures.path / name} is none of the {len(class_names)} known classes"
                raise UserError(f"{unknown}{nearest(name, class_names)}")
        samples = [(picture, index[name]) for name, found in pictures.pictures.items() for picture in found]
        self.samples = sorted(samples, key=lambda sample: natural_order(str(sample[0])))
        self.mode = mode_of(channels)
        self.transform: Any = None  # to be set

    def describe(self) -> str:
        """How many pictures, and a hash of their files' names and classes in their order, whatever form they have."""
        names = "".join(f"{str(picture).rpartition('/')[2]}\0{target}\0" for picture, target in self.samples)
        return f"{len(self)} pictures named {zlib.crc32(names.encode(errors='surrogatepass')):08x}"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture, target = self.samples[index]
        return self.transform(open_image(picture, self.mode)), target


def _init_worker(_: Any) -> int:
    outlive_stop_signals()
    return 0  # for timm, which seeds with it: `SeededDataset` does so for each picture


def create_train_loader(
    pictures: Pictures,
    class_names: list[str],
    data_config: dict[str, Any],
    config: DataConfig,
    augment: AugmentConfig,
    seed: int,
    world: World,
) -> Any:
    """Shuffled, augmented batches of (B, C, H, W) pictures, normalised and on the device, and (B,) class indices."""
    dataset = PictureDataset(pictures, class_names, data_config["input_size"][0])
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
    pictures: Pictures, class_names: list[str], data_config: dict[str, Any], config: DataConfig, world: World
) -> Any:
    """All pictures in order, resized and cropped at the centre, likewise. Each process gets its share, padded to equal
    size."""
    return create_loader(
        PictureDataset(pictures, class_names, data_config["input_size"][0]),  # type: ignore[arg-type] # has what timm needs
        **data_config,
        batch_size=config.batch_size,
        num_workers=config.workers,
        device=world.device,
        distributed=world.distributed,
        pin_memory=world.device.type == "cuda",
        persistent_workers=False,
        worker_seeding=_init_worker,  # type: ignore[arg-type] # timm: "all", "part" or a function
    )


def describe_data(train_loader: Any, val_loader: Any) -> dict[str, str]:
    """What `Task.data` is asked for, of loaders that this file makes."""
    return {
        "training": train_loader.dataset.dataset.dataset.describe(),
        "validation": val_loader.dataset.describe(),
    }


def without_padding(loader: Any, world: World) -> Iterator[tuple[Any, Any, int]]:
    """Batches of `create_eval_loader`, each with how many of its first pictures are no padding."""
    left = share_of(loader.dataset, world)
    for images, target in loader:
        count = min(left, len(images))
        left -= count
        yield images, target, count


def share_of(dataset: Dataset, world: World) -> int:
    """How many pictures of this process's share are no padding."""
    return len(range(world.rank, len(dataset), world.size))  # type: ignore[arg-type]
