"""Memory layout of images."""

import torch
from torch import Tensor


def compiled_layout(images: Tensor) -> Tensor:
    """Images ``(B, C, H, W)`` with channels last in memory while ``torch.compile`` looks on; else as they are.

    On CPUs the compiler lays out the inputs of convolutions like this in any case, but where it has to change an
    intermediate for it, it takes the strides of the first image for those of all that the backward pass will see.
    """
    return images.contiguous(memory_format=torch.channels_last) if torch.compiler.is_compiling() else images
