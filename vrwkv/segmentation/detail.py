"""VRWKV with a light branch of convolutions for fine detail: the backbone of segmentors for large pictures."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from vrwkv.segmentation.backbone import VRWKVBackbone
from vrwkv.segmentation.interaction import conv_norm_relu


@MODELS.register_module()
class VRWKVDetail(VRWKVBackbone):
    """VRWKV at stride 16 beside four 3x3 convolutions, which keep what patches of 16 pixels lose.

    The convolutions bring the image to strides 2, 4, 8 and 16. Their last map is added to the tokens before the blocks,
    scaled by a vector that starts at zero: published weights start as they are. Returned are the branch's maps of
    stride 4 and 8 and the tokens' map of stride 16, with 2 w, 4 w and C channels.

    Args:
        model: name of one of our timm models.
        model_args: keywords for it.
        detail_width: channels w of the branch at stride 2.
        norm_cfg: mmcv's name of the branch's BatchNorm.
        with_cp: recompute the blocks in the backward pass instead of keeping their activations.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` for classification weights.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: str,
        model_args: Mapping[str, Any] | None = None,
        detail_width: int = 32,
        norm_cfg: Mapping[str, Any] | None = None,
        with_cp: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, model_args, (4, 8, 16), keep_norm=True, with_cp=with_cp, init_cfg=init_cfg)
        if detail_width < 1:
            raise ValueError(f"detail_width must be >= 1, got {detail_width}")
        widths = [3, detail_width, 2 * detail_width, 4 * detail_width, self.embed_dim]
        norm = dict(norm_cfg or {"type": "BN"})
        self.detail = nn.ModuleList(nn.Sequential(*conv_norm_relu(i, o, 2, norm)) for i, o in pairwise(widths))
        for module in self.detail.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.detail_scale = nn.Parameter(torch.zeros(self.embed_dim))

    def forward_padded(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`VRWKVBackbone.forward_padded`."""
        tokens, grid = self.vrwkv.embed(x)
        maps = []  # of stride 2, 4, 8, 16
        for layer in self.detail:
            x = layer(x)
            maps.append(x)
        _, fine, middle, coarse = maps
        tokens = self.vrwkv.ln0(tokens + self.detail_scale * coarse.flatten(2).transpose(1, 2))  # (B, T, C)
        for index in range(len(self.vrwkv.blocks)):
            tokens = self.vrwkv.run_block(index, tokens, grid)
        return fine, middle, self.vrwkv.norm(tokens).transpose(1, 2).unflatten(2, grid)
