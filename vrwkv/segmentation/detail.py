"""VRWKV with a light branch of convolutions for fine detail: the backbone of segmentors for large pictures."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from vrwkv.segmentation.backbone import VRWKVBackbone
from vrwkv.segmentation.interaction import conv_norm_relu


class DetailBranch(nn.Module):
    """3x3 convolutions that bring the image to maps of stride 4, 8 and 16: two each for 4 and 8, a bare one for 16.

    Args:
        width: channels w at stride 2; the maps of stride 4 and 8 have 2 w and 4 w.
        dim: channels C of the map of stride 16.
        norm_cfg: mmcv's name of the BatchNorm.
    """

    def __init__(self, width: int, dim: int, norm_cfg: dict[str, Any]) -> None:
        super().__init__()
        stem = conv_norm_relu(3, width, 2, norm_cfg)
        fine = conv_norm_relu(width, 2 * width, 2, norm_cfg), conv_norm_relu(2 * width, 2 * width, 1, norm_cfg)
        middle = conv_norm_relu(2 * width, 4 * width, 2, norm_cfg), conv_norm_relu(4 * width, 4 * width, 1, norm_cfg)
        self.fine = nn.Sequential(*stem, *chain(*fine))
        self.middle = nn.Sequential(*chain(*middle))
        self.coarse = nn.Sequential(*conv_norm_relu(4 * width, dim, 2, norm_cfg)[:-1])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of stride 4, 8 and 16 of the images ``x (B, 3, H, W)``."""
        fine = self.fine(x)
        middle = self.middle(fine)
        return fine, middle, self.coarse(middle)


@MODELS.register_module()
class VRWKVDetail(VRWKVBackbone):
    """VRWKV at stride 16 beside a few 3x3 convolutions, which keep what patches of 16 pixels lose.

    The convolutions' map of stride 16 is added to the tokens before the blocks, scaled by a vector that starts at zero:
    published weights start as they are. Returned are their maps of stride 4 and 8 and the tokens' map of stride 16,
    with 2 w, 4 w and C channels.

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
        self.detail = DetailBranch(detail_width, self.embed_dim, dict(norm_cfg or {"type": "BN"}))
        self.detail_scale = nn.Parameter(torch.zeros(self.embed_dim))

    def forward_padded(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`VRWKVBackbone.forward_padded`."""
        tokens, grid = self.vrwkv.embed(x)
        fine, middle, coarse = self.detail(x)
        tokens = self.vrwkv.ln0(tokens) + self.detail_scale * coarse.flatten(2).transpose(1, 2)  # (B, T, C)
        for index in range(len(self.vrwkv.blocks)):
            tokens = self.vrwkv.run_block(index, tokens, grid)
        return fine, middle, self.vrwkv.norm(tokens).transpose(1, 2).unflatten(2, grid)
