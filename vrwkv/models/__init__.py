"""Vision-RWKV models; importing this registers them with timm."""

from vrwkv.models._base import VisionRWKVBase
from vrwkv.models._weights import checkpoint_filter_fn
from vrwkv.models.card import model_card
from vrwkv.models.vrwkv import VisionRWKV
from vrwkv.models.vrwkv6 import VisionRWKV6

__all__ = ["VisionRWKV", "VisionRWKV6", "VisionRWKVBase", "checkpoint_filter_fn", "model_card"]
