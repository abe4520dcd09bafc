"""Precision of what stands in front of matrix products."""

import torch
from torch import Tensor


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast gives to matrix products, where it is enabled; else ``x`` itself."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
