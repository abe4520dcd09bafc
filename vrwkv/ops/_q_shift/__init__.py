"""Q-Shift, the quad-directional token shift of Vision-RWKV (arXiv 2403.02308, equations 4 and 5), alone and mixed."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from vrwkv.ops import _checks, _extension
from vrwkv.ops._q_shift import torch_impl

__all__ = ["q_shift", "q_shift_mix"]

_INTEGERS = (int, torch.SymInt, Integral)


def _check_options(
    op: str, patch_resolution: tuple[int, int], shift_pixel: int, channel_gamma: float, heads: int
) -> None:
    try:
        height, width = patch_resolution
        is_grid = _is_integer(height) and _is_integer(width)
    except (TypeError, ValueError):
        is_grid = False
    if not is_grid:
        raise TypeError(f"{op}: patch_resolution must be two integers (H, W), got {patch_resolution!r}")
    if not (isinstance(shift_pixel, int) and shift_pixel >= 0):
        raise ValueError(f"{op}: shift_pixel must be an integer >= 0, got {shift_pixel!r}")
    if not (isinstance(channel_gamma, int | float) and 0 <= channel_gamma <= 0.25):
        raise ValueError(f"{op}: channel_gamma must lie in [0, 1/4], four groups share the channels, "
                         f"got {channel_gamma!r}")  # fmt: skip
    if not (isinstance(heads, int) and heads >= 1):
        raise ValueError(f"{op}: heads must be an integer >= 1, got {heads!r}")


def _is_integer(size: Any) -> bool:
    # Sizes are tensors while torch.jit.trace runs.
    return isinstance(size, _INTEGERS) or (torch.jit.is_tracing() and isinstance(size, Tensor))


def _check_grid(op: str, x: Tensor, height: int, width: int, heads: int) -> None:
    _checks.check_tokens(op, "x", x)
    if height * width != x.shape[1] or height < 0 or width < 0:
        raise RuntimeError(
            f"{op}: patch_resolution (H, W) must satisfy H * W = T = {x.shape[1]}, got {(height, width)} "
            f"for x of shape {tuple(x.shape)}"
        )
    if x.shape[2] % heads:
        raise RuntimeError(f"{op}: heads must be at least 1 and divide C = {x.shape[2]}, got {heads}")


def _check_shift(x: Tensor, height: int, width: int, shift_pixel: int, channel_gamma: float, heads: int) -> None:
    _check_grid("q_shift", x, height, width, heads)


def _check_mix(
    x: Tensor, mixes: Sequence[Tensor], height: int, width: int, shift_pixel: int, channel_gamma: float, heads: int
) -> None:
    _check_grid("q_shift_mix", x, height, width, heads)
    for index, mix in enumerate(mixes):
        _checks.check_per_channel("q_shift_mix", f"mixes[{index}]", mix, "x", x)


def q_shift(
    x: Tensor, patch_resolution: tuple[int, int], shift_pixel: int = 1, channel_gamma: float = 1 / 4, heads: int = 1
) -> Tensor:
    """Move four groups of channels by ``shift_pixel`` on the (H, W) grid of tokens.

    With bounds ``b_i = int(C / heads * channel_gamma * i)``, channels ``[0, b_1)`` of each head take the value of the
    pixel to the left, ``[b_1, b_2)`` to the right, ``[b_2, b_3)`` above and ``[b_3, b_4)`` below; the rest stay. Zeros
    come in at the border.

    Args:
        x: tokens, ``(B, T, C)``, fp16, bf16, fp32 or fp64, row by row.
        patch_resolution: the grid ``(H, W)`` with ``H * W = T``.
        shift_pixel: distance in pixels.
        channel_gamma: share of the channels in each group, at most 1/4.
        heads: equal parts of the channels, one after the other, each with groups of its own.

    Returns:
        ``(B, T, C)`` in ``x``'s dtype, differentiable.

    Raises:
        TypeError: ``x`` is no tensor, or the grid is not two integers.
        ValueError: ``shift_pixel``, ``channel_gamma`` or ``heads`` is out of range.
        RuntimeError: the grid does not hold T tokens, ``heads`` does not divide C, or the dtype is not supported.
    """
    _checks.check_tensors("q_shift", x=x)
    _check_options("q_shift", patch_resolution, shift_pixel, channel_gamma, heads)
    height, width = patch_resolution
    arguments = x, height, width, shift_pixel, channel_gamma, heads
    return _extension.call("q_shift", torch_impl.q_shift, _check_shift, x, *arguments)


def q_shift_mix(
    x: Tensor,
    mixes: Sequence[Tensor],
    patch_resolution: tuple[int, int],
    shift_pixel: int = 1,
    channel_gamma: float = 1 / 4,
    heads: int = 1,
) -> tuple[Tensor, ...]:
    """``x * m + q_shift(x) * (1 - m)`` for every ``m`` in ``mixes``, in one pass over ``x`` for up to three of them.

    Args:
        x: tokens, ``(B, T, C)``, fp16, bf16, fp32 or fp64.
        mixes: share of the token itself per channel, each ``(C,)`` and floating.
        patch_resolution, shift_pixel, channel_gamma, heads: as in :func:`q_shift`.

    Returns:
        One ``(B, T, C)`` per mix in ``x``'s dtype, computed in fp32 (fp64 for fp64 input), differentiable in ``x`` and
        ``mixes``.

    Raises:
        TypeError: ``x`` is no tensor, ``mixes`` no list or tuple of them, or the grid is not two integers.
        ValueError: ``shift_pixel``, ``channel_gamma`` or ``heads`` is out of range.
        RuntimeError: a shape, dtype or device does not fit.
    """
    if not isinstance(mixes, list | tuple):
        raise TypeError(f"q_shift_mix: mixes must be a list or tuple of tensors, got {type(mixes).__name__}")
    _checks.check_tensors("q_shift_mix", x=x, **{f"mixes[{i}]": mix for i, mix in enumerate(mixes)})
    _check_options("q_shift_mix", patch_resolution, shift_pixel, channel_gamma, heads)
    height, width = patch_resolution
    mixes = [_checks.accumulated(mix, x) for mix in mixes]
    arguments = x, mixes, height, width, shift_pixel, channel_gamma, heads
    return tuple(_extension.call("q_shift_mix", torch_impl.q_shift_mix, _check_mix, x, *arguments))


if _extension.NATIVE_DEVICES:

    @torch.library.register_fake("vrwkv::q_shift")
    def _(x: Tensor, height: int, width: int, shift_pixel: int, channel_gamma: float, heads: int) -> Tensor:
        _check_shift(x, height, width, shift_pixel, channel_gamma, heads)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @torch.library.register_fake("vrwkv::q_shift_mix")
    def _(
        x: Tensor, mixes: list[Tensor], height: int, width: int, shift_pixel: int, channel_gamma: float, heads: int
    ) -> list[Tensor]:
        _check_mix(x, mixes, height, width, shift_pixel, channel_gamma, heads)
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in mixes]

    @torch.library.register_fake("vrwkv::_q_shift_mix_backward")
    def _(
        grads: list[Tensor],
        x: Tensor,
        mixes: list[Tensor],
        height: int,
        width: int,
        shift_pixel: int,
        channel_gamma: float,
        heads: int,
    ) -> tuple[Tensor, list[Tensor]]:
        return torch.empty_like(x, memory_format=torch.contiguous_format), [torch.empty_like(mix) for mix in mixes]

    def _setup_shift(ctx, inputs, output) -> None:
        ctx.arguments = inputs[1:]

    def _shift_backward(ctx, grad: Tensor):
        height, width, shift_pixel, *groups = ctx.arguments
        shift = torch.ops.vrwkv.q_shift.default if _extension.is_native(grad) else torch_impl.q_shift
        # The adjoint of a shift that drops what leaves the grid is the shift the other way.
        grad_x = shift(grad, height, width, -shift_pixel, *groups)
        return grad_x, None, None, None, None, None

    def _setup_mix(ctx, inputs, output) -> None:
        x, mixes, *ctx.arguments = inputs
        ctx.save_for_backward(x, *mixes)

    def _mix_backward(ctx, grads: list[Tensor | None]):
        x, *mixes = ctx.saved_tensors
        given = [torch.zeros_like(x) if grad is None else grad for grad in grads]
        if _extension.has_native_backward(*given):
            grad_x, grad_mixes = torch.ops.vrwkv._q_shift_mix_backward.default(given, x, mixes, *ctx.arguments)
        else:

            def mix_tokens(x: Tensor, *mixes: Tensor) -> list[Tensor]:
                return torch_impl.q_shift_mix(x, mixes, *ctx.arguments)

            grad_x, *grad_mixes = _extension.differentiable_gradients(mix_tokens, (x, *mixes), given)
        return grad_x, grad_mixes, None, None, None, None, None

    torch.library.register_autograd("vrwkv::q_shift", _shift_backward, setup_context=_setup_shift)
    torch.library.register_autograd("vrwkv::q_shift_mix", _mix_backward, setup_context=_setup_mix)
