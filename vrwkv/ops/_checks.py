"""What the public ops share on their arguments: the dtype of sums, and checks.

Every message says what was required and what was given.
"""

import torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` has one of the supported floating dtypes."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_same(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise unless ``tensor`` shares shape, dtype (``TypeError``) and device with ``other``."""
    if tensor.shape != other.shape:
        raise ValueError(f"{op}: {name} must have the shape of {other_name}, {tuple(other.shape)}, "
                         f"got {tuple(tensor.shape)}")  # fmt: skip
    if tensor.dtype != other.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")
    check_device(op, name, tensor, other_name, other)


def check_device(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise ``ValueError`` unless both tensors lie on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def check_per_channel(op: str, name: str, tensor: torch.Tensor, tokens_name: str, tokens: torch.Tensor) -> None:
    """Raise unless ``tensor`` is a floating ``(C,)`` for ``tokens (B, T, C)`` and on the same device."""
    check_floating(op, name, tensor)
    if tensor.shape != tokens.shape[-1:]:
        raise ValueError(f"{op}: {name} must have shape (C,) = ({tokens.shape[-1]},) to match {tokens_name}, "
                         f"got {tuple(tensor.shape)}")  # fmt: skip
    check_device(op, name, tensor, tokens_name, tokens)


def check_tokens(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise unless ``tensor`` is a floating ``(B, T, C)``."""
    check_floating(op, name, tensor)
    if tensor.dim() != 3:
        raise ValueError(f"{op}: {name} must have shape (B, T, C), got {tuple(tensor.shape)}")


def accumulated(tensor: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the dtype that sums over ``tokens`` are taken in: fp64 for fp64, else fp32.

    What is not floating stays as it is, for the checks to refuse it.
    """
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    # Not a mere to(): that costs more than the rest, and the cores wait for what stands between matrix products.
    return tensor.to(dtype) if tensor.dtype != dtype and tensor.dtype in FLOATING else tensor
