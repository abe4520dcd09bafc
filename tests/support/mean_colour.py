"""A second task of the training loop: predict the mean colour of pictures of noise."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vrwkv.runtime.processes import World
from vrwkv.runtime.progress import Measure, Meters
from vrwkv.runtime.recipe import RunConfig
from vrwkv.runtime.sampling import SeededDataset, StepSampler
from vrwkv.runtime.task import StepResult, Task


class MeanColourConfig(RunConfig):
    size: int = 4
    dropout: float = 0.1


class MeanColour(Task):
    measures = (
        Measure("loss", "loss"),
        Measure("error", "largest error"),
        Measure("near", "near", percent=True, higher_is_better=True),
    )
    judge = measures[1]

    def __init__(self, config: MeanColourConfig, world: World) -> None:
        self.world = world
        noise = torch.rand(24, 3, config.size, config.size, generator=torch.Generator().manual_seed(0))
        train, self.held_out = noise[:16], noise[16:]
        self.model = nn.Sequential(nn.Flatten(), nn.Dropout(config.dropout), nn.Linear(3 * config.size**2, 3))
        sampler = StepSampler(len(train), 4, config.seed, world)
        self.train_loader = DataLoader(SeededDataset(TensorDataset(train), config.seed), batch_sampler=sampler)

    def _measure(self, model: nn.Module, images: torch.Tensor) -> StepResult:
        errors = (model(images) - images.mean((2, 3))).abs()  # (B, 3)
        sums = {"error": errors.amax(1).sum(), "near": (errors < 0.1).all(1).sum()}
        return StepResult(errors.square().mean(), sums, len(images))

    def training_step(self, model: nn.Module, batch: list[torch.Tensor]) -> StepResult:
        return self._measure(model, batch[0])

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> Meters:
        result, meters = self._measure(model.eval(), self.held_out), Meters(self.measures, self.world)
        meters.update({**result.sums, "loss": result.loss * result.samples}, result.samples)
        return meters

    def content(self) -> dict[str, int]:
        return {"inputs": self.model[2].in_features}
