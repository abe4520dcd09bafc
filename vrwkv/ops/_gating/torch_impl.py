"""The pointwise functions from torch ops, for devices without a kernel."""

import torch
from torch import Tensor


def sigmoid_gate(r: Tensor, y: Tensor) -> Tensor:
    """``sigmoid(r) * y`` for tensors of one shape and dtype."""
    accumulate = torch.promote_types(r.dtype, torch.float32)
    return (torch.sigmoid(r.to(accumulate)) * y).to(r.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """``relu(x) ** 2``."""
    return torch.relu(x).square()
