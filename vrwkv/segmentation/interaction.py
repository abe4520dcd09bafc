"""The adapter's parts: a convolutional pyramid, and the exchange between it and the tokens (arXiv 2205.08534)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vrwkv.segmentation.deformable import DeformableAttention, Shape, pixel_centres

EPS = 1e-6  # of the adapter's LayerNorms


def conv_norm_relu(in_channels: int, channels: int, stride: int, norm_cfg: dict[str, Any]) -> list[nn.Module]:
    """A 3x3 convolution, a norm by mmcv's name, and ReLU."""
    conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
    return [conv, build_norm_layer(norm_cfg, channels)[1], nn.ReLU(inplace=True)]


class SpatialPrior(nn.Module):
    """Convolutions that bring the image to maps of stride 4, 8, 16 and 32.

    Args:
        width: channels of the stem; the maps of stride 8, 16 and 32 have 2, 4 and 4 times as many.
        dim: channels C of the maps that are returned.
        norm_cfg: mmcv's name of the BatchNorm.
    """

    def __init__(self, width: int, dim: int, norm_cfg: dict[str, Any]) -> None:
        super().__init__()
        stem = [layer for i in range(3) for layer in conv_norm_relu(width if i else 3, width, 1 if i else 2, norm_cfg)]
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1))
        self.conv2 = nn.Sequential(*conv_norm_relu(width, 2 * width, 2, norm_cfg))
        self.conv3 = nn.Sequential(*conv_norm_relu(2 * width, 4 * width, 2, norm_cfg))
        self.conv4 = nn.Sequential(*conv_norm_relu(4 * width, 4 * width, 2, norm_cfg))
        self.fc1 = nn.Conv2d(width, dim, 1)
        self.fc2 = nn.Conv2d(2 * width, dim, 1)
        self.fc3 = nn.Conv2d(4 * width, dim, 1)
        self.fc4 = nn.Conv2d(4 * width, dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation by fan-out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four maps ``(B, C, H / s, W / s)``, s = 4, 8, 16, 32, of the images ``x (B, 3, H, W)``."""
        c1 = self.stem(x)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


class ConvFFN(nn.Module):
    """A feed-forward layer with a depthwise 3x3 convolution, on each map by itself, between its two Linears."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal for the Linears, He by fan-out for the convolution, zero biases."""
        for linear in (self.fc1, self.fc2):
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.dwconv.weight, std=math.sqrt(2 / 9))
        if self.dwconv.bias is not None:
            nn.init.zeros_(self.dwconv.bias)

    def forward(self, x: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """Pixels ``x (B, sum of H * W, C)`` of maps of the given ``(H, W)``; returns the same shape."""
        maps = self.fc1(x).split([height * width for height, width in shapes], dim=1)
        maps = [
            self.dwconv(y.transpose(1, 2).unflatten(2, shape)).flatten(2).transpose(1, 2)
            for y, shape in zip(maps, shapes, strict=True)
        ]
        return self.fc2(self.act(torch.cat(maps, dim=1)))


class Injector(nn.Module):
    """Adds to the tokens what they find in the pyramid's maps; at first nothing, as ``gamma`` starts at 0."""

    def __init__(self, dim: int, attention: dict[str, Any]) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=EPS)
        self.attn = DeformableAttention(dim, num_levels=3, **attention)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, c: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """Tokens ``x (B, T, C)``, pixels ``c (B, P, C)`` of maps of ``shapes``, the tokens' grid second; as ``x``."""
        centres = pixel_centres([shapes[1]], x)
        return x + self.gamma * self.attn(self.query_norm(x), centres, self.feat_norm(c), shapes)


class Extractor(nn.Module):
    """Adds to the pyramid's maps what they find in the tokens, then a convolutional feed-forward layer."""

    def __init__(self, dim: int, attention: dict[str, Any], cffn_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=EPS)
        self.attn = DeformableAttention(dim, num_levels=1, **attention)
        self.ffn_norm = nn.LayerNorm(dim, eps=EPS)
        self.ffn = ConvFFN(dim, int(dim * cffn_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, c: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """Tokens ``x (B, T, C)``, pixels ``c (B, P, C)`` of maps of ``shapes``, the tokens' grid second; as ``c``."""
        centres = pixel_centres(shapes, c)
        c = c + self.attn(self.query_norm(c), centres, self.feat_norm(x), [shapes[1]])
        return c + self.drop_path(self.ffn(self.ffn_norm(c), shapes))


class Interaction(nn.Module):
    """What surrounds one group of blocks: an injector before it, an extractor after it and, at the end, two more."""

    def __init__(self, dim: int, attention: dict[str, Any], cffn_ratio: float, drop_path: float, last: bool) -> None:
        super().__init__()
        self.injector = Injector(dim, attention)
        self.extractor = Extractor(dim, attention, cffn_ratio, drop_path)
        extra = [Extractor(dim, attention, cffn_ratio, drop_path) for _ in range(2 if last else 0)]
        self.extra_extractors = nn.ModuleList(extra)

    def extract(self, x: Tensor, c: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """All extractors, one after the other."""
        for extractor in (self.extractor, *self.extra_extractors):
            c = extractor(x, c, shapes)
        return c
