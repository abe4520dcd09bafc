"""Vision-RWKV models; importing this registers them with timm."""

from vrwkv.models.vrwkv import VisionRWKV

__all__ = ["VisionRWKV"]
