"""The bidirectional RWKV-6 recurrence of VRWKV6 (arXiv 2404.05892, section 4; arXiv 2403.02308)."""

import torch
from torch import Tensor

from vrwkv.ops import _checks, _extension
from vrwkv.ops._wkv6 import torch_impl

__all__ = ["wkv6"]


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    r"""Bidirectional recurrence with a matrix-valued state and a decay that depends on the token, each head on its own.

    .. code-block:: text

        y_t = r_t ( sum_{i != t} diag( prod_{j between i and t} d_j ) k_i^T v_i  +  diag(u) k_t^T v_t ),
        d_j = exp(-exp(w_j))

    which is ``r_t (S^fwd_{t-1} + diag(u) k_t^T v_t + S^bwd_{t+1})``, ``S_t = diag(d_t) S_{t-1} + k_t^T v_t`` forward
    and the same backward in time. ``j`` runs over the tokens strictly between: neighbours meet undecayed. Time and
    memory are linear in T, without a limit on T.

    Args:
        r: receptances, ``(B, T, H, N)``, fp16, bf16, fp32 or fp64.
        k: keys, ``(B, T, H, N)``, of ``r``'s dtype and device.
        v: values, ``(B, T, H, N)``, likewise.
        w: raw decays, ``(B, T, H, N)``, likewise, of any sign and size.
        u: bonus of the token itself, ``(H, N)``. It may have another floating dtype than ``r``.

    Returns:
        ``(B, T, H, N)`` in ``r``'s dtype. Sums are taken in fp32 (fp64 for fp64 input). Differentiable in every
        argument; gradients are the same bits on every run and for any number of threads.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: a shape, dtype or device does not fit.
    """
    _checks.check_tensors("wkv6", r=r, k=k, v=v, w=w, u=u)
    u = _checks.accumulated(u, r)
    return _extension.call("wkv6", torch_impl.wkv6, _check, r, r, k, v, w, u)


def _check(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> None:
    _checks.check_floating("wkv6", "r", r)
    if r.dim() != 4:
        raise RuntimeError(f"wkv6: r must have shape (B, T, H, N), got {tuple(r.shape)}")
    for name, tensor in (("k", k), ("v", v), ("w", w)):
        _checks.check_same("wkv6", name, tensor, "r", r)
    _checks.check_device("wkv6", "u", u, "r", r)
    _checks.check_floating("wkv6", "u", u)
    if u.shape != r.shape[2:]:
        raise RuntimeError(f"wkv6: u must have shape (H, N) = {tuple(r.shape[2:])} to match r, got {tuple(u.shape)}")


if _extension.NATIVE_DEVICES:

    @torch.library.register_fake("vrwkv::wkv6")
    def _(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        _check(r, k, v, w, u)
        return torch.empty_like(r, memory_format=torch.contiguous_format)

    @torch.library.register_fake("vrwkv::_wkv6_backward")
    def _(
        grad: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        tokens = torch.empty_like(r, memory_format=torch.contiguous_format)
        return tokens, torch.empty_like(tokens), torch.empty_like(tokens), torch.empty_like(tokens), torch.empty_like(u)

    _extension.register_autograd("wkv6", torch_impl.wkv6)
