"""A pre-trained autoencoder from its file, and what it reconstructs."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pydantic import Field
from timm.data import create_transform
from torch import Tensor

from vrwkv.classification.config import DataSettings, ModelArgs
from vrwkv.classification.data import find_pictures
from vrwkv.classification.model import create_model
from vrwkv.pretraining.config import DecoderConfig, PretrainingConfig
from vrwkv.pretraining.masked_autoencoder import MaskedAutoencoder, denormalised_patches, to_images, to_patches
from vrwkv.runtime import checkpoint
from vrwkv.runtime.config import Section, Text, check
from vrwkv.runtime.images import Picture, mode_of, open_image

MASKED = 0.5
"""Grey of masked patches, between black at 0 and white at 1."""


class _Saved(Section, extra="ignore"):
    arch: Text
    model_args: ModelArgs
    decoder: DecoderConfig
    mask_ratio: float = Field(gt=0, lt=1)
    data_config: DataSettings


def load_autoencoder(path: str | Path) -> tuple[MaskedAutoencoder, dict[str, Any]]:
    """A model that `pretrain` wrote, in evaluation mode on the CPU, and timm's data configuration for it.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    content = checkpoint.read(path)
    saved = check(_Saved, content, f"checkpoint {path}: entry")
    backbone: Any = create_model(saved.arch, {**saved.model_args, "num_classes": 0})
    model = MaskedAutoencoder(backbone, saved.decoder.dim, saved.decoder.depth, saved.mask_ratio)
    checkpoint.load(model, content, path)
    return model.eval(), saved.data_config.model_dump()


def validation_pictures(config: PretrainingConfig, count: int) -> list[Picture]:
    """Up to `count` files of the validation split, far from each other.

    Raises:
        UserError: the split cannot be read.
    """
    folder = find_pictures(config.data.root, config.data.val_split)
    found = [path for paths in folder.pictures.values() for path in paths]
    return [found[i * len(found) // count] for i in range(count)] if len(found) > count else list(found)


@torch.inference_mode()
def draw_reconstructions(
    model: MaskedAutoencoder, data_config: dict[str, Any], pictures: list[Picture], seed: int = 0
) -> Figure:
    """Pictures, what the model sees of them, and what it makes of that: a column for each.

    Reconstructed patches get the mean and contrast of the true ones, which the model is not asked for.

    Args:
        model: From `load_autoencoder`.
        data_config: Likewise.
        pictures: Files or pictures of Pillow's, one or more.
        seed: Of the masks.

    Raises:
        UserError: a picture cannot be read.
    """
    transform = create_transform(**data_config)
    mode = mode_of(data_config["input_size"][0])
    images = torch.stack([transform(open_image(picture, mode)) for picture in pictures])  # (B, C, H, W)
    _, patches, masked = model(images, torch.Generator().manual_seed(seed))
    size, whole = model.patch_size, (images.shape[2], images.shape[3])
    true = to_patches(images, size)
    mean, std = (torch.tensor(data_config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    hidden = to_images(masked[..., None].expand_as(true).float(), size, whole)
    made = to_images(torch.where(masked[..., None], denormalised_patches(patches, images, size), true), size, whole)
    seen = images * std + mean
    rows = {"picture": seen, "visible": seen * (1 - hidden) + MASKED * hidden, "reconstructed": made * std + mean}
    share = f"{100 * model.mask_ratio:.0f} % of the patches masked"
    return _grid(rows, f"{share}; reconstructed ones have the mean and contrast of the true ones")


def _grid(rows: dict[str, Tensor], title: str) -> Figure:
    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.3 * count + 0.8, 1.3 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for place, image in zip(line, images.clamp(0, 1).permute(0, 2, 3, 1), strict=True):
            place.imshow(image.numpy().squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            place.set(xticks=[], yticks=[])
    return figure
