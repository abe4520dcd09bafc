"""Omni-Shift: tokens mixed with their neighbours in all directions (Restore-RWKV, arXiv 2407.11087, section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OmniShift(nn.Module):
    """Each token plus three depthwise convolutions of it, 1x1, 3x3 and 5x5, each of the four with a learned scale.

    Nothing stands between the convolutions and their sum, so it is one depthwise 5x5 convolution: its kernel is put
    together from theirs, in training as at test. Parameters are named as in Restore-RWKV. Zeros come in at the border.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(4))  # scales of the token and of the convolutions
        self.conv1x1 = nn.Conv2d(dim, dim, 1, groups=dim, bias=False)
        self.conv3x3 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.conv5x5 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scales to 1; the convolutions have their usual initial weights."""
        nn.init.ones_(self.alpha)

    def merged_kernel(self) -> Tensor:
        """The kernel ``(C, 1, 5, 5)`` of the one convolution."""
        identity, *scales = self.alpha
        convolutions = zip(scales, (self.conv1x1, self.conv3x3, self.conv5x5), (2, 1, 0), strict=True)
        parts = [F.pad(scale * convolution.weight, [border] * 4) for scale, convolution, border in convolutions]
        return torch.stack(parts).sum(0) + F.pad(identity.view(1, 1, 1, 1), [2] * 4)

    def forward(self, x: Tensor, patch_resolution: tuple[int, int]) -> Tensor:
        """Mix the tokens ``x (B, T, C)`` of an ``(H, W)`` grid with their neighbours; returns ``(B, T, C)``."""
        maps = x.transpose(1, 2).unflatten(2, patch_resolution)  # (B, C, H, W)
        maps = F.conv2d(maps, self.merged_kernel(), padding=2, groups=x.shape[2])
        return maps.flatten(2).transpose(1, 2)
