"""Pictures of a model, written as files: what `tools/visualize.py` does."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from vrwkv.classification.classifier import Classifier
from vrwkv.runtime.errors import UserError, first_line
from vrwkv.visualize.draw import draw_decays, draw_gathering, draw_receptive_field
from vrwkv.visualize.measure import effective_receptive_field, gathered_shares, spatial_mixes


def visualize(
    classifier: Classifier,
    pictures: Sequence[Path],
    output: Path,
    at: tuple[float, float] = (0.5, 0.5),
    name: str = "model",
) -> list[Path]:
    """Writes receptive_field.png and decays.png, and gathered_N_PICTURE.png for each picture.

    Everything is measured before the first file is written.

    Args:
        classifier: The model and how it is given pictures.
        pictures: Picture files; the receptive field is averaged over them.
        output: The folder, made where it does not exist.
        at: Where the token lies that is looked at, as parts of the height and the width; the central one by default.
        name: How titles name the model.

    Returns:
        The files.

    Raises:
        UserError: no layers of Bi-WKV, a picture that cannot be read, `at` outside, a folder that cannot be written.
    """
    model = classifier.model
    images = torch.stack([classifier.prepare(path) for path in pictures]).to(classifier.device)  # (B, C, H, W)
    figures: dict[str, Figure] = {}
    try:
        mixes = spatial_mixes(model)
        models = {"initial weights": _initial(model), "trained weights": model}
        fields = {title: effective_receptive_field(each, images) for title, each in models.items()}
        figures["receptive_field.png"] = draw_receptive_field(fields, len(images), name)
        figures["decays.png"] = draw_decays(models, name)
        for place, (path, image) in enumerate(zip(pictures, images, strict=True)):
            shares = [each[0] for each in gathered_shares(model, image[None], at)]
            stem = re.sub(r"[^\w.-]", "_", path.stem)
            figures[f"gathered_{place}_{stem}.png"] = draw_gathering(
                to_picture(image, classifier), shares, mixes, at, name
            )
    except ValueError as error:
        raise UserError(first_line(error)) from error
    return _write(figures, output)


def _write(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Writes PNG files, all of them or none."""
    temporary = {folder / file: folder / f"{file}.tmp" for file in figures}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        for path, figure in zip(temporary.values(), figures.values(), strict=True):
            figure.savefig(path, format="png", dpi=130)
        for path, written in temporary.items():
            os.replace(written, path)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return list(temporary)


def _initial(model: nn.Module) -> nn.Module:
    """The model with the weights that training starts from."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.init_weights()  # type: ignore[operator]
    return model


def to_picture(image: Tensor, classifier: Classifier) -> np.ndarray:
    """What a model is given, ``(C, H, W)``, as RGB ``(H, W, 3)``, 0 to 1; padded to whole patches where it pads so."""
    patches = getattr(classifier.model, "patch_embed", None)
    if getattr(patches, "dynamic_img_pad", False):
        height, width = patches.patch_size  # type: ignore[union-attr, misc]
        image = nn.functional.pad(image, (0, -image.shape[2] % width, 0, -image.shape[1] % height))
    mean, std = (torch.tensor(classifier.data_config[key])[:, None, None] for key in ("mean", "std"))
    return (image.cpu() * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
