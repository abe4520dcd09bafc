"""VRWKV6, the second generation of Vision-RWKV.

`Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures` by Yuchen Duan, Weiyun Wang, Zhe
Chen, Xizhou Zhu, Lewei Lu, Tong Lu, Yu Qiao, Hongsheng Li, Jifeng Dai and Wenhai Wang, https://arxiv.org/abs/2403.02308

`Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence` by Bo Peng et al., https://arxiv.org/abs/2404.05892

Weights and the original implementation (Apache-2.0): https://github.com/OpenGVLab/Vision-RWKV
"""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model

from vrwkv.layers import ChannelMix, SpatialMix6
from vrwkv.models._base import VisionRWKVBase, build_model, make_cfg
from vrwkv.models._weights import checkpoint_filter_fn

__all__ = ["VisionRWKV6", "checkpoint_filter_fn"]


class VisionRWKV6(VisionRWKVBase):
    """VRWKV6: patch tokens mixed by the bidirectional RWKV-6 recurrence at a cost linear in their number.

    Args:
        embed_dim: channels C of a token.
        head_size: channels of a head, in which tokens are mixed, shifted and normalised each on its own.
        shift_pixel: distance of the Q-Shift in patches.
        channel_gamma: share of a head's channels that Q-Shift moves in each direction.
        kwargs: see :class:`VisionRWKVBase`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        embed_dim: int = 192,
        head_size: int = 64,
        shift_pixel: int = 1,
        channel_gamma: float = 1 / 4,
        **kwargs: Any,
    ) -> None:
        if head_size < 1 or embed_dim % head_size:
            raise ValueError(f"head_size must be >= 1 and divide embed_dim = {embed_dim}, got {head_size}")
        options: dict[str, Any] = dict(
            heads=embed_dim // head_size, shift_pixel=shift_pixel, channel_gamma=channel_gamma
        )
        super().__init__(partial(SpatialMix6, **options), partial(ChannelMix, **options), embed_dim=embed_dim, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "vrwkv6_tiny_patch16_224.in1k": make_cfg("vrwkv6_t_in1k_224.pth"),
        "vrwkv6_small_patch16_224.in1k": make_cfg("vrwkv6_s_in1k_224.pth"),
        "vrwkv6_base_patch16_224.in1k": make_cfg("vrwkv6_b_in1k_224.pth"),
        "test_vrwkv6.untrained": make_cfg(input_size=(3, 64, 64)),
    }
)


@register_model
def vrwkv6_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRWKV6:
    """VRWKV6-T: 7.6 M parameters, pre-norm."""
    model_args = dict(embed_dim=192, depth=12)
    return build_model(VisionRWKV6, "vrwkv6_tiny_patch16_224", pretrained, model_args, kwargs)


@register_model
def vrwkv6_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRWKV6:
    """VRWKV6-S: 27.7 M parameters, post-norm with a small layer scale."""
    model_args = dict(embed_dim=384, depth=12, post_norm=True, init_values=1e-5)
    return build_model(VisionRWKV6, "vrwkv6_small_patch16_224", pretrained, model_args, kwargs)


@register_model
def vrwkv6_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRWKV6:
    """VRWKV6-B: 104.9 M parameters, post-norm with a small layer scale."""
    model_args = dict(embed_dim=768, depth=12, post_norm=True, init_values=1e-5)
    return build_model(VisionRWKV6, "vrwkv6_base_patch16_224", pretrained, model_args, kwargs)


@register_model
def test_vrwkv6(pretrained: bool = False, **kwargs: Any) -> VisionRWKV6:
    """A model for tests that is built and run in milliseconds: two heads."""
    model_args = dict(img_size=64, embed_dim=32, head_size=16, depth=3)
    return build_model(VisionRWKV6, "test_vrwkv6", pretrained, model_args, kwargs)
