"""Vision-RWKV models; importing this registers them with timm."""

from vrwkv.models._base import VisionRWKVBase, checkpoint_filter_fn
from vrwkv.models.vrwkv import VisionRWKV

__all__ = ["VisionRWKV", "VisionRWKVBase", "checkpoint_filter_fn"]
