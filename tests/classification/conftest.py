"""A small image folder, a config for it, and a model trained on it, shared by the tests of this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from support.colours import write_images
from support.scripts import Main, load_tool


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """More threads than cores make tiny operations a hundred times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def config_path(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """A config that trains for two epochs of four updates."""
    config = {
        "output": "overridden",
        "epochs": 2,
        "model": {"name": "test_vrwkv", "args": {"img_size": 16, "patch_size": 8, "drop_path_rate": 0.1}},
        "data": {"root": str(data_root), "batch_size": 8, "workers": 0},
        "optim": {"lr": 5e-3, "ema_decay": 0.5},
        "augment": {"scale": [0.5, 1.0]},
    }
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="session")
def train_args(config_path: Path) -> Callable[..., list[str]]:
    """Arguments of tools/train.py for an output folder and further settings."""
    start = ["--config", str(config_path), "--set"]
    return lambda output, *settings: [*start, f"output={output}", *(["--set", *settings] if settings else [])]


@pytest.fixture(scope="session")
def train() -> Main:
    return load_tool("train")


@pytest.fixture(scope="session")
def validate() -> Main:
    return load_tool("validate")


@pytest.fixture(scope="session")
def predict() -> Main:
    return load_tool("predict")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, train: Main, train_args: Callable[..., list[str]]) -> Path:
    """The output folder of a finished training."""
    output = tmp_path_factory.mktemp("run") / "output"
    assert train(train_args(output)) == 0
    return output
