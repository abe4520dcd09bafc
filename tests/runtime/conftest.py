"""The configuration of a short run, shared by this folder's tests."""

from collections.abc import Callable

import pytest
from support.mean_colour import MeanColourConfig

from vrwkv.runtime.recipe import OptimConfig, SaveConfig


@pytest.fixture
def config(tmp_path) -> Callable[..., MeanColourConfig]:
    def make(output="output", epochs=3, optim=None, save=None, **keys):
        keys["save"] = SaveConfig(**(save or {}))
        optim = OptimConfig(**{"lr": 0.05, "ema_decay": 0.5, **(optim or {})})
        return MeanColourConfig(output=str(tmp_path / output), epochs=epochs, optim=optim, device="cpu", **keys)

    return make
