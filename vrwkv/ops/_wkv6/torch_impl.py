"""The bidirectional RWKV-6 recurrence from torch ops alone, as matrix products over chunks of tokens.

Two tokens meet with the product of the decays of the tokens between them. Every exponent here is a sum of logarithms of
decays between a token and a point next to it, none a difference of sums: it is never positive, loses nothing to
cancellation, and holds for any decay. Inside a chunk that point is the middle of a block: the tokens of its two halves
meet in one product, and blocks of 2, 4, 8 ... tokens cover all pairs of the chunk. Beyond, it is the chunk's border,
where a state of N x N goes from chunk to chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from vrwkv.ops._autocast import without_autocast

_CHUNK = 64  # tokens; a power of two
_LARGEST_W = 30.0  # exp(-exp(w)) is zero long before, and exp(w) still far from infinity


def _to_border(log_decay: Tensor, reverse: bool) -> Tensor:
    """The product of the decays between the border of ``(..., tokens, N)`` and each token, in its dtype.

    The border is the first token's side, with ``reverse`` the last one's; a token's own decay is left out.
    """
    tokens = log_decay.shape[-2]
    if reverse:
        return F.pad(log_decay[..., 1:, :].flip(-2), (0, 0, 1, 0)).cumsum(-2).flip(-2).exp()
    return F.pad(log_decay[..., : tokens - 1, :], (0, 0, 1, 0)).cumsum(-2).exp()


def _inside_chunks(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """What tokens get from the others of their chunk; everything ``(..., C, N)`` with C a power of two."""
    y = torch.zeros_like(v)
    half = 1
    while half < r.shape[-2]:
        r_, k_, v_, log_decay_ = (x.unflatten(-2, (-1, 2, half)) for x in (r, k, v, log_decay))
        left, right = log_decay_.unbind(-3)
        to_middle = torch.stack((_to_border(left, reverse=True), _to_border(right, reverse=False)), dim=-3)
        weights = (r_ * to_middle) @ (k_ * to_middle).flip(-3).mT  # each half meets the other
        y = y + (weights @ v_.flip(-3)).flatten(-4, -2)
        half *= 2
    return y


def _between_chunks(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """What tokens get from earlier chunks; everything ``(..., chunks, C, N)``."""
    added = (k * _to_border(log_decay, reverse=True)).mT @ v  # (..., chunks, N, N)
    decays = log_decay.sum(-2).exp().unsqueeze(-1)
    return (r * _to_border(log_decay, reverse=False)) @ _states(decays, added)


def _states(decays: Tensor, added: Tensor) -> Tensor:
    """The state before each chunk; ``decays (..., chunks, N, 1)``, ``added`` and the result ``(..., chunks, N, N)``."""
    empty = torch.zeros_like(added[..., 0, :, :])
    if torch.compiler.is_exporting():  # a loop in the graph: it must serve any number of chunks
        return scan(_next_state, empty, (decays, added), dim=added.dim() - 3)[1]
    states = [empty]
    for decay, add in zip(decays.unbind(-3)[:-1], added.unbind(-3)[:-1], strict=True):
        states.append(torch.addcmul(add, decay, states[-1]))
    return torch.stack(states, dim=-3)


def _next_state(state: Tensor, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    decay, add = chunk
    return torch.addcmul(add, decay, state), state.clone()


def _sum_over_tokens(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    tokens = r.shape[1]
    r, k, v, w = (x.to(u.dtype).transpose(1, 2) for x in (r, k, v, w))  # (B, H, T, N)
    own = (r * u[:, None] * k).sum(-1, keepdim=True) * v
    exporting = torch.compiler.is_exporting()
    chunk = _CHUNK if exporting else min(_CHUNK, max(2, 1 << (int(tokens) - 1).bit_length()))
    padding = -tokens % chunk
    r, k, v, log_decay = (
        F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, chunk)) for x in (r, k, v, -w.clamp(max=_LARGEST_W).exp())
    )  # (B, H, chunks, C, N)
    y = _inside_chunks(r, k, v, log_decay)
    if exporting or tokens > chunk:
        both = (torch.stack((x, x.flip(2, 3))) for x in (r, k, v, log_decay))
        forward, backward = _between_chunks(*both).unbind()
        y = y + forward + backward.flip(2, 3)
    return (own + y.flatten(2, 3)[:, :, :tokens]).transpose(1, 2)


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """``r, k, v, w (B, T, H, N)`` with ``u (H, N)`` in fp32 or fp64; returns ``(B, T, H, N)`` in ``r``'s dtype."""
    if r.numel() == 0:
        return (r * k * v * w * u).to(r.dtype)
    with without_autocast(r):  # which would take the products in half precision
        return _sum_over_tokens(r, k, v, w, u).to(r.dtype).contiguous()
