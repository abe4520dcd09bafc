"""UPerNet's head for large images."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import UPerHead
from mmseg.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class LeanUPerHead(UPerHead):
    """mmseg's UPerHead: the same parameters and numbers, with less memory where no gradients are wanted.

    The last convolution runs over the levels one by one and adds up, in place of running over all of them concatenated:
    that takes about four maps of stride 4 instead of twelve.
    """

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """Features ``(B, channels, H, W)`` of backbone maps, the finest ``(B, C, H, W)``."""
        if torch.is_grad_enabled():
            return super()._forward_feature(inputs)
        maps = self._transform_inputs(inputs)
        size = maps[0].shape[2:]
        weights = self.fpn_bottleneck.conv.weight.split(self.channels, dim=1)
        lateral = self.psp_forward(maps)
        total = self._last_conv(lateral, size, weights[-1])
        for level in range(len(maps) - 2, -1, -1):
            finer = self.lateral_convs[level](maps[level])
            lateral = finer.add_(self._resize(lateral, finer.shape[2:]))
            total += self._last_conv(self.fpn_convs[level](lateral), size, weights[level])
        return self.fpn_bottleneck.activate(self.fpn_bottleneck.norm(total))

    def _resize(self, x: Tensor, size: torch.Size) -> Tensor:
        if x.shape[2:] == size:
            return x
        return F.interpolate(x, size, mode="bilinear", align_corners=self.align_corners)

    def _last_conv(self, x: Tensor, size: torch.Size, weight: Tensor) -> Tensor:
        return F.conv2d(self._resize(x, size), weight, padding=1)
