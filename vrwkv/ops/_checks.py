"""What the public ops share on their arguments: the dtype of sums, and checks.

Every message says what was required and what was given. ``TypeError``: an argument is of a kind that no kernel could
take. ``RuntimeError``, as torch has it for its own ops: the tensors do not fit; where a kernel runs it refuses them
itself, in the same words (``common/checks.h``).
"""

from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(op: str, **tensors: Any) -> None:
    """Raise ``TypeError`` unless all arguments are tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` has one of the supported floating dtypes."""
    if tensor.dtype not in FLOATING:
        raise RuntimeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_tokens(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a floating ``(B, T, C)``."""
    check_floating(op, name, tensor)
    if tensor.dim() != 3:
        raise RuntimeError(f"{op}: {name} must have shape (B, T, C), got {tuple(tensor.shape)}")


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors lie on one device."""
    if tensor.device != other.device:
        raise RuntimeError(f"{op}: {name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def check_dtype(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors have one dtype."""
    if tensor.dtype != other.dtype:
        raise RuntimeError(f"{op}: {name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")


def check_same(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``tensor`` shares device, shape and dtype with ``other``."""
    check_device(op, name, tensor, other_name, other)
    if tensor.shape != other.shape:
        raise RuntimeError(f"{op}: {name} must have the shape of {other_name}, {tuple(other.shape)}, "
                           f"got {tuple(tensor.shape)}")  # fmt: skip
    check_dtype(op, name, tensor, other_name, other)


def check_per_channel(op: str, name: str, tensor: Tensor, tokens_name: str, tokens: Tensor) -> None:
    """Raise unless ``tensor`` is a floating ``(C,)`` for ``tokens (B, T, C)`` and on the same device."""
    check_device(op, name, tensor, tokens_name, tokens)
    check_floating(op, name, tensor)
    if tensor.shape != tokens.shape[-1:]:
        raise RuntimeError(f"{op}: {name} must have shape (C,) = ({tokens.shape[-1]},) to match {tokens_name}, "
                           f"got {tuple(tensor.shape)}")  # fmt: skip


def accumulated(tensor: Tensor, tokens: Tensor) -> Tensor:
    """``tensor`` in the dtype that sums over ``tokens`` are taken in: fp64 for fp64, else fp32.

    What is not floating stays as it is, for the checks to refuse it.
    """
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    # Not a mere to(): that costs more than the rest, and the cores wait for what stands between matrix products.
    return tensor.to(dtype) if tensor.dtype != dtype and tensor.dtype in FLOATING else tensor
