"""Inputs of wkv6 whose float64 results are computed once and serve every dtype and backend."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vrwkv.ops._wkv6 import reference

NAMES = ("r", "k", "v", "w", "u")
DECAYS = {"usual": (-8, 4), "extreme": (-50, 20)}


@dataclass
class Case:
    inputs: list[Tensor]  # r, k, v, w, u in float64, all but u exact in every dtype
    grad: Tensor
    y: Tensor
    gradients: list[Tensor]

    def to(self, dtype: torch.dtype) -> list[Tensor]:
        """grad, r, k, v, w, u as the kernels take them."""
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        *tokens, u = self.inputs
        return [self.grad.to(dtype), *(x.to(dtype) for x in tokens), u.to(accumulate)]


def make_inputs(batch: int, tokens: int, heads: int, size: int, decays: str = "usual", device="cpu") -> list[Tensor]:
    """r, k, v normal, w uniform over the range of ``decays``, u normal; rounded to what bf16 and fp16 both hold."""
    generator = torch.Generator().manual_seed(batch * tokens + size)
    shape = (batch, tokens, heads, size)
    r, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    low, high = DECAYS[decays]
    w = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    u = torch.randn(heads, size, generator=generator, dtype=torch.float64).float().double()
    exact = [torch.where(x.abs() < 2**-10, 0, x).bfloat16().double() for x in (r, k, v, w)]
    return [x.to(device) for x in (*exact, u)]


@cache
def make_case(batch: int, tokens: int, heads: int, size: int, decays: str = "usual") -> Case:
    """As from ``make_inputs``, for a few hundred tokens: the reference keeps the state of each for the gradients."""
    inputs = make_inputs(batch, tokens, heads, size, decays)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64).bfloat16().double()
    y = reference.wkv6(*(x.requires_grad_() for x in inputs))
    gradients = torch.autograd.grad(y, inputs, grad, materialize_grads=True)
    return Case([x.detach() for x in inputs], grad, y.detach(), list(gradients))
