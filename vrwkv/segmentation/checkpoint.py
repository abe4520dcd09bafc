"""Checkpoints of mmengine, of mmseg 0.x and of the authors: read without running code from them."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from vrwkv import models
from vrwkv.runtime import checkpoint
from vrwkv.runtime.errors import UserError


def _history_method(owner: Any, name: str) -> Any:
    """What mmengine's checkpoints need of `getattr`, and nothing else of it."""
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"getattr({owner!r}, {name!r}) is not allowed")
    return getattr(owner, name)


_array = np.zeros(1).__reduce__()[0]
_scalar = np.float64(0).__reduce__()[0]
_SAFE = [
    HistoryBuffer,
    (_history_method, "builtins.getattr"),
    *((function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")  # numpy 1 and 2
      for function, name in ((_array, "_reconstruct"), (_scalar, "scalar"))),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
]  # fmt: skip
"""What mmengine's training log in a checkpoint consists of, beside what torch allows by itself."""


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU.

    Raises:
        UserError: the file is missing or no checkpoint, or it wants to run code.
    """
    try:
        return checkpoint.read(path, _SAFE)
    except UserError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError) or Path(path).stat().st_size == 0:
            raise
        found = re.search(r"GLOBAL (\S+)|(getattr\(.*?\))", str(error.__cause__))
        wants = f" (it asks for {found[1] or found[2]})" if found else ""
        raise UserError(
            f"{path} is not a checkpoint that can be read safely{wants}; if you trust it, keep its weights alone: "
            f"python -c \"import torch; c = torch.load('{path}', weights_only=False); m = c.get('meta', {{}}); "
            "torch.save({'state_dict': c['state_dict'], 'meta': {k: m[k] for k in ('CLASSES', 'PALETTE') if k in m}}, "
            "'safe.pth')\""
        ) from error


_ADAPTER = re.compile(r"(spm|interactions|up|norms|norm[1-4]|pyramid|detail)\.|level_embed$|detail_scale$")
"""Parameters of the backbones, by the authors' names and ours, that are none of the timm model."""


def _adapter_name(name: str) -> str:
    name = name.replace(".dwconv.dwconv.", ".dwconv.")
    return re.sub(r"^norm([1-4])\.", lambda found: f"norms.{int(found[1]) - 1}.", name)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], backbone: nn.Module) -> dict[str, Tensor]:
    """Turn the content of a checkpoint into a state dict of `VRWKV` or `VRWKVAdapter`.

    Args:
        state_dict: what the authors published, for classification or segmentation, as a whole or its ``state_dict``
            entry, with or without the prefix ``backbone.``; or our own, of a timm model, a backbone or a segmentor.
        backbone: the backbone to load it into; its position embedding says which grid is wanted.

    Returns:
        Parameters by the names of the backbone, without heads and without a final norm that it does not have.
    """
    state_dict = checkpoint.unwrap(state_dict)
    if any(name.startswith("backbone.") for name in state_dict):
        state_dict = {n.removeprefix("backbone."): t for n, t in state_dict.items() if n.startswith("backbone.")}
    model: Any = backbone.vrwkv
    rest = {n.removeprefix("vrwkv."): t for n, t in state_dict.items() if not _ADAPTER.match(n)}
    unused = ("head.", "pre_logits.", *(("norm.",) if isinstance(model.norm, nn.Identity) else ()))
    return {
        **{f"vrwkv.{n}": t for n, t in models.checkpoint_filter_fn(rest, model).items() if not n.startswith(unused)},
        **{_adapter_name(n): t for n, t in state_dict.items() if _ADAPTER.match(n)},
    }


def load_pretrained(backbone: nn.Module, path: str | Path) -> None:
    """Fill a backbone from a classification checkpoint; what that does not have keeps its initial values.

    Raises:
        UserError: no or bad checkpoint, or one of another model.
    """
    own = [name for name in backbone.state_dict() if not name.startswith("vrwkv.") or ".gamma" in name]
    checkpoint.load(backbone, read(path), path, optional=own, filter_fn=checkpoint_filter_fn)


def load_segmentor_weights(segmentor: Any, content: Mapping[str, Any], path: str | Path) -> None:
    """Fill a segmentor from the content of a checkpoint of mmengine, of mmseg 0.x or of the authors.

    Raises:
        UserError: the checkpoint is of another model or of another number of classes.
    """
    classifier = checkpoint.unwrap(content).get("decode_head.conv_seg.weight")
    if not isinstance(classifier, Tensor):
        raise UserError(f"checkpoint {path} is of no segmentor: it has no decode_head.conv_seg.weight")
    if len(classifier) != segmentor.out_channels:
        raise UserError(f"checkpoint {path} has {len(classifier)} classes, the config has {segmentor.out_channels}")
    checkpoint.load(segmentor, content, path, filter_fn=_segmentor_filter_fn)


def _segmentor_filter_fn(state_dict: Mapping[str, Any], segmentor: nn.Module) -> dict[str, Tensor]:
    weights = dict(state_dict)
    if hasattr(segmentor.backbone, "vrwkv"):
        backbone: Any = segmentor.backbone
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("backbone.")}
        weights |= {f"backbone.{name}": t for name, t in checkpoint_filter_fn(state_dict, backbone).items()}
    return weights
