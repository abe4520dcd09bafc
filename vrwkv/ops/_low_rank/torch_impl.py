"""The low-rank functions from torch ops alone, and their gradients, which every backend takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vrwkv.ops._autocast import without_autocast
from vrwkv.ops._lerp import lerp


def low_rank(h: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """``h (B, T, R)`` with ``matrix (R, C)`` and ``offset (C,)`` in fp32 or fp64; returns ``(B, T, C)`` like ``h``."""
    with without_autocast(h):
        return (offset + torch.tanh(h.to(matrix.dtype)) @ matrix).to(h.dtype)


def low_rank_backward(grad: Tensor, h: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``h``, ``matrix`` and the offset."""
    rows, t = grad.to(matrix.dtype).flatten(0, 1), torch.tanh(h.to(matrix.dtype)).flatten(0, 1)
    with without_autocast(h):
        grad_h = (rows @ matrix.T) * (1 - t * t)
        return grad_h.view_as(h).to(h.dtype), t.T @ rows, rows.sum(0)


def low_rank_mix(x: Tensor, y: Tensor, h: Tensor, matrices: Tensor, offsets: Tensor) -> list[Tensor]:
    """``x, y (B, T, C)`` and ``h (B, T, J * R)`` with ``matrices (J, R, C)`` and ``offsets (J, C)`` in fp32 or fp64."""
    wide_x, wide_y = x.to(matrices.dtype), y.to(matrices.dtype)
    weights = (low_rank(*part) for part in zip(_parts(h, matrices), matrices, offsets, strict=True))
    return [lerp(wide_x, wide_y, weight).to(x.dtype) for weight in weights]


def low_rank_mix_backward(
    grads: Sequence[Tensor], x: Tensor, y: Tensor, h: Tensor, matrices: Tensor, offsets: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of ``x``, ``y``, ``h``, ``matrices`` and ``offsets`` for ``grads (B, T, C)`` of the J results."""
    dtype = matrices.dtype
    difference = y.to(dtype) - x.to(dtype)
    grad_y, total = torch.zeros_like(difference), torch.zeros_like(difference)
    small = []
    for grad, part, matrix, offset in zip(grads, _parts(h, matrices), matrices, offsets, strict=True):
        grad = grad.to(dtype)
        total += grad
        grad_y.addcmul_(grad, low_rank(part, matrix, offset))
        small.append(low_rank_backward(grad * difference, part, matrix))
    grad_hs, grad_matrices, grad_offsets = zip(*small, strict=True)
    return (
        (total - grad_y).to(x.dtype),
        grad_y.to(y.dtype),
        torch.cat(grad_hs, dim=2).to(h.dtype),
        torch.stack(grad_matrices),
        torch.stack(grad_offsets),
    )


def _parts(h: Tensor, matrices: Tensor) -> tuple[Tensor, ...]:
    """The J parts of ``h``, in the dtype of sums."""
    return h.to(matrices.dtype).split(matrices.shape[1], dim=2)
