"""Vision-RWKV.

`Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures` by Yuchen Duan, Weiyun Wang, Zhe
Chen, Xizhou Zhu, Lewei Lu, Tong Lu, Yu Qiao, Hongsheng Li, Jifeng Dai and Wenhai Wang, https://arxiv.org/abs/2403.02308

Weights and the original implementation (Apache-2.0): https://github.com/OpenGVLab/Vision-RWKV
"""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model

from vrwkv.layers import ChannelMix, SpatialMix
from vrwkv.models._base import VisionRWKVBase, build_model, make_cfg
from vrwkv.models._weights import checkpoint_filter_fn

__all__ = ["VisionRWKV", "checkpoint_filter_fn"]


class VisionRWKV(VisionRWKVBase):
    """Vision-RWKV: patch tokens mixed by Bi-WKV at a cost linear in their number.

    Args:
        key_norm: add LayerNorms inside the mixes.
        shift_pixel: distance of the Q-Shift in patches.
        channel_gamma: share of the channels that Q-Shift moves in each direction.
        kwargs: see :class:`VisionRWKVBase`.
    """

    def __init__(
        self, key_norm: bool = False, shift_pixel: int = 1, channel_gamma: float = 1 / 4, **kwargs: Any
    ) -> None:
        options: dict[str, Any] = dict(key_norm=key_norm, shift_pixel=shift_pixel, channel_gamma=channel_gamma)
        super().__init__(partial(SpatialMix, **options), partial(ChannelMix, **options), **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "vrwkv_tiny_patch16_224.in1k": make_cfg("vrwkv_t_in1k_224.pth"),
        "vrwkv_small_patch16_224.in1k": make_cfg("vrwkv_s_in1k_224.pth"),
        "vrwkv_base_patch16_224.in1k": make_cfg("vrwkv_b_in1k_224.pth"),
        "vrwkv_large_patch16_192.in22k": make_cfg(
            "vrwkv_l_in22k_192.pth",
            input_size=(3, 192, 192),
            num_classes=21841,
        ),
        "vrwkv_large_patch16_384.in22k_ft_in1k": make_cfg(
            "vrwkv_l_22kto1k_384.pth",
            input_size=(3, 384, 384),
        ),
        "test_vrwkv.untrained": make_cfg(input_size=(3, 64, 64)),
    }
)


@register_model
def vrwkv_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRWKV:
    """VRWKV-T: 6.2 M parameters, pre-norm."""
    model_args = dict(embed_dim=192, depth=12)
    return build_model(VisionRWKV, "vrwkv_tiny_patch16_224", pretrained, model_args, kwargs)


@register_model
def vrwkv_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRWKV:
    """VRWKV-S: 23.8 M parameters, post-norm with layer scale."""
    model_args = dict(embed_dim=384, depth=12, post_norm=True, init_values=1.0)
    return build_model(VisionRWKV, "vrwkv_small_patch16_224", pretrained, model_args, kwargs)


@register_model
def vrwkv_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionRWKV:
    """VRWKV-B: 93.7 M parameters, post-norm with a small layer scale."""
    model_args = dict(embed_dim=768, depth=12, post_norm=True, init_values=1e-5)
    return build_model(VisionRWKV, "vrwkv_base_patch16_224", pretrained, model_args, kwargs)


_LARGE = dict(
    img_size=192, embed_dim=1024, depth=24, post_norm=True, key_norm=True, init_values=1e-5, head_hidden_size=3072
)


@register_model
def vrwkv_large_patch16_192(pretrained: bool = False, **kwargs: Any) -> VisionRWKV:
    """VRWKV-L as pre-trained on ImageNet-22k: key norms and an MLP head."""
    return build_model(VisionRWKV, "vrwkv_large_patch16_192", pretrained, _LARGE, kwargs)


@register_model
def vrwkv_large_patch16_384(pretrained: bool = False, **kwargs: Any) -> VisionRWKV:
    """VRWKV-L fine-tuned on ImageNet-1k: 334.9 M parameters; its position embedding keeps the grid of 192 pixels."""
    return build_model(VisionRWKV, "vrwkv_large_patch16_384", pretrained, _LARGE, kwargs)


@register_model
def test_vrwkv(pretrained: bool = False, **kwargs: Any) -> VisionRWKV:
    """A model for tests that is built and run in milliseconds."""
    model_args = dict(img_size=64, embed_dim=32, depth=3)
    return build_model(VisionRWKV, "test_vrwkv", pretrained, model_args, kwargs)
