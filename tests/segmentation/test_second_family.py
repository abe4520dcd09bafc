"""A family of models needs no more than its spatial mix: the rest, up to the adapter backbone, is shared."""

from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vrwkv.layers import Mix
from vrwkv.models._base import VisionRWKVBase, build_model, make_cfg
from vrwkv.segmentation import VRWKVAdapter


class Identity(Mix):
    """A spatial mix that mixes nothing but scales."""

    def __init__(self, dim: int, layer_index: int, depth: int) -> None:
        super().__init__(layer_index, depth)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, patch_resolution: tuple[int, int]) -> Tensor:
        return x * self.scale


class VisionIdentity(VisionRWKVBase):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(Identity, **kwargs)


default_cfgs = generate_default_cfgs({"tiny_identity.untrained": make_cfg()})


@register_model
def tiny_identity(pretrained: bool = False, **kwargs: Any) -> VisionIdentity:
    return build_model(VisionIdentity, "tiny_identity", pretrained, dict(img_size=32, embed_dim=8, depth=4), kwargs)


@torch.no_grad()
def test_second_family() -> None:
    images = torch.randn(1, 3, 48, 64)
    model = timm.create_model("tiny_identity", num_classes=3).eval()
    assert model(images).shape == (1, 3)
    features = timm.create_model("tiny_identity", features_only=True, out_indices=[1, 3])(images)
    assert [tuple(y.shape) for y in features] == [(1, 8, 3, 4)] * 2
    mixes = {f"blocks.{i}.{name}" for i in range(4) for name in ("att.scale", "ffn.spatial_mix_k", "ffn.spatial_mix_r")}
    assert model.no_weight_decay() == {"pos_embed"} | mixes
    theirs = {f"backbone.{n}".replace("blocks.", "layers."): p + 1 for n, p in model.state_dict().items()}
    theirs = {n: p.view(1, 1, -1) if n.endswith(("scale", "_k", "_r")) else p for n, p in theirs.items()}
    backbone = VRWKVAdapter(
        "tiny_identity", None, 4, deform_num_heads=2, interaction_indexes=[[i, i] for i in range(4)]
    )
    for target, part in ((model, model), (backbone, backbone.vrwkv)):
        target.load_state_dict(theirs, strict=target is model)
        assert torch.equal(part.blocks[3].att.scale, torch.full((8,), 2.0))
    assert [tuple(y.shape[1:]) for y in backbone(images)] == [(8, 12, 16), (8, 6, 8), (8, 3, 4), (8, 2, 2)]
    model.prune_intermediate_layers([1])
    assert len(model.blocks) == 2 and model(images).shape == (1, 12, 8)
