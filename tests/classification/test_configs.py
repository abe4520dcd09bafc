"""Every config names a model of that size, and trains a narrow one of its kind."""

import pytest
import timm
import torch
from support.recipes import PAGE, page, update_size
from support.scripts import REPOSITORY

import vrwkv  # noqa: F401
from vrwkv.classification import Config, load_config
from vrwkv.runtime.recipe import create_optimizer

pytestmark = pytest.mark.usefixtures("no_curves")
CONFIGS = sorted((REPOSITORY / "configs" / "classification").glob("*.yaml"))
PUBLISHED = [path for path in CONFIGS if "nano" not in path.stem]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains(path, data_root, tmp_path, train):
    args = load_config(Config, path).model.args | dict(img_size=32, embed_dim=32, depth=2)
    if "vrwkv6" in path.stem:
        args["head_size"] = 16
    settings = [
        f"output={tmp_path / 'out'}",
        f"data.root={data_root}",
        f"model.args={args}",
        "epochs=1",
        "data.batch_size=8",
        "optim.lr_batch_size=8",
        "optim.accumulate=2",
        "data.workers=0",
        "schedule.warmup_epochs=0",
    ]
    assert train(["--config", str(path), "--set", *settings]) == 0
    weights = torch.load(tmp_path / "out" / "last.pth", weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert load_config(Config, tmp_path / "out" / "config.yaml") == load_config(Config, path, settings)


def test_page_of_recipes():
    """All that the configs resolve to, for each parameter group of the models at their full size."""
    assert PAGE.read_text() == page(), "PYTHONPATH=tests python -m support.recipes writes it anew"


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_config_of_a_published_model(path):
    config = load_config(Config, path)
    assert path.stem.startswith(config.model.name)
    assert config.output == f"output/{path.stem}"
    processes, batch, steps = update_size(path, config)
    assert processes * batch * steps == (128 if "large" in path.stem else 1024)


def test_layer_decay():
    """Each block learns slower than the one above it by the factor, the stem slowest, the head fastest."""
    config = load_config(Config, PUBLISHED[-1], ["optim.layer_decay=0.5", "optim.lr=1.0"])
    model = timm.create_model("test_vrwkv", depth=3)
    optimizer, scheduler = create_optimizer(model, config, 1024, 1)
    scheduler.step_update(20)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(each)]: group["lr"] for group in optimizer.param_groups for each in group["params"]}
    peak = rates["head.weight"]
    blocks = [rates[f"blocks.{i}.att.key.weight"] for i in range(3)]
    assert blocks[2] / blocks[1] == blocks[1] / blocks[0] == blocks[0] / rates["pos_embed"] == 2
    assert peak > blocks[2]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
