"""Weights for tests of models that are not trained."""

import torch
from torch import nn


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Give every parameter a share in the result: initial ones are zero, or the same in every channel."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
