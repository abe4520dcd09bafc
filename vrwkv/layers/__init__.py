"""Layers of Vision-RWKV."""

from timm.layers import register_notrace_function

from vrwkv.layers.autocast import autocast_input
from vrwkv.layers.block import Block
from vrwkv.layers.channel_mix import ChannelMix
from vrwkv.layers.grid import Grid, VisiblePatches, q_shift_mix_on
from vrwkv.layers.layout import compiled_layout
from vrwkv.layers.mix import Mix
from vrwkv.layers.omni_shift import OmniShift
from vrwkv.layers.pos_embed import resize_pos_embed
from vrwkv.layers.re_wkv import ReWKV
from vrwkv.layers.spatial_mix import SpatialMix
from vrwkv.layers.spatial_mix6 import SpatialMix6, mixed_and_decay
from vrwkv.ops import bi_wkv, norm_gate, sigmoid_gate, squared_relu, wkv6

__all__ = [
    "Block",
    "ChannelMix",
    "Grid",
    "Mix",
    "OmniShift",
    "ReWKV",
    "SpatialMix",
    "SpatialMix6",
    "VisiblePatches",
    "compiled_layout",
    "resize_pos_embed",
]

# What these do depends on shapes, so FX tracing must take each as one node.
for _function in (
    autocast_input,
    bi_wkv,
    mixed_and_decay,
    norm_gate,
    q_shift_mix_on,
    resize_pos_embed,
    sigmoid_gate,
    squared_relu,
    wkv6,
):
    register_notrace_function(_function)
