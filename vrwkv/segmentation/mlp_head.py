"""SegFormer's all-MLP head for large images."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import SegformerHead
from mmseg.registry import MODELS
from torch import Tensor

from vrwkv.segmentation.resize import resize_rows

ROWS = 16  # of the finest map that are held at a time where no gradients are wanted: they stay in cache


@MODELS.register_module()
class LeanSegformerHead(SegformerHead):
    """mmseg's SegformerHead (arXiv 2105.15203): the same parameters and numbers, with less work and memory.

    Resizing and 1x1 convolutions commute, so each map meets its part of the fusing convolution at its own size, and is
    resized and added up afterwards, in place of one convolution over all maps resized and concatenated.
    """

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits ``(B, classes, H, W)`` of backbone maps, the finest ``(B, C, H, W)`` first."""
        fine, *maps = self._transform_inputs(inputs)
        weights = self.fusion_conv.conv.weight.split(self.channels, dim=1)
        coarse = [F.conv2d(conv(x), w) for x, conv, w in zip(maps, self.convs[1:], weights[1:], strict=True)]
        height, width = fine.shape[2:]
        at_once = torch.is_grad_enabled() or torch.compiler.is_exporting()  # a graph cannot follow the number of rows
        if at_once or self.align_corners or self.interpolate_mode != "bilinear":
            return self._classify(fine, weights[0], [self._resize(x, (height, width)) for x in coarse])
        # A pixel's classes side by side, as they come.
        logits = fine.new_empty(len(fine), height, width, self.out_channels).permute(0, 3, 1, 2)
        for first in range(0, height, ROWS):
            rows = slice(first, first + ROWS)
            parts = [resize_rows(x, rows, (height, width)) for x in coarse]
            logits[:, :, rows] = self._classify(fine[:, :, rows], weights[0], parts)
        return logits

    def _classify(self, fine: Tensor, weight: Tensor, coarse: Sequence[Tensor]) -> Tensor:
        fuse = self.fusion_conv
        total = F.conv2d(self.convs[0](fine), weight, fuse.conv.bias)
        for part in coarse:
            total = total + part
        return self.cls_seg(fuse.activate(fuse.norm(total)))

    def _resize(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(x, size, mode=self.interpolate_mode, align_corners=self.align_corners)
