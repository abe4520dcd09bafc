"""Pre-training from a configuration to a fine-tuned classifier."""

import pytest
import torch
import yaml
from support.colours import write_images
from support.scripts import REPOSITORY, load_tool

from vrwkv.pretraining import draw_reconstructions, load_autoencoder
from vrwkv.runtime import checkpoint

CONFIGS = sorted((REPOSITORY / "configs" / "pretraining").glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="session")
def pretrain():
    return load_tool("pretrain")


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretraining")
    write_images(folder / "data", train=8, val=4)
    config = {
        "output": str(folder / "output"),
        "epochs": 2,
        "device": "cpu",
        "model": {"name": "test_vrwkv", "args": {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2}},
        "decoder": {"dim": 16, "depth": 1},
        "data": {"root": str(folder / "data"), "batch_size": 8, "workers": 0},
        "optim": {"lr": 5e-3, "betas": [0.9, 0.95]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def run(config_path, pretrain):
    assert pretrain(["--config", str(config_path), "--set", "epochs=8"]) == 0
    return config_path.parent / "output"


def test_loss_falls_and_reconstructions_are_drawn(run):
    rows = [line.split(",") for line in (run / "summary.csv").read_text().splitlines()]
    loss = rows[0].index("eval_loss")
    assert float(rows[-1][loss]) < float(rows[1][loss])
    assert (run / "reconstructions.png").read_bytes().startswith(b"\x89PNG")


def test_validation_masks_the_same_patches_each_time(run, config_path):
    from vrwkv.pretraining import PretrainingConfig, load_config
    from vrwkv.pretraining.task import PretrainingTask
    from vrwkv.runtime.processes import World

    task = PretrainingTask(load_config(PretrainingConfig, config_path), World(torch.device("cpu")))
    first = task.evaluate(task.model).values()["loss"]
    torch.rand(100)
    assert task.evaluate(task.model).values()["loss"] == first


@pytest.mark.parametrize("name", ["best.pth", "last.pth"])
def test_fine_tuning_starts_from_the_backbone(name, run, config_path, tmp_path):
    """With the very weights, no key missing but the head's."""
    from vrwkv.classification import Config, load_config
    from vrwkv.classification.task import ClassificationTask
    from vrwkv.runtime.processes import World

    content = yaml.safe_load(config_path.read_text())
    del content["decoder"], content["optim"]["betas"]
    content["model"]["checkpoint"] = str(run / name)
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(content))
    task = ClassificationTask(load_config(Config, path), World(torch.device("cpu")))
    saved = checkpoint.read(run / name)["state_dict"]
    own = task.model.state_dict()
    assert {f"backbone.{name}" for name in own if not name.startswith("head.")} == {
        name for name in saved if not name.startswith("decoder.")
    }
    assert all(torch.equal(own[name], saved[f"backbone.{name}"]) for name in own if not name.startswith("head."))


def test_linear_probe_trains_the_head_alone(run, config_path, tmp_path):
    content = yaml.safe_load(config_path.read_text())
    del content["decoder"], content["optim"]["betas"]
    content["output"] = str(tmp_path / "probe")
    content["model"] |= {"checkpoint": str(run / "last.pth"), "head_only": True}
    content["model"]["args"]["drop_path_rate"] = 0.5
    path = tmp_path / "probe.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_tool("train")(["--config", str(path)]) == 0
    before, after = (checkpoint.read(folder / "last.pth")["state_dict"] for folder in (run, tmp_path / "probe"))
    rest = [name for name in after if not name.startswith("head.")]
    assert rest and all(torch.equal(after[name], before[f"backbone.{name}"]) for name in rest)
    rows = [line.split(",") for line in (tmp_path / "probe" / "summary.csv").read_text().splitlines()]
    loss = rows[0].index("train_loss")
    assert float(rows[2][loss]) < float(rows[1][loss])


def test_reconstructions_show_what_is_visible(run, config_path):
    model, data_config = load_autoencoder(run / "best.pth")
    pictures = sorted((config_path.parent / "data" / "val").rglob("*.png"))[:3]
    figure = draw_reconstructions(model, data_config, pictures)
    picture, visible, made = ([axes.images[0].get_array() for axes in figure.axes[i : i + 3]] for i in (0, 3, 6))
    for one, two, three in zip(picture, visible, made, strict=True):
        grey = (two == 0.5).all(2)
        assert 0.7 < grey.mean() < 0.8
        assert (two[~grey] == one[~grey]).all()
        assert abs(three[~grey] - one[~grey]).max() < 1e-6
        assert abs(three[grey] - one[grey]).mean() > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains(path, config_path, tmp_path):
    """A narrow model of its kind, all else as it is."""
    from vrwkv.pretraining import PretrainingConfig, load_config, pretrain

    args = load_config(PretrainingConfig, path).model.args | dict(img_size=32, embed_dim=32, depth=2)
    settings = [
        f"output={tmp_path / 'out'}",
        f"data.root={config_path.parent / 'data'}",
        f"model.args={args}",
        "decoder={dim: 16, depth: 1}",
        "epochs=1",
        "data.batch_size=4",
        "data.workers=0",
        "optim.accumulate=2",
        "schedule.warmup_epochs=0",
    ]
    content = checkpoint.read(pretrain(load_config(PretrainingConfig, path, settings)))
    assert all(tensor.isfinite().all() for tensor in content["state_dict"].values())
    assert content["optimizer"]["state"][0]["step"] == 3


def test_recomputed_blocks_and_channels_last(config_path, tmp_path):
    from vrwkv.pretraining import PretrainingConfig, load_config, pretrain

    found, output = [], tmp_path / "out"
    for settings in ([], ["model.grad_checkpointing=2", "model.channels_last=true"]):
        config = load_config(PretrainingConfig, config_path, [f"output={output}", "epochs=1", *settings])
        pretrain(config, overwrite=True)
        found.append(checkpoint.read(output / "last.pth")["state_dict"])
    torch.testing.assert_close(dict(found[0]), dict(found[1]), rtol=1e-4, atol=1e-5)
    kernel = found[1]["backbone.patch_embed.proj.weight"]
    assert kernel.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.name=test_vit", "model.name must be a model of vrwkv"),
        ("model.args={num_classes: 3}", "model.args.num_classes is for classifiers"),
        ("mask_ratio=1", "mask_ratio"),
        ("decoder.dim=6", "decoder.dim"),
        (
            "data.img_size=18",
            "cannot be pre-trained on pictures of 3 x 18 x 18: images must consist of whole patches of 4",
        ),
        ("augment.mixup=0.5", "unknown config key 'augment.mixup'"),
        ("optim.betas=[0.9]", "optim.betas"),
    ],
)
def test_bad_input(setting, message, config_path, tmp_path, pretrain, capsys):
    assert pretrain(["--config", str(config_path), "--set", f"output={tmp_path / 'out'}", setting]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "last.pth").exists()


def test_files_of_others_are_refused(tmp_path, capsys):
    from vrwkv.pretraining import UserError

    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="entry 'arch' is missing"):
        load_autoencoder(tmp_path / "other.pth")
