"""Weights from files: the authors' names, other position grids and patch sizes."""

import math
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from timm.layers import resample_patch_embed
from timm.models import clean_state_dict
from torch import Tensor

from vrwkv.layers import resize_pos_embed
from vrwkv.runtime.checkpoint import unwrap

if TYPE_CHECKING:
    from vrwkv.models._base import VisionRWKVBase

try:
    from timm.models._input import get_pretrained_grid_size
except ImportError:  # an older timm, which does not save what a model was made with
    get_pretrained_grid_size = None  # type: ignore[assignment]

_PUBLISHED_NAMES = (
    (r"^backbone\.", ""),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.0\.ln0\.", "ln0."),
    (r"^layers\.", "blocks."),
    (r"^ln1\.", "norm."),
    (r"^head\.0\.", "pre_logits.fc."),
    (r"^head\.(fc|2)\.", "head."),
)
"""Patterns of the authors' parameter names, and what replaces them."""


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: "VisionRWKVBase") -> dict[str, Tensor]:
    """Turn the content of a checkpoint into a state dict of ``model``.

    Warns where a position embedding is resized of which nothing but the number of tokens is known.

    Args:
        state_dict: what the authors published, as a whole or the weights in it, with or without the classifier and the
            prefix ``backbone.``; or a state dict of this class, also of a wrapped model or of a masked autoencoder.
        model: the model to load it into; its position embedding says which grid is wanted.

    Returns:
        Parameters by the names of ``model``; names that it has already are kept.

    Raises:
        ValueError: the position embedding must be resized, but its own grid is not known.
    """
    converted, published = _renamed(state_dict, model)
    _fit_pos_embed(converted, published, model)
    return converted


def pretrained_filter_fn(state_dict: Mapping[str, Any], model: "VisionRWKVBase") -> dict[str, Tensor]:
    """`checkpoint_filter_fn` for ``pretrained=True``: timm knows the image size, and other patches are resampled."""
    converted, published = _renamed(state_dict, model)
    patches, pos_embed = converted.get("patch_embed.proj.weight"), converted.get("pos_embed")
    grid = None
    if not published and pos_embed is not None and get_pretrained_grid_size is not None:
        grid = get_pretrained_grid_size(model, patches, pos_embed.shape[1])
    if grid is None:
        _fit_pos_embed(converted, published, model)
    else:
        converted["pos_embed"] = resize_pos_embed(converted["pos_embed"], grid, model.grid_size)
    patch_size = model.patch_embed.patch_size
    if patches is not None and patches.shape[-2:] != patch_size:
        converted["patch_embed.proj.weight"] = resample_patch_embed(patches, list(patch_size))
    return converted


def _fit_pos_embed(converted: dict[str, Tensor], published: bool, model: "VisionRWKVBase") -> None:
    """Resize a position embedding of which nothing but the number of tokens is known, where that is needed."""
    tokens = converted["pos_embed"].shape[1] if "pos_embed" in converted else None
    # As many tokens need not be the same grid: the authors' grids are square.
    if tokens is None or not (published or tokens != model.pos_embed.shape[1]):
        return
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"a pos_embed of {tokens} tokens can only be resized to the model's grid {model.grid_size} from a "
            "square grid: create the model with the checkpoint's img_size, load, then call set_input_size()"
        )
    if not published:
        warnings.warn(
            f"pos_embed of {tokens} tokens is resized to the model's grid {model.grid_size} as if its own was "
            f"{(side, side)}; if it was not, create the model with the checkpoint's img_size, load, then call "
            "set_input_size()",
            stacklevel=3,
        )
    converted["pos_embed"] = resize_pos_embed(converted["pos_embed"], (side, side), model.grid_size)


def _renamed(state_dict: Mapping[str, Any], model: "VisionRWKVBase") -> tuple[dict[str, Tensor], bool]:
    """The weights by the names and with the dimensions of the model, and whether the authors published them."""
    state_dict = unwrap(state_dict)
    if "decoder.mask_token" in state_dict:
        state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith("decoder.")}
    published = any(name.endswith("patch_embed.projection.weight") for name in state_dict)
    own, converted = model.state_dict(), {}
    for name, tensor in clean_state_dict(dict(state_dict)).items():
        if name not in own:
            for pattern, replacement in _PUBLISHED_NAMES:
                name = re.sub(pattern, replacement, name)
        # What the authors keep per channel has the shape (1, 1, C).
        per_channel = tensor.shape[:-1] == (1, 1) and name in own and own[name].dim() == 1
        converted[name] = tensor.flatten() if per_channel else tensor
    return converted, published
