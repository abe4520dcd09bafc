"""Bi-WKV from torch ops alone: for devices without a kernel, machines without a compiler, and ONNX.

Prefix and suffix sums are one exclusive scan over a stacked pair (tokens, tokens reversed). The scan is a tree of
radix 16: each level runs 16 steps over all its segments at once, and the segment totals are scanned by the level above,
so T tokens take about ``16 * log16(T)`` small steps. Every state carries the logarithm of its scale, a running maximum,
so no sum can overflow and none that matters can underflow.

An exported graph must serve every T, so it cannot have a number of levels that follows T. There tokens form 8
segments, whatever their number: sums inside a segment are cumulative sums, and segments meet in pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_RADIX = 16
_SEGMENTS = 8  # of an exported graph
_EMPTY = -1e30  # the log-scale of a sum without terms; finite, so that differences never give NaN

EXPORTED_DECAY = 40.0 * _SEGMENTS
"""Largest ``|w| T`` that an exported graph is right for."""


def _exclusive_scan(w: Tensor, k: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Sums over earlier tokens, ``X_t = sum_{i < t} exp(k_i - (t - 1 - i) w) x_i``, in scaled parts.

    Args:
        w: decay per step, ``(C,)``.
        k: log-weights, ``(N, T, C)``.
        x: terms, ``(N, T, 2, C)``: numerator and denominator.

    Returns:
        Pairs of a log-scale ``(N, T, C)`` and a scaled sum ``(N, T, 2, C)``; ``X`` is the sum over pairs of
        ``exp(log-scale) * scaled``.
    """
    batch, tokens, channels = k.shape
    length = min(_RADIX, tokens)
    segments = -(-tokens // length)
    padding = segments * length - tokens
    k = F.pad(k, (0, 0, 0, padding), value=_EMPTY).reshape(batch * segments, length, channels)
    x = F.pad(x, (0, 0, 0, 0, 0, padding)).reshape(batch * segments, length, 2, channels)

    steps = torch.arange(length, device=k.device, dtype=k.dtype)[:, None] * w  # (L, C)
    # Relative to a decay that starts at the segment, exp(k_i + i w) are plain weights with a running maximum.
    weights = (k + steps).unbind(1)
    maxima = [torch.full_like(weights[0], _EMPTY)]
    for weight in weights:
        maxima.append(torch.maximum(maxima[-1], weight.detach()))
    maximum = torch.stack(maxima, dim=1)  # (N S, L + 1, C)
    keep = (maximum[:, :-1] - maximum[:, 1:]).exp().unsqueeze(2).unbind(1)
    added = (((k + steps) - maximum[:, 1:]).exp().unsqueeze(2) * x).unbind(1)
    sums = [torch.zeros_like(added[0])]
    for factor, term in zip(keep, added, strict=True):
        sums.append(torch.addcmul(term, factor, sums[-1]))

    def unfold(states: Tensor) -> Tensor:
        return states.reshape(batch, segments * length, *states.shape[2:])[:, :tokens]

    local = unfold(maximum[:, :-1] - (steps - w)), unfold(torch.stack(sums[:-1], dim=1))
    if segments == 1:
        return [local]

    totals_k = (maximum[:, -1] - (length - 1) * w).reshape(batch, segments, channels)
    totals_x = sums[-1].reshape(batch, segments, 2, channels)
    parts = [local]
    for scale, carried in _exclusive_scan(w * length, totals_k, totals_x):
        scale = unfold(scale.reshape(batch * segments, 1, channels) - steps)
        carried = carried.reshape(batch * segments, 1, 2, channels).expand(-1, length, -1, -1)
        parts.append((scale, unfold(carried)))
    return parts


def _exported(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV as one graph for every T, in the dtype of ``w``.

    Inside a segment plain weights ``exp(k_i - max k + i w)`` are summed, so ``|w| T`` must stay below
    :data:`EXPORTED_DECAY`. Numerators and denominators stand side by side, ``(..., 2 C)``.
    """
    tokens = k.shape[1]
    length = (tokens + _SEGMENTS - 1) // _SEGMENTS
    padding = (0, 0, 0, length * _SEGMENTS - tokens)
    k = F.pad(k, padding, value=_EMPTY).unflatten(1, (_SEGMENTS, length))  # (B, S, L, C)
    v = F.pad(v, padding).unflatten(1, (_SEGMENTS, length))
    largest = k.amax(2)  # (B, S, C)
    weights = (k - largest.unsqueeze(2)).exp()
    terms = torch.cat((weights * v, weights), dim=-1)
    places = torch.arange(length, device=k.device, dtype=k.dtype).unsqueeze(1)  # (L, 1)
    growth = _twice((places * w).exp())
    forward, backward = terms * growth, terms * growth.flip(0)
    before = F.pad(forward[:, :, : length - 1], (0, 0, 1, 0)).cumsum(2)
    after = F.pad(backward[:, :, 1:], (0, 0, 0, 1)).flip(2).cumsum(2).flip(2)

    numbers = torch.arange(_SEGMENTS, device=k.device)
    apart = (numbers[:, None] - numbers).unsqueeze(2)  # (S, S, 1)
    # Of a segment's sum, as the next token of another one meets it; of its own largest term.
    scales = largest.unsqueeze(1) - (apart.abs() * length - 1).clamp(min=0) * w  # (B, S, S, C)
    maximum = scales.amax(2)  # (B, S, C)
    weights = _twice((scales - maximum.unsqueeze(2)).exp())
    earlier = (torch.where(apart > 0, weights, 0) * forward.sum(2).unsqueeze(1)).sum(2, keepdim=True)  # (B, S, 1, 2 C)
    later = (torch.where(apart < 0, weights, 0) * backward.sum(2).unsqueeze(1)).sum(2, keepdim=True)

    decay, decay_inside = _twice((-places * w).exp()), _twice(((1 - places).clamp(max=0) * w).exp())
    inside = decay_inside * before + decay_inside.flip(0) * after
    own = _twice((largest - maximum).exp()).unsqueeze(2)
    states = own * inside + decay * earlier + decay.flip(0) * later
    bonus = (u + k - maximum.unsqueeze(2)).exp()
    numerator, denominator = states.split(k.shape[-1], dim=-1)
    return ((numerator + bonus * v) / (denominator + bonus)).flatten(1, 2)[:, :tokens]


def _twice(x: Tensor) -> Tensor:
    return torch.cat((x, x), dim=-1)


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV of ``k, v (B, T, C)`` with ``w, u (C,)`` in fp32 or fp64; returns ``(B, T, C)`` in ``k``'s dtype."""
    if k.numel() == 0:
        return (k * v * (w + u)).to(k.dtype)
    dtype = k.dtype
    k, v = k.to(w.dtype), v.to(w.dtype)
    if torch.compiler.is_exporting():
        return _exported(w, u, k, v).to(dtype)
    terms = torch.stack((v, torch.ones_like(v)), dim=2)  # (B, T, 2, C)
    both_k = torch.cat((k, k.flip(1)))
    both_terms = torch.cat((terms, terms.flip(1)))
    parts = [(u + k, terms)]
    for scale, scaled in _exclusive_scan(w, both_k, both_terms):
        (prefix_scale, suffix_scale), (prefix, suffix) = (
            states.reshape(2, k.shape[0], *states.shape[1:]).unbind() for states in (scale, scaled)
        )
        parts += [(prefix_scale, prefix), (suffix_scale.flip(1), suffix.flip(1))]
    maximum = torch.stack([scale.detach() for scale, _ in parts]).amax(0)
    total = torch.stack([(scale - maximum).exp().unsqueeze(2) * scaled for scale, scaled in parts]).sum(0)
    numerator, denominator = total.unbind(2)
    return (numerator / denominator).to(dtype)
