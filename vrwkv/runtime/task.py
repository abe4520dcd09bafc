"""What is trained, as the loop is told it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from vrwkv.runtime.progress import Measure, Meters


class StepResult(NamedTuple):
    """What a model makes of a batch."""

    loss: Tensor  # mean over the samples, a scalar
    sums: Mapping[str, Tensor]  # over the samples, for each of the task's measures but the loss
    samples: int


class Task(ABC):
    """What is trained, to be told to the loop. All that it draws at random in `training_step` is drawn from Python's,
    numpy's and torch's generators, which the loop seeds before each step."""

    measures: Sequence[Measure]
    """One of them is named loss: the mean of what `training_step` returns."""
    judge: Measure
    """The measure of `evaluate` that says which weights are the best."""
    model: nn.Module
    """On the device, at its initial weights."""
    gmac: float | None = None
    """Multiply-adds of the model for one sample, in 1e9, where they are known."""
    train_loader: Any
    """A loader with a `StepSampler` as its `batch_sampler`, of samples that depend on their key alone."""

    @abstractmethod
    def training_step(self, model: nn.Module, batch: Any) -> StepResult:
        """The loss of a batch, with gradients. `model` is the task's, perhaps inside DistributedDataParallel."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Meters:
        """The sums of all measures over this process's share of the samples that are held out: the loop brings those of
        all processes together. A signal may end it at any moment."""

    def data(self) -> dict[str, str]:
        """What the samples are, by what they are for: how many, and where they have names what tells those from others.
        All processes, and a run that is resumed, must have the same."""
        return {"training": f"{self.train_loader.batch_sampler.samples} samples"}

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state of the training: all that is needed to use the model. A run that is
        resumed must have the same."""
