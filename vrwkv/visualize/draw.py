"""Figures that say by themselves what they show."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor, nn

from vrwkv.layers import SpatialMix
from vrwkv.visualize.measure import area_holding, spatial_mixes

COLOURS = ("tab:gray", "tab:red", "tab:blue", "tab:green")
MAX_LAYERS = 6
GROUPS = ("widest reach", "second quarter", "third quarter", "narrowest reach")


def draw_receptive_field(fields: Mapping[str, Tensor], pictures: int, name: str) -> Figure:
    """Effective receptive fields side by side, and how they fall off with the distance from the centre.

    Args:
        fields: ``(H, W)`` by what the weights are, from :func:`vrwkv.visualize.effective_receptive_field`.
        pictures: how many they are averaged over.
        name: the model's.
    """
    figure = Figure(figsize=(4.2 * len(fields) + 5, 4.6), layout="constrained")
    figure.suptitle(
        f"{name}: effective receptive field of the central token\n"
        f"|d feature of the last block / d pixel|, root mean square over channels and {pictures} "
        f"{'picture' if pictures == 1 else 'pictures'}"
    )
    *panels, profile = figure.subplots(1, len(fields) + 1, width_ratios=[4.2] * len(fields) + [5])
    for axes, colour, (title, field) in zip(panels, COLOURS, fields.items(), strict=False):
        relative = (field / field.max()).clamp(min=1e-6).numpy()
        image = axes.imshow(relative, norm=LogNorm(1e-4, 1), cmap="magma")
        areas = ", ".join(f"{share} % on {_percent(area_holding(field, share / 100))}" for share in (50, 95))
        axes.set(xlabel="pixels", ylabel="pixels")
        axes.set_title(f"{title}\n{areas} of the area", fontsize=10)
        distances, means = _radial_mean(field)
        profile.plot(distances, means / means.max(), label=title, color=colour)
    figure.colorbar(image, ax=panels, label="relative to the largest pixel", extend="min", shrink=0.8)
    profile.set(
        title="fall-off",
        xlabel="distance from the centre (pixels)",
        ylabel="mean at that distance / largest mean",
        yscale="log",
    )
    profile.grid(alpha=0.3)
    profile.legend()
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _radial_mean(field: Tensor, bins: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Mean of ``field (H, W)`` on rings around its centre, and the rings' radii in pixels."""
    height, width = field.shape
    y, x = torch.meshgrid(torch.arange(height) - height // 2, torch.arange(width) - width // 2, indexing="ij")
    ring = min(height, width) / 2 / bins
    index = (torch.hypot(x.float(), y.float()) / ring).long().flatten()
    inside = index < bins
    sums = torch.zeros(bins).scatter_add_(0, index[inside], field.flatten()[inside])
    counts = torch.bincount(index[inside], minlength=bins)
    return ((np.arange(bins) + 0.5) * ring)[counts > 0], (sums / counts)[counts > 0].numpy()


def draw_gathering(
    picture: np.ndarray,
    shares: Sequence[Tensor],
    mixes: Sequence[SpatialMix],
    at: tuple[float, float] | None,
    name: str,
) -> Figure:
    """What a token gathers, over the picture: a row for each layer, a column for each quarter of its channels.

    Args:
        picture: what the model was given, ``(H, W, 3)``, 0 to 1.
        shares: for each layer ``(H', W', C)``, from :func:`vrwkv.visualize.gathered_shares`.
        mixes: those layers.
        at: where the token lies, as in that function; ``None`` for the mean over tokens.
        name: the model's.
    """
    chosen = np.unique(np.linspace(0, len(shares) - 1, min(MAX_LAYERS, len(shares))).round().astype(int))
    height, width = picture.shape[:2]
    panel = 2.3
    figure = Figure(
        figsize=((len(GROUPS) + 1) * panel * max(0.7, width / height) + 1, len(chosen) * panel + 1.2),
        layout="constrained",
    )
    who = "the mean over all tokens" if at is None else "the token at the cross"
    figure.suptitle(
        f"{name}: what {who} gathers by Bi-WKV\n"
        "mean weight over a quarter of the channels, sorted by learned decay w from the widest to the narrowest reach"
    )
    grid = figure.subplots(len(chosen), len(GROUPS) + 1, squeeze=False)
    for row, layer in zip(grid, chosen, strict=True):
        decay = mixes[layer].spatial_decay.detach().float().cpu()
        quarters = torch.tensor_split(decay.argsort(), len(GROUPS))
        row[0].imshow(picture)
        row[0].set_ylabel(f"block {layer + 1} of {len(shares)}")
        for axes, group, channels in zip(row[1:], GROUPS, quarters, strict=True):
            image = _overlay(axes, picture, shares[layer][..., channels].float().mean(-1).cpu().numpy())
            axes.set_title(f"{group}: w {decay[channels].min():.1f} to {decay[channels].max():.1f}", fontsize=8)
        for axes in row:
            axes.set(xticks=[], yticks=[])
            if at is not None:
                rows, columns = shares[layer].shape[:2]
                y, x = (int(at[0] * rows) + 0.5) / rows * height, (int(at[1] * columns) + 0.5) / columns * width
                axes.plot(x - 0.5, y - 0.5, "+", color="lime", markersize=9, markeredgewidth=2)
    grid[0, 0].set_title("the picture", fontsize=8)
    bar = figure.colorbar(image, ax=grid, shrink=0.6, extend="both")
    bar.set_label("weight of a patch, times the number of patches (1: an equal share)")
    bar.set_ticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    bar.minorticks_off()
    return figure


def _overlay(axes: Axes, picture: np.ndarray, share: np.ndarray):
    """Shares ``(H', W')`` as colours over the picture in grey."""
    return _tint(axes, picture, np.maximum(share * share.size, 1e-9), LogNorm(1 / 8, 8))


def _tint(axes: Axes, picture: np.ndarray, values: np.ndarray, norm: Normalize):
    """Values ``(H', W')`` as colours over the picture in grey."""
    height, width = picture.shape[:2]
    axes.imshow(picture.mean(-1), cmap="gray", vmin=-0.3, vmax=1)
    return axes.imshow(values, norm=norm, cmap="coolwarm", alpha=0.6, extent=(-0.5, width - 0.5, height - 0.5, -0.5))


def draw_votes(picture: np.ndarray, votes: Tensor, label: str, gathered: Tensor | None = None) -> Figure:
    """Which patches speak for a class, and how much of each is gathered, over what the model was given.

    Args:
        picture: what the model was given, ``(H, W, 3)``, 0 to 1.
        votes: ``(H', W')``, from :func:`vrwkv.visualize.class_votes`.
        label: the class.
        gathered: weights ``(H', W')`` that sum to 1, of layers from :func:`vrwkv.visualize.gathered_shares`.
    """
    panels = 1 if gathered is None else 2
    figure = Figure(figsize=(0.6 + 4.4 * panels, 4.3), layout="constrained")
    left, *right = figure.subplots(1, panels, squeeze=False)[0]
    values = votes.cpu().numpy()
    limit = max(float(np.abs(values).max()), 1e-9)
    image = _tint(left, picture, values, Normalize(-limit, limit))
    left.set_title(f"which patches speak for “{label}”")
    bar = figure.colorbar(image, ax=left, shrink=0.8, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels(["against", "0", "for"])
    if gathered is not None:
        image = _overlay(right[0], picture, gathered.float().cpu().numpy())
        right[0].set_title("what Bi-WKV gathers, all blocks")
        bar = figure.colorbar(image, ax=right[0], shrink=0.8, extend="both", ticks=[1 / 8, 1 / 2, 1, 2, 8])
        bar.ax.set_yticklabels(["1/8", "1/2", "equal share", "2", "8"])
        bar.minorticks_off()
    for axes in (left, *right):
        axes.set(xticks=[], yticks=[])
    return figure


def draw_decays(models: Mapping[str, nn.Module], name: str) -> Figure:
    """Decay and bonus of every channel by layer.

    Args:
        models: by what the weights are; all with the same layers.
        name: the model's.
    """
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    figure.suptitle(f"{name}: what Bi-WKV learned, one point for each channel")
    decays, bonuses = figure.subplots(1, 2)
    rng = np.random.default_rng(0)
    for place, (colour, (title, model)) in enumerate(zip(COLOURS, models.items(), strict=False)):
        for axes, parameter in ((decays, "spatial_decay"), (bonuses, "spatial_first")):
            values = [getattr(mix, parameter).detach().float().cpu().numpy() for mix in spatial_mixes(model)]
            layer = np.repeat(np.arange(len(values)) + 1, [len(each) for each in values])
            offset = 0.4 * ((place + 0.5) / len(models) - 0.5) * 2 + rng.uniform(-0.13, 0.13, len(layer))
            axes.scatter(layer + offset, np.concatenate(values), s=4, color=colour, label=title, linewidths=0)
            axes.set_xticks(np.arange(len(values)) + 1)
    decays.set(title="decay w (used divided by the number of tokens T)", xlabel="block", ylabel="w")
    decays.axhline(0, color="black", linewidth=0.8)
    reach = decays.secondary_yaxis("right")
    ticks = np.arange(-12, 13, 2)
    reach.set_yticks(ticks, labels=[f"{np.exp(-tick / 2):.2g}" for tick in ticks])
    reach.set_ylabel("factor on a token half a picture (T / 2) away")
    bonuses.set(title="bonus u (used divided by T) of the token itself", xlabel="block", ylabel="u")
    for axes in (decays, bonuses):
        axes.grid(alpha=0.3)
    figure.legend(*decays.get_legend_handles_labels(), loc="outside lower center", ncols=len(models), markerscale=4)
    return figure
