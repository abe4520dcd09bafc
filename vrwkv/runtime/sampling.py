"""Which samples a step is given, and which random numbers: both follow from the seed, the epoch and the step alone.

So a run is the same for any number of loader workers, and however often it is interrupted and resumed.
"""

import random
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from vrwkv.runtime.processes import World

SampleKey = tuple[int, int]
"""Epoch and index: what a sample depends on, beside the run's seed."""


class Draw(IntEnum):
    """What random numbers are for: those of one purpose do not repeat those of another."""

    ORDER = 0
    SAMPLE = 1
    STEP = 2


def _seed_of(seed: int, *key: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def seed_all(seed: int, draw: Draw, *key: int) -> None:
    """Seeds Python's, numpy's and torch's random numbers.

    Args:
        seed: The run's.
        draw: What they are for.
        key: What else they depend on, such as the epoch and the step.
    """
    value = _seed_of(seed, draw, *key)
    random.seed(value)
    np.random.seed(value % 2**32)
    if draw is Draw.SAMPLE:  # drawn on the CPU, and `torch.manual_seed` takes half a millisecond to note it for GPUs
        torch.default_generator.manual_seed(value)
    else:
        torch.manual_seed(value)


class StepSampler(Sampler[list[SampleKey]]):
    """Batches of shuffled samples, each once in an epoch; those that fill no batch of all processes are left out.

    The processes share the batches of a step: their pictures together are those of one process with larger batches.

    Args:
        samples: How many there are.
        batch_size: Samples of a step of one process.
        seed: The run's.
        world: This process.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, world: World) -> None:
        self.samples, self.batch_size, self.seed, self.world = samples, batch_size, seed, world
        self.epoch = self.step = 0

    def start(self, epoch: int, step: int = 0) -> None:
        """Lets the next iteration give the batches of an epoch, without its first `step` ones."""
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.samples // (self.batch_size * self.world.size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, of_all = self.epoch, self.batch_size * self.world.size
        generator = torch.Generator().manual_seed(_seed_of(self.seed, Draw.ORDER, epoch))
        order = torch.randperm(self.samples, generator=generator)
        for step in range(self.step, len(self)):
            begin = step * of_all + self.world.rank * self.batch_size
            yield [(epoch, index) for index in order[begin : begin + self.batch_size].tolist()]


class SeededDataset(Dataset[Any]):
    """`dataset` for a `StepSampler`: what it draws for a sample depends on the seed, the epoch and the index alone.

    It seeds the process that reads, a loader's worker or the one that trains, which seeds itself before each step.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: SampleKey) -> Any:
        epoch, index = key
        seed_all(self.seed, Draw.SAMPLE, epoch, index)
        return self.dataset[index]
