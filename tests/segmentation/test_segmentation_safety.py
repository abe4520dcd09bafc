"""Checkpoints run no code, whatever asks for them, and are never left out silently."""

import json
import subprocess
import sys

import pytest
import torch
from mmengine.runner import CheckpointLoader
from PIL import Image
from support.scripts import REPOSITORY

from vrwkv.runtime.errors import UserError
from vrwkv.segmentation.checkpoint import read
from vrwkv.segmentation.engine import read_checkpoints_safely


def test_every_kind_of_address_is_refused(monkeypatch):
    """mmengine has a loader of its own for each, and most of them unpickle whatever comes."""
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))
    read_checkpoints_safely()
    openmmlab = ("torchvision", "modelzoo", "open-mmlab", "openmmlab", "mmcls", "pavi", "petrel")
    for kind in ("http", "https", "s3", "cluster:s3", "ftp", "file", *openmmlab):
        with pytest.raises(UserError, match=f"{kind}://x/y.pth must be a local file"):
            CheckpointLoader.load_checkpoint(f"{kind}://x/y.pth", logger=None)
    assert len({loader for loader in CheckpointLoader._schemes.values()}) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["load_from=http://127.0.0.1:1/x.pth"], "http://127.0.0.1:1/x.pth must be a local file"),
        (["model.init_cfg.type=Pretrained", "model.init_cfg.checkpoint=s3://x.pth"], "s3://x.pth must be a local file"),
        (["model.backbone.model_args.checkpoint_path=x.pth"], "model.backbone.model_args takes no checkpoint_path"),
    ],
)
def test_addresses_in_a_config(options, expected, config_path, train_segmentor, error, tmp_path):
    assert expected in error(train_segmentor, [config_path, "--work-dir", tmp_path, "--cfg-options", *options])


def test_config_in_a_checkpoint_is_not_run(run, config_path, train_segmentor, tmp_path):
    """mmengine executes the config that a resumed checkpoint brings along."""
    content = read(run / "iter_2.pth")
    content["meta"]["config"] = f"open({str(tmp_path / 'ran')!r}, 'w')"
    torch.save(content, tmp_path / "x.pth")
    argv = [str(config_path), "--work-dir", str(tmp_path / "work"), "--resume", str(tmp_path / "x.pth")]
    assert train_segmentor(argv) == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["load_from", "resume"])
def test_checkpoint_of_another_model(how, checkpoint, config_path, train_segmentor, error, tmp_path):
    """mmengine would leave out what does not fit and train from random weights."""
    options = ["--cfg-options", "model.backbone.conv_inplane=8"]
    argv = [config_path, "--work-dir", tmp_path / "work"]
    given = [*options, f"load_from={checkpoint}"] if how == "load_from" else ["--resume", checkpoint, *options]
    assert "is of another model than" in error(train_segmentor, [*argv, *given])


def test_fine_tuning_to_other_classes(checkpoint, config_path, train_segmentor, tmp_path, capsys):
    """Everything is loaded but the classifiers, and they are named."""
    config = tmp_path / "config.py"
    config.write_text(f"""
_base_ = "{config_path}"
head = dict(num_classes=12, loss_decode=dict(class_weight=None))
model = dict(decode_head=head, auxiliary_head=head)
dataset = dict(metainfo=dict(_delete_=True, classes=list("abcdefghijkl")))
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
optim_wrapper = dict(optimizer=dict(lr=1e-12, weight_decay=0.0))
train_cfg = dict(max_iters=1, val_interval=2)
load_from = "{checkpoint}"
""")
    assert train_segmentor([str(config), "--work-dir", str(tmp_path)]) == 0
    assert "has another number of classes: decode_head.conv_seg.weight" in capsys.readouterr().err
    before, after = (read(path)["state_dict"] for path in (checkpoint, tmp_path / "iter_1.pth"))
    for name, tensor in after.items():
        if "conv_seg" in name:
            assert len(tensor) == 12
        elif "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(tensor, before[name])


def test_nothing_but_json_on_stdout(config_path, checkpoint, subprocess_environment, tmp_path):
    """In a fresh process, where mmseg prints while it is imported and built."""
    Image.new("RGB", (20, 30)).save(tmp_path / "x.png")
    command = [sys.executable, str(REPOSITORY / "tools/segment.py"), str(tmp_path / "x.png"), "--json"]
    command += ["--config", str(config_path), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, env=subprocess_environment, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(result.stdout)[0]["image"] == str(tmp_path / "x.png")
