"""Training: what it leaves, resuming, testing it again, and two processes."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from mmengine.hooks import EMAHook
from support.scripts import REPOSITORY

from vrwkv.runtime.errors import UserError
from vrwkv.segmentation import LeanUPerHead
from vrwkv.segmentation import test as measure
from vrwkv.segmentation.checkpoint import read
from vrwkv.segmentation.config import load_config
from vrwkv.segmentation.engine import StrictRunner


def test_checkpoint_is_read_safely(checkpoint):
    content = read(checkpoint)
    assert content["message_hub"]["runtime_info"]["iter"] == 3  # from 0
    assert content["meta"]["dataset_meta"]["classes"][:3] == ("photograph", "0", "1")


def test_same_numbers_again(run, config_path, checkpoint, test_segmentor, capsys):
    argv = [str(config_path), str(checkpoint)]
    capsys.readouterr()
    assert test_segmentor([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    log = next(run.glob("*/vis_data/scalars.json")).read_text().splitlines()
    logged = next(json.loads(line) for line in log if "mIoU" in line)
    for name in ("aAcc", "mIoU", "mAcc"):
        assert result[name] == pytest.approx(logged[name])


def test_flips_and_scales(config_path, checkpoint, monkeypatch):
    """Of wrapped data likewise; and no other weights are asked for."""
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: pytest.fail("weights are asked for"))
    cfg = load_config(config_path, {"model.backbone.model_args.pretrained": True})
    plain = measure(cfg, checkpoint, tta=True)
    assert plain != measure(cfg, checkpoint)
    cfg.test_dataloader.dataset = dict(type="ConcatDataset", datasets=[cfg.test_dataloader.dataset])
    assert measure(cfg, checkpoint, tta=True) == plain


def test_resumed_training(run, config_path, train_segmentor, tmp_path):
    """Resumes with the optimizer's state from the same weights, and draws its curves in its own folder."""
    argv = [str(config_path), "--work-dir", str(tmp_path / "work")]
    assert train_segmentor([*argv, "--cfg-options", "train_cfg.max_iters=2"]) == 0
    half = read(tmp_path / "work" / "iter_2.pth")
    assert train_segmentor([*argv, "--resume"]) == 0
    full = read(tmp_path / "work" / "iter_4.pth")
    steps = [next(iter(each["optimizer"]["state"].values()))["step"].item() for each in (half, full)]
    assert steps == [2, 4]
    torch.testing.assert_close(half["state_dict"], read(run / "iter_2.pth")["state_dict"])
    drawn = [
        [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in sorted((tmp_path / "work").glob("*/vis_data/scalars.json"))
    ]
    assert drawn == [[1, 2, 2], [3, 4, 4]]  # the last is the validation's


def test_two_processes(config_path, test_segmentor, subprocess_environment, tmp_path):
    """SyncBN falls back to BN, both processes train on their share, and one set of files is left."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["model.backbone.norm_cfg.type=SyncBN", "train_cfg.max_iters=2", "train_cfg.val_interval=2"]
    command = [*torchrun, str(REPOSITORY / "tools/train_segmentor.py"), str(config_path), "--work-dir", str(tmp_path)]
    result = subprocess.run(
        [*command, "--cfg-options", *options], env=subprocess_environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("Iter(train) [2/2]") == 1
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_2.pth"]
    assert test_segmentor([str(config_path), str(tmp_path / "iter_2.pth")]) == 0


def lose(monkeypatch, iteration, change):
    """Spoils what `change` is given, the losses of an iteration, counted from 1, and the head that computes them."""
    iterations, loss_by_feat = itertools.count(1), LeanUPerHead.loss_by_feat

    def spoiled(self, *args):
        losses = loss_by_feat(self, *args)
        if next(iterations) == iteration:
            change(losses, self)
        return losses

    monkeypatch.setattr(LeanUPerHead, "loss_by_feat", spoiled)


def test_loss_that_is_not_finite(config_path, train_segmentor, error, tmp_path, monkeypatch):
    """Training stops, nothing that is not finite is saved, and it goes on as the message says."""
    argv = [config_path, "--work-dir", tmp_path / "work"]
    options = ["--cfg-options", "default_hooks.checkpoint.max_keep_ckpts=1"]
    lose(monkeypatch, 4, lambda losses, head: losses.update(loss_ce=losses["loss_ce"] * float("nan")))
    message = error(train_segmentor, [*argv, *options])
    assert "the loss became nan in iteration 4: try a lower optim_wrapper.clip_grad.max_norm with --resume" in message
    assert f"{tmp_path / 'work' / 'iter_2.pth'} holds the last state before" in message
    assert [path.name for path in (tmp_path / "work").glob("*.pth")] == ["iter_2.pth"]
    monkeypatch.undo()
    argv = [*map(str, argv), "--resume", *options, "optim_wrapper.clip_grad.max_norm=0.1"]
    assert train_segmentor(argv) == 0
    assert (tmp_path / "work" / "iter_4.pth").exists()


def test_weights_that_are_not_finite_are_not_saved(config_path, train_segmentor, error, tmp_path, monkeypatch):
    lose(monkeypatch, 2, lambda losses, head: head.conv_seg.bias.data.fill_(float("inf")))
    message = error(train_segmentor, [config_path, "--work-dir", tmp_path / "work"])
    assert "weights became infinite in iteration 2" in message and "no state before was saved" in message
    assert not list((tmp_path / "work").glob("*.pth"))


def test_averaged_weights(run, config_path, train_segmentor, tmp_path, monkeypatch):
    """EMAHook saves its average in the place of the weights that were trained; resuming goes on with both."""
    content = read(run / "iter_2.pth")
    average = content["state_dict"]
    trained = {name: tensor + 1 for name, tensor in average.items()}
    content["ema_state_dict"] = {f"module.{name}": tensor for name, tensor in trained.items()}
    torch.save(content, tmp_path / "x.pth")
    (tmp_path / "config.py").write_text(f'_base_ = "{config_path}"\ncustom_hooks = [dict(type="EMAHook")]')
    found = {}
    call_hook = StrictRunner.call_hook

    def stop(runner, name, **kwargs):
        if name == "before_train":
            (hook,) = (each for each in runner.hooks if isinstance(each, EMAHook))
            found.update(trained=runner.model.state_dict(), average=hook.ema_model.module.state_dict())
            raise UserError("seen enough")
        call_hook(runner, name, **kwargs)

    monkeypatch.setattr(StrictRunner, "call_hook", stop)
    options = ["--work-dir", str(tmp_path / "work"), "--resume", str(tmp_path / "x.pth")]
    assert train_segmentor([str(tmp_path / "config.py"), *options]) == 1
    torch.testing.assert_close(dict(found["trained"]), trained, rtol=0, atol=0)
    torch.testing.assert_close(dict(found["average"]), dict(average), rtol=0, atol=0)
