"""What a run shows and leaves to look at: progress on stderr, summary.csv, the training curves."""

import csv
import math
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
from timm.utils import accuracy
from tqdm import tqdm

from vrwkv.runtime.processes import World

PLAIN_INTERVAL = 60.0  # seconds between lines where stderr is no terminal
BAR_INTERVAL = 0.5


def say(message: str) -> None:
    """Prints a line on stderr, above a bar if there is one."""
    tqdm.write(message, file=sys.stderr)


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    return str(timedelta(seconds=round(seconds)))


class Meters:
    """Sums over pictures, kept on the device: reading them is what waits for it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums = torch.zeros(4, device=world.device)  # loss, right first, right among five, pictures

    def update(self, loss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Adds a batch: its mean loss, (B, classes) logits, and (B,) classes or (B, classes) soft targets."""
        classes = target.argmax(1) if target.ndim == 2 else target
        top1, top5 = accuracy(logits.detach(), classes, topk=(1, 5))
        count = len(logits)
        self._sums += torch.stack([loss.detach().float(), top1 / 100, top5 / 100, torch.ones_like(top1)]) * count

    def reduce(self) -> None:
        """Adds up the sums of all processes."""
        if self._world.distributed:
            torch.distributed.all_reduce(self._sums)

    def values(self) -> dict[str, float]:
        """Mean loss, top1 and top5 in percent."""
        loss, top1, top5, count = self._sums.tolist()
        count = max(count, 1)
        return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


class Progress:
    """A bar over the batches of an epoch; plain lines, one a minute, where stderr is no terminal."""

    def __init__(self, title: str, batches: int, batch_size: int, world: World) -> None:
        self._title, self._batches, self._batch_size = title, batches, batch_size * world.size
        self._terminal = sys.stderr.isatty()
        self._show = world.primary
        self._bar = tqdm(
            total=batches, desc=title, leave=False, dynamic_ncols=True, disable=not (self._show and self._terminal)
        )
        self._start = self._shown = time.monotonic()
        self._done = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    @property
    def images_per_second(self) -> float:
        """Of all processes together, since the start."""
        return self._done * self._batch_size / max(time.monotonic() - self._start, 1e-9)

    def step(self, meters: Meters) -> None:
        """Counts a batch and from time to time shows the means so far."""
        self._done += 1
        self._bar.update()
        now = time.monotonic()
        if not self._show or now - self._shown < (BAR_INTERVAL if self._terminal else PLAIN_INTERVAL):
            return
        self._shown = now
        values = meters.values()
        text = f"loss {values['loss']:.4f}, accuracy {values['top1']:.2f} %, {self.images_per_second:.0f} images/s"
        self._bar.set_postfix_str(text)
        if not self._terminal:
            left = (now - self._start) / self._done * (self._batches - self._done)
            say(f"{self._title} {self._done}/{self._batches}: {text}, {clock(left)} left")


def draw_curves(summary: Path, picture: Path) -> None:
    """Draws loss and accuracy over the epochs of a summary.csv into a PNG."""
    from matplotlib.figure import Figure  # slow to import, and only the primary process draws

    with open(summary, newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("loss", "top1"), ("loss", "accuracy (%)"), strict=True):
        for part, name in (("train", "training, augmented"), ("eval", "validation")):
            axes.plot(epochs, [row.get(f"{part}_{key}", math.nan) for row in rows], marker=".", label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=120)
