"""Bi-WKV, the bidirectional linear attention of Vision-RWKV (arXiv 2403.02308, section 3.3)."""

import torch
from torch import Tensor

from vrwkv.ops import _checks, _extension
from vrwkv.ops._bi_wkv import torch_impl

__all__ = ["bi_wkv"]


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""Bidirectional weighted key-value attention over tokens, each channel on its own.

    .. code-block:: text

        y_t = ( sum_{i != t} exp(-(|t-i|-1) w + k_i) v_i  +  exp(u + k_t) v_t )
            / ( sum_{i != t} exp(-(|t-i|-1) w + k_i)      +  exp(u + k_t)     )

    Time and memory are linear in T. ``w`` and ``u`` are used as given: the layer divides its parameters by T before the
    call. The authors' CUDA kernels start every one of 32 token segments one step of decay off and so differ from this
    formula by 1e-5 to 1e-3 at initial decay values, more at large ``w``; this op follows the formula.

    Args:
        w: decay per channel, ``(C,)``, any sign. It may have another floating dtype than ``k``.
        u: bonus of the token itself per channel, ``(C,)``, likewise.
        k: keys, ``(B, T, C)``, fp16, bf16, fp32 or fp64.
        v: values, ``(B, T, C)``, of ``k``'s dtype and device.

    Returns:
        ``(B, T, C)`` in ``k``'s dtype. Sums are taken in fp32 (fp64 for fp64 input). Differentiable in every
        argument; gradients are the same bits on every run and for any number of threads.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: a shape, dtype or device does not fit.
    """
    _checks.check_tensors("bi_wkv", w=w, u=u, k=k, v=v)
    w, u = _checks.accumulated(w, k), _checks.accumulated(u, k)
    return _extension.call("bi_wkv", torch_impl.bi_wkv, _check, k, w, u, k, v)


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> None:
    _checks.check_tokens("bi_wkv", "k", k)
    _checks.check_same("bi_wkv", "v", v, "k", k)
    _checks.check_per_channel("bi_wkv", "w", w, "k", k)
    _checks.check_per_channel("bi_wkv", "u", u, "k", k)


if _extension.NATIVE_DEVICES:

    @torch.library.register_fake("vrwkv::bi_wkv")
    def _(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _check(w, u, k, v)
        return torch.empty_like(k, memory_format=torch.contiguous_format)

    @torch.library.register_fake("vrwkv::_bi_wkv_backward")
    def _(grad: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = torch.empty_like(k, memory_format=torch.contiguous_format)
        return torch.empty_like(w), torch.empty_like(u), tokens, torch.empty_like(tokens)

    _extension.register_autograd("bi_wkv", torch_impl.bi_wkv)
