"""Low-rank functions of the tokens, which VRWKV6's mixes and decays are made of (arXiv 2404.05892, section 4.2)."""

import torch
from torch import Tensor

from vrwkv.ops import _checks, _extension
from vrwkv.ops._low_rank import torch_impl

__all__ = ["low_rank", "low_rank_mix"]


def low_rank(h: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """``offset + tanh(h) @ matrix`` for each token.

    Args:
        h: ``(B, T, R)``, fp16, bf16, fp32 or fp64.
        matrix: ``(R, C)``, floating.
        offset: ``(C,)``, floating.

    Returns:
        ``(B, T, C)`` in ``h``'s dtype, computed in fp32 (fp64 for fp64 input), differentiable in every argument.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: a shape, dtype or device does not fit.
    """
    _checks.check_tensors("low_rank", h=h, matrix=matrix, offset=offset)
    matrix, offset = _checks.accumulated(matrix, h), _checks.accumulated(offset, h)
    return _extension.call("low_rank", torch_impl.low_rank, _check_low_rank, h, h, matrix, offset)


def low_rank_mix(x: Tensor, y: Tensor, h: Tensor, matrices: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """``x + (y - x) * (offset_j + tanh(h_j) @ matrix_j)`` for each token and ``j < J``, in one pass.

    Args:
        x: tokens, ``(B, T, C)``, fp16, bf16, fp32 or fp64.
        y: what they are mixed with, ``(B, T, C)`` of ``x``'s dtype and device.
        h: ``(B, T, J * R)`` of ``x``'s dtype, the parts ``h_j`` one after the other.
        matrices: ``(J, R, C)``, floating.
        offsets: ``(J, C)``, floating: shares of ``y`` that do not depend on the tokens.

    Returns:
        J tensors ``(B, T, C)`` in ``x``'s dtype, computed in fp32 (fp64 for fp64 input), differentiable in every
        argument.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: a shape, dtype or device does not fit.
    """
    _checks.check_tensors("low_rank_mix", x=x, y=y, h=h, matrices=matrices, offsets=offsets)
    matrices, offsets = _checks.accumulated(matrices, x), _checks.accumulated(offsets, x)
    arguments = x, y, h, matrices, offsets
    return tuple(_extension.call("low_rank_mix", torch_impl.low_rank_mix, _check_mix, x, *arguments))


def _check_low_rank(h: Tensor, matrix: Tensor, offset: Tensor) -> None:
    _checks.check_tokens("low_rank", "h", h)
    if matrix.dim() != 2:
        raise RuntimeError(f"low_rank: matrix must have shape (R, C), got {tuple(matrix.shape)}")
    _check_parameter("low_rank", "matrix", matrix, (h.shape[2], matrix.shape[1]), "h", h)
    _check_parameter("low_rank", "offset", offset, (matrix.shape[1],), "matrix", matrix)


def _check_mix(x: Tensor, y: Tensor, h: Tensor, matrices: Tensor, offsets: Tensor) -> None:
    _checks.check_tokens("low_rank_mix", "x", x)
    _checks.check_same("low_rank_mix", "y", y, "x", x)
    if matrices.dim() != 3:
        raise RuntimeError(f"low_rank_mix: matrices must have shape (J, R, C), got {tuple(matrices.shape)}")
    _checks.check_tokens("low_rank_mix", "h", h)
    parts, rank, _ = matrices.shape
    wanted = (*x.shape[:2], parts * rank)
    if h.shape != wanted:
        raise RuntimeError(
            f"low_rank_mix: h must have shape (B, T, J * R) = {wanted} to match x and matrices, got {tuple(h.shape)}"
        )
    _checks.check_device("low_rank_mix", "h", h, "x", x)
    _checks.check_dtype("low_rank_mix", "h", h, "x", x)
    _check_parameter("low_rank_mix", "matrices", matrices, (parts, rank, x.shape[2]), "x", x)
    _check_parameter("low_rank_mix", "offsets", offsets, (parts, x.shape[2]), "matrices", matrices)


def _check_parameter(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], other_name: str, other: Tensor
) -> None:
    _checks.check_device(op, name, tensor, other_name, other)
    _checks.check_floating(op, name, tensor)
    if tensor.shape != shape:
        raise RuntimeError(f"{op}: {name} must have shape {shape} to match {other_name}, got {tuple(tensor.shape)}")


if _extension.NATIVE_DEVICES:
    # There are kernels for the CPU; elsewhere the operators run as torch ops.
    torch.library.impl("vrwkv::low_rank", "CUDA", torch_impl.low_rank)
    torch.library.impl("vrwkv::low_rank_mix", "CUDA", torch_impl.low_rank_mix)

    @torch.library.register_fake("vrwkv::low_rank")
    def _(h: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
        _check_low_rank(h, matrix, offset)
        return h.new_empty(*h.shape[:2], matrix.shape[1])

    @torch.library.register_fake("vrwkv::low_rank_mix")
    def _(x: Tensor, y: Tensor, h: Tensor, matrices: Tensor, offsets: Tensor) -> list[Tensor]:
        _check_mix(x, y, h, matrices, offsets)
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(matrices.shape[0])]

    def _save_inputs(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    def _low_rank_backward(ctx, grad: Tensor):
        if _extension.has_native_backward(grad):
            return torch_impl.low_rank_backward(grad, *ctx.saved_tensors[:2])
        return _extension.differentiable_gradients(torch_impl.low_rank, ctx.saved_tensors, grad)

    def _mix_backward(ctx, grads: list[Tensor | None]):
        inputs = ctx.saved_tensors
        given = [torch.zeros_like(inputs[0]) if grad is None else grad for grad in grads]
        if _extension.has_native_backward(*given):
            return torch_impl.low_rank_mix_backward(given, *inputs)
        return _extension.differentiable_gradients(torch_impl.low_rank_mix, inputs, given)

    torch.library.register_autograd("vrwkv::low_rank", _low_rank_backward, setup_context=_save_inputs)
    torch.library.register_autograd("vrwkv::low_rank_mix", _mix_backward, setup_context=_save_inputs)
