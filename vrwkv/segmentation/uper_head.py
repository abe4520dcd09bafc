"""UPerNet's head for large images."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import UPerHead
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class LeanUPerHead(UPerHead):
    """mmseg's UPerHead: the same parameters and numbers, with less work and memory where no gradients are wanted.

    The last convolution runs over the levels one by one and adds up, in place of running over all of them concatenated;
    that of a coarse level runs before it is resized.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for branch in self.psp_modules:
            branch[0] = BinMeans(branch[0].output_size)

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """Features ``(B, channels, H, W)`` of backbone maps, the finest ``(B, C, H, W)``."""
        if torch.is_grad_enabled():
            return super()._forward_feature(inputs)
        maps = self._transform_inputs(inputs)
        last = self.fpn_bottleneck
        weights = last.conv.weight.split(self.channels, dim=1)
        laterals = [self.psp_forward(maps)]
        for level in range(len(maps) - 2, -1, -1):
            finer = self.lateral_convs[level](maps[level])
            laterals.insert(0, finer.add_(self._resize(laterals[0], finer.shape[2:])))
        total = F.conv2d(self.fpn_convs[0](laterals[0]), weights[0], last.conv.bias, padding=1)
        for level, lateral in enumerate(laterals[1:], 1):
            x = self.fpn_convs[level](lateral) if level < len(self.fpn_convs) else lateral
            self._add_resized_conv(total, x, weights[level])
        return last.activate(last.norm(total))

    def _resize(self, x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
        if x.shape[2:] == size:
            return x
        return F.interpolate(x, size, mode="bilinear", align_corners=self.align_corners)

    def _add_resized_conv(self, total: Tensor, x: Tensor, weight: Tensor) -> None:
        """Add the 3x3 convolution of a map ``(B, C, h, w)`` resized to `total`'s size, ``(B, C', H, W)``, to `total`.

        Resizing works on each channel and the convolution's nine 1x1 parts on each pixel, so either may come first;
        then come the shifts, those along rows before the map grows in height.
        """
        height, width = total.shape[2:]
        for row in range(3):
            parts = [self._resize(F.conv2d(x, weight[:, :, row, i, None, None]), (x.shape[2], width)) for i in range(3)]
            line = parts[1].clone()
            line[..., 1:] += parts[0][..., :-1]
            line[..., :-1] += parts[2][..., 1:]
            grown = self._resize(line, (height, width))
            inside, source = (
                slice(max(0, 1 - row), height - max(0, row - 1)),
                slice(max(0, row - 1), height - max(0, 1 - row)),
            )
            total[:, :, inside] += grown[:, :, source]


class BinMeans(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling of which an exported graph serves every size: torch's own keeps the bins of one."""

    def forward(self, input: Tensor) -> Tensor:
        """Means ``(B, C, bins, bins)`` of maps ``(B, C, H, W)``."""
        if not torch.compiler.is_exporting():
            return super().forward(input)
        rows, columns = (_shares(self.output_size, side, input) for side in input.shape[2:])
        return rows @ input @ columns.T


def _shares(bins: Any, side: int, like: Tensor) -> Tensor:
    """The weight of each of `side` pixels in the mean of each bin, ``(bins, side)``, as `like`; bins may overlap."""
    pixel, bin = torch.arange(side, device=like.device), torch.arange(bins, device=like.device)[:, None]
    first, behind = bin * side // bins, ((bin + 1) * side + bins - 1) // bins
    return ((first <= pixel) & (pixel < behind)).to(like.dtype) / (behind - first)
