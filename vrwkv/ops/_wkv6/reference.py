"""The bidirectional RWKV-6 recurrence token by token: slow, obvious, and what the tests trust."""

import torch
from torch import Tensor


def _states(k: Tensor, v: Tensor, d: Tensor) -> Tensor:
    """The state ahead of each token, ``S_t = diag(d_t) S_{t-1} + k_t^T v_t`` from zero; ``(B, T, H, N, N)``."""
    state = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None])
    states = []
    for t in range(k.shape[1]):
        states.append(state)
        state = d[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
    return torch.stack(states, dim=1)


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """``y_t = r_t (S^fwd_{t-1} + diag(u) k_t^T v_t + S^bwd_{t+1})``.

    Args:
        r, k, v, w: receptances, keys, values and raw decays, ``(B, T, H, N)``.
        u: bonus of the token itself, ``(H, N)``.

    Returns:
        ``(B, T, H, N)``, computed in the dtype given (the tests give float64).
    """
    if r.numel() == 0:
        return r * k * v * w * u
    d = torch.exp(-torch.exp(w))
    own = u[:, :, None] * k[..., :, None] * v[..., None, :]  # (B, T, H, N, N)
    states = _states(k, v, d) + own + _states(k.flip(1), v.flip(1), d.flip(1)).flip(1)
    return (r[..., None, :] @ states).squeeze(-2)
