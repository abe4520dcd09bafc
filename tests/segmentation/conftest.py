"""Small scenes, a config that trains on them in seconds, and a segmentor trained so, shared by this folder's tests."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from support.scripts import REPOSITORY, Main, load_script, load_tool

if importlib.util.find_spec("mmseg") is None:
    collect_ignore_glob = ["test_*.py"]

CONFIGS = REPOSITORY / "configs" / "segmentation"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """More threads than cores make tiny operations a hundred times slower."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def closed_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine's loggers outlive a test and write to the stream that pytest has captured and closed."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of `demo/make_digit_scenes.py`, of 32 x 32 pixels."""
    path = tmp_path_factory.mktemp("data") / "scenes"
    assert load_script("demo/make_digit_scenes.py").main([str(path), "--train", "8", "--val", "3", "--size", "32"]) == 0
    return path


@pytest.fixture(scope="session")
def config_path(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """The demo's config with a tiny model and four iterations."""
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(f"""
_base_ = "{CONFIGS / "vrwkv_adapter_nano_digit_scenes.py"}"
model = dict(
    data_preprocessor=dict(size=(32, 32)),
    backbone=dict(model_args=dict(img_size=32, embed_dim=16), conv_inplane=4),
    decode_head=dict(in_channels=[16] * 4, channels=8),
    auxiliary_head=dict(in_channels=16, channels=8),
    test_cfg=dict(crop_size=(32, 32), stride=(20, 20)),
)
train_dataloader = dict(batch_size=2, dataset=dict(data_root="{scenes}"))
val_dataloader = dict(dataset=dict(data_root="{scenes}"))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2, max_keep_ckpts=5))
""")
    return path


@pytest.fixture(scope="session")
def train_segmentor() -> Main:
    return load_tool("train_segmentor")


@pytest.fixture(scope="session")
def test_segmentor() -> Main:
    return load_tool("test_segmentor")


@pytest.fixture(scope="session")
def segment_main() -> Main:
    return load_tool("segment")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, train_segmentor: Main, config_path: Path) -> Path:
    """The work folder of a finished training."""
    path = tmp_path_factory.mktemp("run") / "work"
    assert train_segmentor([str(config_path), "--work-dir", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def checkpoint(run: Path) -> Path:
    return run / "iter_4.pth"
