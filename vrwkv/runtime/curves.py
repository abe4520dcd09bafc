"""Curves of what summary.csv holds."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.progress import Measure

Rows = list[dict[str, float]]


def read_summary(summary: Path) -> Rows:
    """The rows of a summary.csv."""
    with open(summary, newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def draw_curves(summary: Path, picture: Path, measures: Sequence[Measure]) -> None:
    """Draws the measures that are shown over the epochs of a summary.csv into a PNG."""
    from matplotlib.figure import Figure  # slow to import, and only the primary process draws

    rows = read_summary(summary)
    shown = [each for each in measures if each.label]
    figure = Figure(figsize=(5 * len(shown), 4), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        lines = {"training, augmented": (rows, f"train_{measure.name}"), "validation": (rows, f"eval_{measure.name}")}
        _draw_panel(axes, lines, f"{measure.label} (%)" if measure.percent else measure.label)
    figure.savefig(picture, dpi=120)


def _draw_panel(axes: Any, lines: Mapping[str, tuple[Rows, str]], label: str) -> None:
    """Draws columns of rows over their epochs."""
    for name, (rows, column) in lines.items():
        values = [row.get(column, math.nan) for row in rows]
        axes.plot([row["epoch"] for row in rows], values, marker=".", label=name)
    axes.set(xlabel="epoch", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()


def draw_runs(folders: Sequence[str], picture: str) -> list[str]:
    """Draws what each run measured in validation over its epochs, all runs in each panel, into a PNG.

    Returns:
        A line for each run, with its last epoch.

    Raises:
        UserError: a folder has no summary.csv with a row, or the picture cannot be written.
    """
    from matplotlib.figure import Figure

    runs = {}
    for folder in folders:
        try:
            rows = read_summary(Path(folder) / "summary.csv")
        except (OSError, ValueError, TypeError) as error:  # no such file, or rows that are torn
            raise UserError(f"cannot read {Path(folder) / 'summary.csv'}: {error}") from error
        if not rows:
            raise UserError(f"{Path(folder) / 'summary.csv'} has no rows yet")
        runs[folder] = rows
    names = list(dict.fromkeys(name for rows in runs.values() for name in rows[0] if name.startswith("eval_")))
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _draw_panel(axes, {folder: (rows, name) for folder, rows in runs.items()}, name.removeprefix("eval_"))
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {picture}: {error}") from error
    return [
        f"{folder}  epoch {rows[-1]['epoch']:g}: "
        + ", ".join(f"{name.removeprefix('eval_')} {rows[-1][name]:.4f}" for name in names if name in rows[-1])
        for folder, rows in runs.items()
    ]
