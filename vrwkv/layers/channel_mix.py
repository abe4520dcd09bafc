"""Channel mix: a gated squared-ReLU MLP behind a Q-Shift (arXiv 2403.02308, section 3.2)."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from vrwkv.layers.autocast import autocast_input
from vrwkv.layers.grid import Grid
from vrwkv.layers.mix import Mix
from vrwkv.layers.recompute import recomputed
from vrwkv.ops import sigmoid_gate, squared_relu

PIECE = 4096
"""Tokens whose hidden values are held at a time where no gradient is wanted."""


class ChannelMix(Mix):
    """``sigmoid(receptance(xr)) * value(relu(key(xk))^2)`` on shifted and mixed tokens.

    Args:
        dim: channels C.
        hidden_dim: width of the MLP.
        layer_index, depth, shift_pixel, channel_gamma, heads: see :class:`Mix`.
        key_norm: apply a LayerNorm to the hidden values.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        layer_index: int,
        depth: int,
        key_norm: bool = False,
        shift_pixel: int = 1,
        channel_gamma: float = 1 / 4,
        heads: int = 1,
    ) -> None:
        super().__init__(layer_index, depth, shift_pixel, channel_gamma, heads)
        self.spatial_mix_k = nn.Parameter(torch.empty(dim))
        self.spatial_mix_r = nn.Parameter(torch.empty(dim))
        self.key = nn.Linear(dim, hidden_dim, bias=False)
        self.key_norm = nn.LayerNorm(hidden_dim) if key_norm else nn.Identity()
        self.value = nn.Linear(hidden_dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial mixes, which vary over channels and with the depth of the layer."""
        dim = self.spatial_mix_k.numel()
        mix = (torch.arange(dim, dtype=torch.float64) / dim) ** self.falling
        self.spatial_mix_k.copy_(mix)
        self.spatial_mix_r.copy_(mix)

    def forward(self, x: Tensor, patch_resolution: Grid) -> Tensor:
        """Mix the channels of ``x (B, T, C)`` on an ``(H, W)`` grid; returns ``(B, T, C)``."""
        x, shift, alone = autocast_input(x), self.shift_on(patch_resolution), not self._observed()
        if alone and self._in_pieces(x):
            xk, xr = shift(x, self.spatial_mix_k, self.spatial_mix_r)
            y = torch.cat([self._value(self.key(piece), alone) for piece in xk.split(PIECE, dim=1)], dim=1)
            return sigmoid_gate(self.receptance(xr), y)
        with recomputed(shift, x, self.spatial_mix_k, self.spatial_mix_r) as (xk, xr):
            r, hidden = self.receptance(xr), self.key(xk)
        del xk, xr  # their memory serves what follows
        y = self._value(hidden, alone)
        del hidden
        return sigmoid_gate(r, y)

    def _value(self, hidden: Tensor, overwrite: bool) -> Tensor:
        return self.value(self.key_norm(squared_relu(hidden, inplace=overwrite)))

    def _observed(self) -> bool:
        """Whether others may see hidden values, which must then be whole and keep what they are: hooks and wrappers."""
        inside = (self.key, self.key_norm, self.value)
        hooks = any(module._forward_hooks or module._forward_pre_hooks for module in inside)
        return hooks or bool(_global_forward_hooks or _global_forward_pre_hooks) or type(self.key) is not nn.Linear

    def _in_pieces(self, x: Tensor) -> bool:
        """Whether to hold the hidden values, the largest tensor, piece by piece: for large images at inference."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)
        return not (traced or torch.is_grad_enabled()) and x.shape[1] > PIECE
