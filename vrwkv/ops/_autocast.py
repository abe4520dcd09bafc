"""Precision inside of operators."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Matrix products in the dtype of their factors; exported programs, which could not be saved, go without it."""
    if torch.compiler.is_exporting():
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
