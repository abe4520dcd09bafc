"""Samples and their order follow from the seed, the epoch and the index alone."""

import random

import numpy as np
import torch
from torch.utils.data import Dataset

from vrwkv.runtime.processes import World
from vrwkv.runtime.sampling import SeededDataset, StepSampler


class Draws(Dataset):
    def __getitem__(self, index: int) -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()


def test_what_a_sample_draws() -> None:
    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1)]
    drawn = [SeededDataset(Draws(), seed)[epoch, index] for seed, epoch, index in keys]
    for values in zip(*drawn, strict=True):
        assert len(set(values)) == len(keys)
    assert SeededDataset(Draws(), 1)[0, 1] == drawn[keys.index((1, 0, 1))]


def test_order_of_an_epoch() -> None:
    def order(seed: int, epoch: int, step: int = 0) -> list[int]:
        sampler = StepSampler(20, 4, seed, World(torch.device("cpu")))
        sampler.start(epoch, step)
        return [index for batch in sampler for each, index in batch if each == epoch]

    assert sorted(order(0, 0)) == list(range(20))
    assert order(0, 0, 3) == order(0, 0)[12:]
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
