"""What a run measures, and shows on stderr while it goes on."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch
from tqdm import tqdm

from vrwkv.runtime.processes import World

T = TypeVar("T")
PLAIN_INTERVAL = 60.0  # seconds between lines where stderr is no terminal
BAR_INTERVAL = 0.5


def say(message: str) -> None:
    """Prints a line on stderr, above a bar if there is one."""
    tqdm.write(message, file=sys.stderr)


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    return str(timedelta(seconds=round(seconds)))


@dataclass(frozen=True)
class Measure:
    """Something that a task measures of every sample, of which the mean is what counts.

    Args:
        name: In summary.csv and checkpoints.
        label: Where it is shown and drawn; "" where it is not.
        percent: It is 0 or 1 for each sample; means are given in percent.
        higher_is_better: What makes one model better than another.
    """

    name: str
    label: str = ""
    percent: bool = False
    higher_is_better: bool = False

    def text(self, value: float) -> str:
        """`label value`, to be read."""
        return f"{self.label} {value:.2f} %" if self.percent else f"{self.label} {value:.4f}"


def text_of(measures: Sequence[Measure], values: Mapping[str, float]) -> str:
    """The measures that are shown, to be read."""
    return ", ".join(each.text(values[each.name]) for each in measures if each.label)


class Meters:
    """Sums over samples, kept on the device: reading them is what waits for it."""

    def __init__(self, measures: Sequence[Measure], world: World) -> None:
        self.measures, self._world = measures, world
        self._sums = torch.zeros(len(measures) + 1, device=world.device)  # the last one counts samples

    def update(self, sums: Mapping[str, torch.Tensor], count: int) -> None:
        """Adds a batch: for each measure the sum over its samples, a scalar, and their number."""
        values = [sums[each.name].detach().float() for each in self.measures]
        self._sums += torch.stack([*values, torch.full_like(values[0], count)])

    def gather(self) -> torch.Tensor:
        """The sums of all processes, (processes, measures + 1). They call it together."""
        return self._world.gather(self._sums)

    def restore(self, gathered: torch.Tensor) -> None:
        """Goes on from this process's part of what `gather` returned."""
        if gathered.shape != (self._world.size, len(self._sums)):
            raise ValueError(f"required are {(self._world.size, len(self._sums))} sums, not {tuple(gathered.shape)}")
        self._sums.copy_(gathered[self._world.rank])

    def values(self, gathered: torch.Tensor | None = None) -> dict[str, float]:
        """The means by name, of this process, or of all whose sums are `gathered`."""
        *sums, count = (self._sums if gathered is None else gathered.sum(0)).tolist()
        return {
            each.name: (100 if each.percent else 1) * total / max(count, 1)
            for each, total in zip(self.measures, sums, strict=True)
        }


class Progress:
    """A bar over the batches of an epoch; plain lines, one a minute, where stderr is no terminal.

    Args:
        title: What it is about.
        batches: All.
        batch_size: Of each process.
        world: This process.
        done: How many of the batches were done before.
    """

    def __init__(self, title: str, batches: int, batch_size: int, world: World, done: int = 0) -> None:
        self._title, self._batches, self._batch_size = title, batches, batch_size * world.size
        self._terminal = sys.stderr.isatty()
        self._show = world.primary
        self._bar = tqdm(
            total=batches,
            initial=done,
            desc=title,
            leave=False,
            dynamic_ncols=True,
            disable=not (self._show and self._terminal),
        )
        self._start = self._shown = time.monotonic()
        self._before, self._done = done, 0
        self._waited = 0.0

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

    @property
    def waited(self) -> float:
        """The share of the time that this process waited for data."""
        return self._waited / max(time.monotonic() - self._start, 1e-9)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, whose coming is timed."""
        source, end = iter(batches), object()
        while True:
            begin = time.monotonic()
            batch = next(source, end)
            self._waited += time.monotonic() - begin
            if batch is end:
                return
            yield batch  # type: ignore[misc] # it is not `end`

    def step(self, meters: Meters) -> None:
        """Counts a batch and from time to time shows the means so far."""
        self._done += 1
        self._bar.update()
        now = time.monotonic()
        if not self._show or now - self._shown < (BAR_INTERVAL if self._terminal else PLAIN_INTERVAL):
            return
        self._shown = now
        speed = f"{self.images_per_second:.0f} images/s, {self.waited:.0%} waiting for data"
        text = f"{text_of(meters.measures, meters.values())}, {speed}"
        self._bar.set_postfix_str(text)
        if not self._terminal:
            done = self._before + self._done
            left = (now - self._start) / self._done * (self._batches - done)
            say(f"{self._title} {done}/{self._batches}: {text}, {clock(left)} left")
