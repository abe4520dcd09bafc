"""Models that are exported once for all tests of this folder: tracing one takes longer than what is tested of it."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.colours import CLASSES, write_images
from support.scripts import Main, load_tool
from support.stir import stir
from torch import nn

from vrwkv.classification import Classifier, load_classifier
from vrwkv.export import formats, report, to_onnx, to_torch
from vrwkv.runtime import checkpoint

if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
    collect_ignore_glob = ["test_*.py"]

ARGS = {"depth": 1, "img_size": 32, "num_classes": 3}
DATA = {
    "input_size": (3, 32, 32),
    "interpolation": "bilinear",
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.25, 0.3),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    """One thread, each network is traced once, and compared at sizes that take milliseconds."""
    torch.set_num_threads(1)
    programs: dict[int, tuple[nn.Module, Any]] = {}
    trace: Callable[..., Any] = formats.trace

    def traced(network: nn.Module, channels: int) -> Any:
        if id(network) not in programs:
            programs[id(network)] = network, trace(network, channels)
        return programs[id(network)][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "trace", traced)
        patch.setattr(report, "SIZES", ((32, 32), (48, 80), (1, 1)))
        yield


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "colours", train=1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """A checkpoint as of tools/train.py."""
    torch.manual_seed(0)
    model = timm.create_model("test_vrwkv", **ARGS)
    stir(model)
    content = {"arch": "test_vrwkv", "model_args": ARGS, "class_names": list(CLASSES), "data_config": DATA}
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    checkpoint.save({**content, "config": {"data": {"root": str(data_root)}}, "state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def classifier(trained: Path) -> Classifier:
    return load_classifier(trained)


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory, classifier: Classifier) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "classifier.onnx"
    to_onnx(classifier, path)
    return path


@pytest.fixture(scope="session")
def second_family() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vrwkv6", **ARGS).eval()
    stir(model)
    return model


@pytest.fixture(scope="session")
def second_onnx_file(tmp_path_factory: pytest.TempPathFactory, second_family: nn.Module) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "second.onnx"
    to_onnx(second_family, path)
    return path


@pytest.fixture(scope="session")
def torch_file(tmp_path_factory: pytest.TempPathFactory, classifier: Classifier) -> Path:
    path = tmp_path_factory.mktemp("torch") / "classifier.pt2"
    to_torch(classifier, path)
    return path


@pytest.fixture(scope="session")
def export() -> Main:
    return load_tool("export")
