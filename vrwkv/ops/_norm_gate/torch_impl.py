"""The normalised gate from torch ops alone, and its gradients, which every backend takes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_gate(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``y (B, T, H, N)`` and ``g (B, T, C)`` with ``weight, bias (C,)`` in fp32 or fp64; returns ``(B, T, C)``."""
    normal = F.layer_norm(y.to(weight.dtype), y.shape[3:], eps=eps).flatten(2)
    gate = g.to(weight.dtype)
    # Not F.silu, whose gradient knows no forward mode.
    return (torch.addcmul(bias, normal, weight) * (gate * torch.sigmoid(gate))).to(g.dtype)


def norm_gate_backward(
    grad: Tensor, y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four tensors for ``grad (B, T, C)`` of the result."""
    grad, gate = grad.to(weight.dtype), g.to(weight.dtype)
    no_affine = y.shape[3:], None, None
    normal, mean, scale = torch.native_layer_norm(y.to(weight.dtype), *no_affine, eps)
    flat = normal.flatten(2)
    grad_norm = grad * F.silu(gate)
    grad_g = torch.ops.aten.silu_backward(grad * torch.addcmul(bias, flat, weight), gate)
    grad_normal = (grad_norm * weight).view_as(y)
    grad_y, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad_normal, y.to(weight.dtype), y.shape[3:], mean, scale, None, None, [True, False, False]
    )
    return grad_y.to(y.dtype), grad_g.to(g.dtype), (grad_norm * flat).sum((0, 1)), grad_norm.sum((0, 1))
