"""Linear interpolation, which the mixes consist of."""

import torch
from torch import Tensor


def lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """``torch.lerp``; in exported graphs in one multiplication, as runtimes would compute both of its branches."""
    if torch.compiler.is_exporting():
        return torch.addcmul(start, weight, end - start)
    return torch.lerp(start, end, weight)
