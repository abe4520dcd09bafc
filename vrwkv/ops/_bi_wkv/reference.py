"""Bi-WKV written as its formula: slow, obvious, and what the tests trust."""

import torch
from torch import Tensor


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mean of ``v`` under softmax weights, from the whole (T, T) matrix of exponents of one channel at a time.

    Args:
        w, u: decay and bonus, ``(C,)``.
        k, v: keys and values, ``(B, T, C)``.

    Returns:
        ``(B, T, C)``, computed in the dtype given (the tests give float64).
    """
    positions = torch.arange(k.shape[1], device=k.device)
    distance = (positions[:, None] - positions).abs()  # (T, T)
    outputs = []
    for c in range(k.shape[2]):
        decay = torch.where(distance == 0, u[c], -(distance - 1) * w[c])
        weights = (decay + k[:, None, :, c]).softmax(dim=-1)  # (B, T, T)
        outputs.append((weights @ v[:, :, c, None]).squeeze(-1))
    return torch.stack(outputs, dim=-1) if outputs else torch.empty_like(k)
