"""Corrupt training pictures: others take their places, and `data.max_corrupt` says how many are borne."""

from collections.abc import Iterator
from typing import Any

from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.progress import say

Sample = tuple[Any, int, list[str]]
"""A picture, its class, and what was wrong with those that it takes the place of."""


def _too_many(message: str, count: int, limit: int) -> UserError:
    how_many = f"; corrupt pictures in this epoch so far: {count}, data.max_corrupt is {limit}" if limit else ""
    return UserError(f"{message}{how_many}")


class ReplacingDataset(Dataset[Sample]):
    """`dataset`, where the next one that can be read takes the place of a picture that cannot.

    What comes of an index depends on the files alone, not on what was read before or by which process.

    Raises:
        UserError: of a picture, when more than `limit` one after another cannot be read.
    """

    def __init__(self, dataset: Dataset[tuple[Any, int]], limit: int) -> None:
        self.dataset, self.limit = dataset, limit

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        corrupt: list[str] = []
        while True:
            try:
                picture, target = self.dataset[(index + len(corrupt)) % len(self)]
                return picture, target, corrupt
            except UserError as error:
                corrupt.append(str(error))
                if len(corrupt) > min(self.limit, len(self) - 1):
                    raise _too_many(str(error), len(corrupt), self.limit) from error


class CountingLoader(DataLoader[Any]):
    """Batches of (B, C, H, W) bytes and (B,) classes of a `ReplacingDataset`, whose corrupt pictures are counted here:
    in the process that trains, whichever worker met them.

    Each is named on stderr once. Iterating raises a UserError when an epoch has more than `limit` different ones.
    """

    def __init__(self, dataset: Dataset[Sample], limit: int, **options: Any) -> None:
        super().__init__(dataset, collate_fn=_collate, **options)
        self.limit = limit
        self.named: set[str] = set()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # DataLoader names a class of its own
        found: set[str] = set()  # in this epoch
        for images, classes, messages in super().__iter__():
            for message in messages:
                found.add(message)
                if len(found) > self.limit:
                    raise _too_many(message, len(found), self.limit)
                if message not in self.named:
                    self.named.add(message)
                    say(f"corrupt picture {len(found)} of at most {self.limit}, replaced: {message}")
            yield images, classes


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    images, classes = fast_collate([(picture, target) for picture, target, _ in samples])
    return images, classes, [message for *_, corrupt in samples for message in corrupt]
