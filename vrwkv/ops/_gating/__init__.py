"""The pointwise functions of the mixes (arXiv 2403.02308, equations 3 and 6), each in one pass over memory."""

import torch
from torch import Tensor

from vrwkv.ops import _checks, _extension
from vrwkv.ops._gating import torch_impl

__all__ = ["sigmoid_gate", "squared_relu"]


def sigmoid_gate(r: Tensor, y: Tensor) -> Tensor:
    """``sigmoid(r) * y`` element by element.

    Args:
        r: gate before the sigmoid, any shape, fp16, bf16, fp32 or fp64.
        y: what is gated, of ``r``'s shape and device; dtypes that differ are promoted as in torch.

    Returns:
        A tensor of that shape, computed in fp32 (fp64 for fp64 input), differentiable in both arguments.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: shapes or devices differ, or a dtype is not supported.
    """
    _checks.check_tensors("sigmoid_gate", r=r, y=y)
    if r.dtype != y.dtype:
        _checks.check_floating("sigmoid_gate", "r", r)
        _checks.check_floating("sigmoid_gate", "y", y)
        dtype = torch.promote_types(r.dtype, y.dtype)
        r, y = r.to(dtype), y.to(dtype)
    return _extension.call("sigmoid_gate", torch_impl.sigmoid_gate, _check_gate, r, r, y)


def _check_gate(r: Tensor, y: Tensor) -> None:
    _checks.check_floating("sigmoid_gate", "r", r)
    _checks.check_same("sigmoid_gate", "y", y, "r", r)


def squared_relu(x: Tensor, inplace: bool = False) -> Tensor:
    """``relu(x) ** 2`` element by element.

    Args:
        x: any shape, fp16, bf16, fp32 or fp64.
        inplace: ``x`` may be overwritten; done where the layout and autograd allow it.

    Returns:
        A tensor like ``x``, differentiable. The kernels keep it for the backward pass, not ``x``.

    Raises:
        TypeError: ``x`` is no tensor.
        RuntimeError: the dtype is not supported.
    """
    _checks.check_tensors("squared_relu", x=x)
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    # A compiler plans memory by itself, and torch.jit.trace knows no functions of our own.
    inplace = inplace and x.is_contiguous() and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    if not _extension.is_native(x):
        _check_square(x)
        return x.relu_().square_() if inplace and not wants_gradient else torch_impl.squared_relu(x)
    if inplace and not wants_gradient:
        torch.ops.vrwkv.squared_relu_.default(x)
        torch.autograd.graph.increment_version(x)  # for those that have kept x
        return x
    # Autograd forbids it for leaves and for some views, such as outputs of modules with backward hooks.
    if inplace and not (x.is_leaf or x._is_view()):
        return _SquaredReluInPlace.apply(x)
    return torch.ops.vrwkv.squared_relu.default(x)


def _check_square(x: Tensor) -> None:
    _checks.check_floating("squared_relu", "x", x)


if _extension.NATIVE_DEVICES:

    def _like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @torch.library.register_fake("vrwkv::sigmoid_gate")
    def _(r: Tensor, y: Tensor) -> Tensor:
        _check_gate(r, y)
        return _like(y)

    @torch.library.register_fake("vrwkv::_sigmoid_gate_backward")
    def _(grad: Tensor, r: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return _like(r), _like(y)

    @torch.library.register_fake("vrwkv::squared_relu")
    def _(x: Tensor) -> Tensor:
        _check_square(x)
        return _like(x)

    @torch.library.register_fake("vrwkv::squared_relu_")
    def _(x: Tensor) -> None:
        _check_square(x)

    @torch.library.register_fake("vrwkv::_squared_relu_backward")
    def _(grad: Tensor, y: Tensor) -> Tensor:
        return _like(y)

    def _save_output(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)

    def _square_backward(ctx, grad: Tensor):
        (y,) = ctx.saved_tensors
        if _extension.has_native_backward(grad):
            return torch.ops.vrwkv._squared_relu_backward.default(grad, y)
        positive = y > 0  # 2 relu(x), without the infinite slope of a root at 0
        return grad * torch.where(positive, 2 * torch.where(positive, y, 1).sqrt(), 0)

    _extension.register_autograd("sigmoid_gate", torch_impl.sigmoid_gate)
    torch.library.register_autograd("vrwkv::squared_relu", _square_backward, setup_context=_save_output)

    class _SquaredReluInPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            torch.ops.vrwkv.squared_relu_.default(x)
            ctx.mark_dirty(x)
            ctx.save_for_backward(x)
            return x

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return _square_backward(ctx, grad)
