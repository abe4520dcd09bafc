"""Spatial mix of VRWKV6: the bidirectional RWKV-6 recurrence behind data-dependent mixes (arXiv 2404.05892)."""

from functools import partial

import torch
from torch import Tensor, nn

from vrwkv.layers.autocast import autocast_input
from vrwkv.layers.grid import Grid, q_shift_mix_on
from vrwkv.layers.mix import Mix
from vrwkv.layers.recompute import recomputed
from vrwkv.ops import low_rank, low_rank_mix, norm_gate, wkv6

MIX_RANK, DECAY_RANK = 32, 64
"""Of the low-rank matrices that make mixes and decays depend on the tokens."""


class SpatialMix6(Mix):
    """The RWKV-6 recurrence over all tokens in both directions; its decay and the mixes in front of it depend on them.

    Args:
        dim: channels C.
        layer_index, depth, shift_pixel, channel_gamma: see :class:`Mix`.
        heads: H, equal parts of the channels that are mixed, shifted and normalised each on its own.
    """

    def __init__(
        self,
        dim: int,
        layer_index: int,
        depth: int,
        heads: int,
        shift_pixel: int = 1,
        channel_gamma: float = 1 / 4,
    ) -> None:
        super().__init__(layer_index, depth, shift_pixel, channel_gamma, heads)
        self.time_maa_x = nn.Parameter(torch.empty(dim))
        self.time_maa_w = nn.Parameter(torch.empty(dim))
        self.time_maa_k = nn.Parameter(torch.empty(dim))
        self.time_maa_v = nn.Parameter(torch.empty(dim))
        self.time_maa_r = nn.Parameter(torch.empty(dim))
        self.time_maa_g = nn.Parameter(torch.empty(dim))
        self.time_maa_w1 = nn.Parameter(torch.empty(dim, 5 * MIX_RANK))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, MIX_RANK, dim))
        self.time_decay = nn.Parameter(torch.empty(dim))
        self.time_decay_w1 = nn.Parameter(torch.empty(dim, DECAY_RANK))
        self.time_decay_w2 = nn.Parameter(torch.empty(DECAY_RANK, dim))
        self.time_faaaa = nn.Parameter(torch.empty(heads, dim // heads))
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.ln_x = nn.GroupNorm(heads, dim, eps=1e-5)
        self.output = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial decay, bonus and mixes, which vary over channels and with the depth of the layer."""
        dim = self.time_decay.numel()
        channel = torch.arange(dim, dtype=torch.float64)
        share, place = channel / dim, channel / max(dim - 1, 1)
        for mix in (self.time_maa_x, self.time_maa_w, self.time_maa_k):
            mix.copy_(1 - share**self.falling)
        self.time_maa_v.copy_(1 - share**self.falling - 0.3 * self.rising)
        for mix in (self.time_maa_r, self.time_maa_g):
            mix.copy_(1 - share ** (self.falling / 2))
        self.time_decay.copy_(-6 + 5 * place ** (0.7 + 1.3 * self.rising))
        bonus = self.rising * (1 - place) + 0.1 * ((channel + 1) % 3 - 1)
        self.time_faaaa.copy_(bonus.view_as(self.time_faaaa))
        for matrix in (self.time_maa_w1, self.time_maa_w2, self.time_decay_w1, self.time_decay_w2):
            nn.init.uniform_(matrix, -1e-4, 1e-4)

    def forward(self, x: Tensor, patch_resolution: Grid) -> Tensor:
        """Mix the tokens ``x (B, T, C)`` of an ``(H, W)`` grid; returns ``(B, T, C)``."""
        x = autocast_input(x)
        options = self.shift_pixel, self.channel_gamma, self.heads
        matrices = self.time_maa_w1, self.time_maa_w2, self.time_decay_w1, self.time_decay_w2
        mixes = (self.time_maa_x, self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        mix = partial(mixed_and_decay, patch_resolution, options)
        with recomputed(mix, x, self.time_decay, *matrices, *mixes) as (w, xk, xv, xr, xg):
            k, v, r, g = self.key(xk), self.value(xv), self.receptance(xr), self.gate(xg)
            del xk, xv, xr, xg  # their memory serves what follows
            r, k, v, w = (z.unflatten(2, (self.heads, -1)) for z in (r, k, v, w))  # (B, T, H, N)
            y = wkv6(r, k, v, w, self.time_faaaa)
        with recomputed(self._normalised, y, g, self.ln_x.weight, self.ln_x.bias) as (y,):
            return self.output(y)

    def _normalised(self, y: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (norm_gate(y, g, weight, bias, self.ln_x.eps),)


def mixed_and_decay(
    grid: Grid,
    options: tuple[int, float, int],
    x: Tensor,
    decay: Tensor,
    mix_matrix: Tensor,
    mix_matrices: Tensor,
    decay_matrix: Tensor,
    decay_matrices: Tensor,
    mix: Tensor,
    *mixes: Tensor,
) -> tuple[Tensor, ...]:
    """Raw decays of the recurrence, and the inputs of key, value, receptance and gate; ``(B, T, C)`` each.

    Args:
        grid: where the tokens stand.
        options: shift_pixel, channel_gamma and heads of :func:`vrwkv.ops.q_shift_mix`.
        x: tokens, ``(B, T, C)``.
        decay: the decays' part that does not depend on the tokens, ``(C,)``.
        mix_matrix, mix_matrices: low-rank matrices of the mixes, ``(C, 5 R)`` and ``(5, R, C)``.
        decay_matrix, decay_matrices: those of the decays, ``(C, R)`` and ``(R, C)``.
        mix: share of the shifted tokens in what the mixes depend on, ``(C,)``.
        mixes: the mixes' parts that do not depend on the tokens, ``(C,)`` each.
    """
    base, shifted = q_shift_mix_on(grid, x, (1 - mix, torch.zeros_like(mix)), *options)
    h = base @ mix_matrix.to(x.dtype)
    xw, *rest = low_rank_mix(x, shifted, h, mix_matrices, torch.stack(mixes))
    return low_rank(xw @ decay_matrix.to(x.dtype), decay_matrices, decay), *rest
