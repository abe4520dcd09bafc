"""What VRWKV6 does to the output of its recurrence: a norm in each head and a gate (arXiv 2404.05892, section 4.1)."""

from functools import partial

import torch
from torch import Tensor

from vrwkv.ops import _checks, _extension
from vrwkv.ops._norm_gate import torch_impl

__all__ = ["norm_gate"]


def norm_gate(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """``GroupNorm(y) * silu(g)``, the norm over the channels of each head of each token, in one pass over memory.

    Args:
        y: ``(B, T, H, N)``, fp16, bf16, fp32 or fp64.
        g: gate before the SiLU, ``(B, T, H * N)`` of ``y``'s dtype and device.
        weight, bias: of the norm, ``(H * N,)``, floating.
        eps: what is added to the variance.

    Returns:
        ``(B, T, H * N)`` in ``y``'s dtype, computed in fp32 (fp64 for fp64 input), differentiable in every tensor.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: a shape, dtype or device does not fit.
    """
    _checks.check_tensors("norm_gate", y=y, g=g, weight=weight, bias=bias)
    weight, bias = _checks.accumulated(weight, g), _checks.accumulated(bias, g)
    return _extension.call("norm_gate", torch_impl.norm_gate, _check, y, y, g, weight, bias, eps)


def _check(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    _checks.check_tokens("norm_gate", "g", g)
    if y.dim() != 4 or y.shape[:2] != g.shape[:2] or y.shape[2] * y.shape[3] != g.shape[2]:
        raise RuntimeError(
            "norm_gate: y must have shape (B, T, H, N) with B, T and H * N those of g, "
            f"{tuple(g.shape)}, got {tuple(y.shape)}"
        )
    _checks.check_device("norm_gate", "y", y, "g", g)
    _checks.check_dtype("norm_gate", "y", y, "g", g)
    _checks.check_per_channel("norm_gate", "weight", weight, "g", g)
    _checks.check_per_channel("norm_gate", "bias", bias, "g", g)


if _extension.NATIVE_DEVICES:
    # There is a kernel for the CPU; elsewhere the operator runs as torch ops.
    torch.library.impl("vrwkv::norm_gate", "CUDA", torch_impl.norm_gate)

    @torch.library.register_fake("vrwkv::norm_gate")
    def _(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        _check(y, g, weight, bias, eps)
        return torch.empty_like(g, memory_format=torch.contiguous_format)

    def _setup(ctx, inputs, output) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    def _backward(ctx, grad: Tensor):
        y, g, weight, bias = inputs = ctx.saved_tensors
        if _extension.has_native_backward(grad):
            return *torch_impl.norm_gate_backward(grad, y, g, weight, bias, ctx.eps), None
        function = partial(torch_impl.norm_gate, eps=ctx.eps)
        return *_extension.differentiable_gradients(function, inputs, grad), None

    torch.library.register_autograd("vrwkv::norm_gate", _backward, setup_context=_setup)
