"""Inputs of Bi-WKV whose float64 results are computed once and serve every dtype."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vrwkv.ops._bi_wkv import reference

NAMES = ("w", "u", "k", "v")
REGIMES = ("initial", "decay", "keys", "both", "spread")


@dataclass
class Case:
    inputs: list[Tensor]  # w, u, k, v in float64, k and v exact in every dtype
    grad: Tensor
    y: Tensor
    gradients: list[Tensor]
    scales: list[float]  # magnitude of the terms of y and of each gradient: what rounding errors are relative to

    def to(self, dtype: torch.dtype) -> list[Tensor]:
        """grad, w, u, k, v as the kernels take them."""
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        w, u, k, v = self.inputs
        return [self.grad.to(dtype), w.to(accumulate), u.to(accumulate), k.to(dtype), v.to(dtype)]


def _exact(x: Tensor) -> Tensor:
    """Round to what fp16 and bf16 both hold."""
    return torch.where(x.abs() < 2**-10, 0, x).bfloat16().double()


def _terms(w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, grad: Tensor) -> list[float]:
    """Sums of the absolute terms of the gradients of w, u, k and v; their largest values."""
    positions = torch.arange(k.shape[1])
    sums = [torch.zeros_like(x) for x in (w, u, k, v)]
    for t in positions:
        steps = ((positions - t).abs() - 1)[:, None].double()
        exponent = torch.where(positions[:, None] == t, u, -steps * w)
        pairs = (exponent + k).softmax(dim=1) * grad[:, t, None].abs()
        spread = pairs * (v.abs() + y[:, t, None].abs())
        sums[0] += (spread * steps.clamp_min(0)).sum((0, 1))
        sums[1] += spread[:, t].sum(0)
        sums[2] += spread
        sums[3] += pairs
    return [total.max().item() for total in sums]


@cache
def make_case(batch: int, tokens: int, channels: int, regime: str = "initial") -> Case:
    """Keys and decays as at initialisation, or decays to 1e3 / T, or keys to 1e4, or both.

    "spread": decays on both sides of what one reference for a tile of 256 tokens can hold, keys that lie far apart, one
    of them above all others and one masked.
    """
    generator = torch.Generator().manual_seed(batch * tokens + channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w = torch.linspace(-5, 3, channels, dtype=torch.float64) / tokens
    if regime in ("decay", "both"):
        w = torch.linspace(-1e3, 1e3, channels, dtype=torch.float64) / tokens
    k = normal(batch, tokens, channels)
    if regime in ("keys", "both"):
        k = (torch.rand(k.shape, generator=generator, dtype=torch.float64) * 2 - 1) * 1e4
    if regime == "spread":
        w = torch.linspace(-17, 17, channels, dtype=torch.float64) / min(tokens, 256)
        k = 30 * k
        k[:, tokens // 3] += 200
        if tokens > 2:
            k[:, tokens // 2] = -math.inf
    u = normal(channels) if regime == "both" else normal(channels) / tokens
    w, u = w.float().double(), u.float().double()
    k, v, grad = _exact(k), _exact(normal(batch, tokens, channels)), _exact(normal(batch, tokens, channels))

    # The reference keeps T^2 values a channel for its gradient; torch spreads 2^15 elements over threads, which
    # is slower where other processes hold the cores.
    columns = max(1, min(10**7 // (tokens * tokens * batch), 2**15 // (tokens * batch)))
    parts = []
    for begin in range(0, channels, columns):
        some = slice(begin, begin + columns)
        inputs = [x[..., some].clone().requires_grad_() for x in (w, u, k, v)]
        y = reference.bi_wkv(*inputs)
        parts.append([y.detach(), *torch.autograd.grad(y, inputs, grad[..., some])])
    y, *gradients = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    scales = [v.abs().max().item(), *_terms(w, u, k, v, y, grad)]
    return Case([w, u, k, v], grad, y, gradients, scales)
