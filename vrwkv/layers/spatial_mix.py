"""Spatial mix: tokens exchange information through Q-Shift and Bi-WKV (arXiv 2403.02308, section 3.2)."""

import math

import torch
from torch import Tensor, nn

from vrwkv.layers.autocast import autocast_input
from vrwkv.layers.grid import Grid
from vrwkv.layers.mix import Mix
from vrwkv.layers.recompute import recomputed
from vrwkv.ops import bi_wkv, sigmoid_gate


class SpatialMix(Mix):
    """Bi-WKV over all tokens, gated by the receptance.

    The decay and the bonus are divided by the number of tokens, so that they mean the same at every image size.

    Args:
        dim: channels C.
        layer_index, depth, shift_pixel, channel_gamma: see :class:`Mix`.
        key_norm: apply a LayerNorm to the output of Bi-WKV (named as in the published weights).
    """

    def __init__(
        self,
        dim: int,
        layer_index: int,
        depth: int,
        key_norm: bool = False,
        shift_pixel: int = 1,
        channel_gamma: float = 1 / 4,
    ) -> None:
        super().__init__(layer_index, depth, shift_pixel, channel_gamma)
        self.spatial_decay = nn.Parameter(torch.empty(dim))
        self.spatial_first = nn.Parameter(torch.empty(dim))
        self.spatial_mix_k = nn.Parameter(torch.empty(dim))
        self.spatial_mix_v = nn.Parameter(torch.empty(dim))
        self.spatial_mix_r = nn.Parameter(torch.empty(dim))
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key_norm = nn.LayerNorm(dim) if key_norm else nn.Identity()
        self.output = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial decay, bonus and mixes, which vary over channels and with the depth of the layer."""
        dim = self.spatial_decay.numel()
        channel = torch.arange(dim, dtype=torch.float64)
        mix = (channel / dim) ** self.falling
        self.spatial_decay.copy_(-5 + 8 * (channel / max(dim - 1, 1)) ** (0.7 + 1.3 * self.rising))
        self.spatial_first.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        self.spatial_mix_k.copy_(mix)
        self.spatial_mix_v.copy_(mix + 0.3 * self.rising)
        self.spatial_mix_r.copy_(mix**0.5)

    def forward(self, x: Tensor, patch_resolution: Grid) -> Tensor:
        """Mix the tokens ``x (B, T, C)`` of an ``(H, W)`` grid; returns ``(B, T, C)``."""
        tokens = x.shape[1]
        x, shift = autocast_input(x), self.shift_on(patch_resolution)
        with recomputed(shift, x, self.spatial_mix_k, self.spatial_mix_v, self.spatial_mix_r) as (xk, xv, xr):
            k, v, r = self.key(xk), self.value(xv), self.receptance(xr)
        del xk, xv, xr  # their memory serves what follows
        y = bi_wkv(self.spatial_decay / tokens, self.spatial_first / tokens, k, v)
        return self.output(sigmoid_gate(r, self.key_norm(y)))
