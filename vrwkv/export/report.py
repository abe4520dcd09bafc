"""Whether an exported model does what the network does."""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vrwkv.export.subject import Subject
from vrwkv.runtime.errors import UserError

SIZES = ((224, 224), (256, 384), (512, 512), (1024, 1024), (1, 1))
LIMIT = 1e-4


class Row(NamedTuple):
    """An image size, and how the exported model did there."""

    height: int
    width: int
    difference: float  # largest, as a share of the largest logit
    torch_ms: float
    exported_ms: float

    def __str__(self) -> str:
        return (
            f"{self.height:5d} x {self.width:<5d} difference {self.difference:.1e} of the largest logit, "
            f"torch {self.torch_ms:.1f} ms, exported {self.exported_ms:.1f} ms"
        )


def compare(subject: Subject, exported: Callable[[Tensor], Tensor]) -> list[Row]:
    """Run the network and the exported model on a random image of each of five sizes."""
    return compare_at(SIZES, subject, exported)


@torch.inference_mode()
def compare_at(sizes: Iterable[Sequence[int]], subject: Subject, exported: Callable[[Tensor], Tensor]) -> list[Row]:
    """As :func:`compare`, with images of other sizes ``(H, W)``."""
    network = copy.deepcopy(subject.network).float().cpu().eval()  # as it is exported; the user's stays as it is
    generator, rows = torch.Generator(), []
    for height, width in sizes:
        channels = subject.facts.input_size[0]
        images = torch.randn(1, channels, height, width, generator=generator.manual_seed(0))
        expected, torch_ms = _timed(network, images)
        actual, exported_ms = _timed(exported, images)
        difference = ((actual - expected).abs().max() / expected.abs().max()).item()
        rows.append(Row(height, width, difference, torch_ms, exported_ms))
    return rows


def require_equal(rows: Sequence[Row], path: Path) -> None:
    """Raises UserError where the exported model differs from the network."""
    worst = max(rows, key=lambda row: row.difference if row.difference == row.difference else float("inf"))
    if not worst.difference <= LIMIT:
        raise UserError(
            f"{path} is not written: the exported model must agree with the network to {LIMIT:.0e} of the largest "
            f"logit, at {worst.height} x {worst.width} it differs by {worst.difference:.1e}"
        )


def _timed(function: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, float]:
    begin = time.perf_counter()
    result = function(images)
    return result, 1000 * (time.perf_counter() - begin)
