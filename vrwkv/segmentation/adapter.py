"""VRWKV with the ViT-Adapter (arXiv 2205.08534): the backbone of the paper's segmentors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmseg.registry import MODELS
from torch import Tensor, nn

from vrwkv.segmentation.backbone import VRWKVBackbone
from vrwkv.segmentation.interaction import Interaction, SpatialPrior


@MODELS.register_module()
class VRWKVAdapter(VRWKVBackbone):
    """VRWKV beside a convolutional pyramid; around each of four groups of blocks the two exchange what they know.

    Args:
        model: name of one of our timm models.
        model_args: keywords for it; its ``drop_path_rate`` also holds in the adapter.
        conv_inplane: channels of the pyramid's stem.
        n_points: places that a head of the deformable attention looks at on each map.
        deform_num_heads: heads of the deformable attention.
        deform_ratio: width of its values over C.
        cffn_ratio: hidden width of the convolutional feed-forward layers over C.
        interaction_indexes: first and last block of each of the four groups.
        norm_cfg: mmcv's name of the BatchNorm.
        with_cp: recompute the blocks in the backward pass instead of keeping their activations.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` for classification weights.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: str,
        model_args: Mapping[str, Any] | None = None,
        conv_inplane: int = 64,
        n_points: int = 4,
        deform_num_heads: int = 6,
        deform_ratio: float = 1.0,
        cffn_ratio: float = 0.25,
        interaction_indexes: Sequence[Sequence[int]] = ((0, 2), (3, 5), (6, 8), (9, 11)),
        norm_cfg: Mapping[str, Any] | None = None,
        with_cp: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, model_args, (4, 8, 16, 32), keep_norm=False, with_cp=with_cp, init_cfg=init_cfg)
        self.groups = [range(first, last + 1) for first, last in interaction_indexes]
        depth = len(self.vrwkv.blocks)
        if len(self.groups) != 4 or [i for group in self.groups for i in group] != list(range(depth)):
            raise ValueError(f"interaction_indexes must part {depth} blocks in four groups, got {interaction_indexes}")
        dim = self.embed_dim
        norm = dict(norm_cfg or {"type": "BN"})
        attention = dict(num_heads=deform_num_heads, num_points=n_points, ratio=deform_ratio)
        drop_path = float((model_args or {}).get("drop_path_rate", 0.0))

        self.spm = SpatialPrior(conv_inplane, dim, norm)
        self.level_embed = nn.Parameter(torch.randn(3, dim))
        self.interactions = nn.ModuleList(
            Interaction(dim, attention, cffn_ratio, drop_path, last=group is self.groups[-1]) for group in self.groups
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        nn.init.kaiming_normal_(self.up.weight, mode="fan_out", nonlinearity="relu")
        self.norms = nn.ModuleList(build_norm_layer(norm, dim)[1] for _ in self.strides)

    def forward_padded(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`VRWKVBackbone.forward_padded`."""
        c1, *levels = self.spm(x)  # stride 4; strides 8, 16, 32
        shapes = [(level.shape[2], level.shape[3]) for level in levels]
        tokens = [level.flatten(2).transpose(1, 2) for level in levels]
        c = torch.cat([y + embed for y, embed in zip(tokens, self.level_embed, strict=True)], dim=1)  # (B, P, C)

        x, grid = self.vrwkv.embed(x)  # (B, T, C)
        outputs: list[Tensor] = []
        interaction: Any
        for group, interaction in zip(self.groups, self.interactions, strict=True):
            x = interaction.injector(x, c, shapes)
            if not outputs:
                x = self.vrwkv.ln0(x)  # a part of the first block in the authors' models, so after the injector
            for i in group:
                x = self.vrwkv.run_block(i, x, grid)
            c = interaction.extract(x, c, shapes)
            outputs.append(x.transpose(1, 2).unflatten(2, grid))  # (B, C, H / 16, W / 16)

        parts = c.split([height * width for height, width in shapes], dim=1)
        c2, c3, c4 = (y.transpose(1, 2).unflatten(2, shape) for y, shape in zip(parts, shapes, strict=True))
        maps = (c1 + self.up(c2), c2, c3, c4)
        resized = (F.interpolate(y, size=m.shape[2:], mode="bilinear") for y, m in zip(outputs, maps, strict=True))
        return tuple(norm(m + y) for norm, m, y in zip(self.norms, maps, resized, strict=True))
