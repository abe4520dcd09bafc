"""What a model's features depend on: measured, nothing is drawn here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vrwkv.layers import SpatialMix
from vrwkv.ops import bi_wkv


def effective_receptive_field(model: nn.Module, images: Tensor, probes: int = 4) -> Tensor:
    """How much the last block's feature of the central token depends on each pixel.

    The gradient of the feature on the input as in Luo et al. (arXiv 1701.04128), as the root mean square over pictures
    of all entries of the Jacobian: its square sums are estimated with random signs. A plain sum over channels, the
    usual choice, would be blind here: what a LayerNorm returns sums to a constant.

    Args:
        model: a timm model with `forward_intermediates`, in evaluation mode.
        images: what the model is given, ``(B, C, H, W)``.
        probes: random vectors of signs for each picture.

    Returns:
        ``(H, W)``, fp32, not negative, in units of features per unit of normalised input.
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(images.shape[-2:])
    for image in images.split(1):
        with torch.enable_grad():
            pixels = image.detach().clone().requires_grad_()
            maps: Any = model.forward_intermediates(pixels, indices=1, intermediates_only=True)  # type: ignore[operator]
            height, width = maps[-1].shape[-2:]
            feature = maps[-1][0, :, height // 2, width // 2]  # (C',)
            for probe in range(probes):
                signs = torch.randint(2, feature.shape, generator=generator).to(feature) * 2 - 1
                (grad,) = torch.autograd.grad(feature @ signs, pixels, retain_graph=probe + 1 < probes)
                total += grad[0].square().sum(0).float().cpu()
    return (total / (probes * len(images))).sqrt()


def area_holding(field: Tensor, share: float) -> float:
    """The smallest part of the area, 0 to 1, that holds ``share`` of the sum of ``field (H, W)``."""
    values = field.flatten().double().sort(descending=True).values.cumsum(0)
    return (int((values < share * values[-1]).sum()) + 1) / len(values)


def class_votes(model: nn.Module, images: Tensor, classes: Tensor | None = None) -> Tensor:
    """What each patch adds to the score of a class: its logit above the mean of all logits, which softmax ignores.

    The final features of a patch times the gradient of the score on them. Where the features are averaged over patches
    and the classifier is linear, as in our models, the votes and the classifier's bias add up to the score.

    Args:
        model: a timm model with `forward_intermediates` whose classifier is given features of patches, in evaluation
            mode.
        images: what the model is given, ``(B, C, H, W)``.
        classes: an index for each image, ``(B,)``; ``None`` for the likeliest ones.

    Returns:
        ``(B, H', W')`` on the grid of patches, fp32, positive for the class and negative against it.

    Raises:
        ValueError: the classifier is given nothing of the patches, but a class token alone.
    """
    votes = _logits_and_votes(model, images, classes)[1]
    if not votes.any():
        raise ValueError(f"a classifier that is given features of patches is required, {type(model).__name__} has none")
    return votes


def _logits_and_votes(model: nn.Module, images: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits ``(B, classes)``, and votes ``(B, H', W')``, which are 0 where the classifier is given no patches."""
    with torch.no_grad():
        final, maps = model.forward_intermediates(images, indices=1)  # type: ignore[operator]
    grid = maps[-1].shape[-2:]
    with torch.enable_grad():
        final = final.detach().requires_grad_()
        logits = model.forward_head(final)  # type: ignore[operator]
        if classes is None:
            classes = logits.argmax(1)
        score = logits.gather(1, classes[:, None]).sum() - logits.mean(1).sum()
        (grad,) = torch.autograd.grad(score, final)
    votes = (final.detach() * grad).float()
    if votes.ndim == 3:  # (B, prefix + T, C)
        votes = votes[:, -grid[0] * grid[1] :].sum(-1).unflatten(1, grid)
    else:
        votes = votes.sum(1 if votes.shape[-2:] == grid else -1)
    return logits.detach(), votes


def spatial_mixes(model: nn.Module) -> list[SpatialMix]:
    """The layers of a model that gather tokens by Bi-WKV, from first to last.

    Raises:
        ValueError: there are none.
    """
    mixes = _spatial_mixes(model)
    if not mixes:
        raise ValueError(f"a model with Bi-WKV layers is required, {type(model).__name__} has none")
    return mixes


def _spatial_mixes(model: nn.Module) -> list[SpatialMix]:
    return [module for module in model.modules() if isinstance(module, SpatialMix)]


@torch.no_grad()
def gathered_shares(model: nn.Module, images: Tensor, at: tuple[float, float] | None = None) -> list[Tensor]:
    """The weights with which Bi-WKV gathers the values of all tokens into one token, or into the mean over tokens.

    Bi-WKV is linear in the values, and its weights (arXiv 2403.02308, equation 4) are the gradient of what comes out:
    one backward pass makes a whole row of them, or the mean of all rows, at a cost linear in the tokens.

    Args:
        model: with Bi-WKV layers, in evaluation mode.
        images: what the model is given, ``(B, C, H, W)``.
        at: where the token lies, from the top and from the left, as parts of height and width in [0, 1); ``None`` for
            the mean over all tokens.

    Returns:
        For each layer weights ``(B, H', W', C)`` on the grid of patches; over the grid they sum to 1.

    Raises:
        ValueError: there are no such layers, or ``at`` lies outside.
    """
    if at is not None and not all(0 <= each < 1 for each in at):
        raise ValueError(f"a place must lie in [0, 1) of the height and the width, got {at}")
    mixes = spatial_mixes(model)
    with _recorded(mixes) as record:
        model(images)
    return _all_shares(mixes, record, at)


class Explanation(NamedTuple):
    """What a classifier says of images, and what speaks for it."""

    logits: Tensor  # (B, classes)
    votes: Tensor | None  # of :func:`class_votes` for the likeliest classes; None where no patches vote
    shares: list[Tensor] | None  # of :func:`gathered_shares` in the mean over tokens; None without Bi-WKV


def explain(model: nn.Module, images: Tensor) -> Explanation:
    """Logits, votes and shares from one pass through a model in evaluation mode; `images` are ``(B, C, H, W)``."""
    mixes = _spatial_mixes(model)
    try:
        with _recorded(mixes) as record:
            logits, votes = _logits_and_votes(model, images, None)
    except (AttributeError, RuntimeError):  # no features of patches, or not in one tensor; else it is raised again
        with torch.no_grad():
            return Explanation(model(images), None, None)
    return Explanation(logits, votes if votes.any() else None, _all_shares(mixes, record, None) if mixes else None)


class _Record(NamedTuple):
    keys: dict[nn.Module, Tensor]  # (B, T, C)
    grids: list[tuple[int, int]]  # of the patches, in the first layer


@contextmanager
def _recorded(mixes: Sequence[SpatialMix]) -> Iterator[_Record]:
    """What layers are given while the block runs."""
    record = _Record({}, [])
    hooks = [mix.register_forward_pre_hook(lambda _, args: record.grids.append(args[1])) for mix in mixes[:1]]
    for mix in mixes:
        hooks.append(mix.key.register_forward_hook(lambda module, _, output: record.keys.update({module: output})))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def _all_shares(mixes: Sequence[SpatialMix], record: _Record, at: tuple[float, float] | None) -> list[Tensor]:
    height, width = record.grids[0]
    token = None if at is None else int(at[0] * height) * width + int(at[1] * width)
    return [_shares(mix, record.keys[mix.key], token).unflatten(1, (height, width)) for mix in mixes]


def _shares(mix: SpatialMix, k: Tensor, token: int | None) -> Tensor:
    """Weights ``(B, T, C)`` of the tokens in one token, or in the mean, for keys ``k (B, T, C)``."""
    tokens = k.shape[1]
    with torch.enable_grad():
        v = torch.zeros_like(k, dtype=torch.float32).requires_grad_()
        y = bi_wkv(mix.spatial_decay / tokens, mix.spatial_first / tokens, k.to(v.dtype), v)  # (B, T, C)
        return torch.autograd.grad((y.mean(1) if token is None else y[:, token]).sum(), v)[0]
