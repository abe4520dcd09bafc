"""Every model with its own kind of blocks and head, but small."""

from typing import Any

import pytest
import timm
from torch import nn

import vrwkv  # noqa: F401

CONFIGS = {  # tag, weights, input size, classes
    "test_vrwkv": ("untrained", None, 64, 1000),
    "vrwkv_tiny_patch16_224": ("in1k", "vrwkv_t_in1k_224.pth", 224, 1000),
    "vrwkv_small_patch16_224": ("in1k", "vrwkv_s_in1k_224.pth", 224, 1000),
    "vrwkv_base_patch16_224": ("in1k", "vrwkv_b_in1k_224.pth", 224, 1000),
    "vrwkv_large_patch16_192": ("in22k", "vrwkv_l_in22k_192.pth", 192, 21841),
    "vrwkv_large_patch16_384": ("in22k_ft_in1k", "vrwkv_l_22kto1k_384.pth", 384, 1000),
    "test_vrwkv6": ("untrained", None, 64, 1000),
    "vrwkv6_tiny_patch16_224": ("in1k", "vrwkv6_t_in1k_224.pth", 224, 1000),
    "vrwkv6_small_patch16_224": ("in1k", "vrwkv6_s_in1k_224.pth", 224, 1000),
    "vrwkv6_base_patch16_224": ("in1k", "vrwkv6_b_in1k_224.pth", 224, 1000),
}
every_model = pytest.mark.parametrize("name", CONFIGS)
every_family = pytest.mark.parametrize("name", ["test_vrwkv", "test_vrwkv6"])


def create(name: str = "test_vrwkv", **kwargs: Any) -> nn.Module:
    """A model by its name."""
    args = dict(img_size=64, embed_dim=32, depth=3, num_classes=5)
    if "large" in name:
        args["head_hidden_size"] = 48
    if "vrwkv6" in name:
        args["head_size"] = 16
    return timm.create_model(name, **args | kwargs)
