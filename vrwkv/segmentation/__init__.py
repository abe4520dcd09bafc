"""Segmentation with mmsegmentation: importing this package registers our backbones and the layer-decay constructor.

In a config: `custom_imports = dict(imports="vrwkv.segmentation")`.
"""

from vrwkv.runtime.errors import MissingExtra

try:
    import mmseg as _mmseg  # noqa: F401
except ImportError as error:
    raise MissingExtra(f"vrwkv.segmentation needs mmsegmentation ({error}): pip install 'vrwkv[seg]'") from error

from vrwkv.segmentation.adapter import VRWKVAdapter
from vrwkv.segmentation.backbone import VRWKV
from vrwkv.segmentation.checkpoint import checkpoint_filter_fn
from vrwkv.segmentation.detail import VRWKVDetail
from vrwkv.segmentation.draw import draw_mask, draw_overlay
from vrwkv.segmentation.layer_decay import VRWKVLayerDecay
from vrwkv.segmentation.mlp_head import LeanSegformerHead
from vrwkv.segmentation.runner import test, train
from vrwkv.segmentation.segment import Segmentation, load_segmentor, segment
from vrwkv.segmentation.uper_head import LeanUPerHead

__all__ = [
    "VRWKV",
    "LeanSegformerHead",
    "LeanUPerHead",
    "Segmentation",
    "VRWKVAdapter",
    "VRWKVDetail",
    "VRWKVLayerDecay",
    "checkpoint_filter_fn",
    "draw_mask",
    "draw_overlay",
    "load_segmentor",
    "segment",
    "test",
    "train",
]
