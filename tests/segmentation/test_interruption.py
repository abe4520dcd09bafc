"""Signals end a training with what it has trained saved."""

import itertools
import os
import signal

import torch
from mmseg.evaluation import IoUMetric
from support.ranks import Forked, run_ranks

from vrwkv.segmentation import LeanUPerHead
from vrwkv.segmentation.checkpoint import read

RARELY = ["--cfg-options", "default_hooks.checkpoint.interval=100"]


def signal_at_call(monkeypatch, owner, name, number, call, rank=0):
    """Sends this process, if it is of this rank, a signal in a call, counted from 1, of a method."""
    calls, method = itertools.count(1), getattr(owner, name)

    def signalled(self, *args, **kwargs):
        if next(calls) == call and int(os.environ.get("RANK", 0)) == rank:
            os.kill(os.getpid(), number)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)


def test_signal_ends_the_iteration_and_the_run_goes_on(
    run, config_path, train_segmentor, tmp_path, monkeypatch, capsys
):
    """And `max_keep_ckpts` counts what was saved at the signal."""
    argv = [str(config_path), "--work-dir", str(tmp_path), *RARELY, "default_hooks.checkpoint.max_keep_ckpts=1"]
    with monkeypatch.context() as patch:
        signal_at_call(patch, LeanUPerHead, "loss_by_feat", signal.SIGINT, 2)
        assert train_segmentor(argv) == 75
    message = f"interrupted by SIGINT: {tmp_path / 'iter_2.pth'} is saved; to go on, start it again with --resume"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "iter_2.pth")
    torch.testing.assert_close(read(tmp_path / "iter_2.pth")["state_dict"], read(run / "iter_2.pth")["state_dict"])
    assert train_segmentor([*argv, "--resume"]) == 0
    state = read(tmp_path / "iter_4.pth")["optimizer"]["state"]
    assert next(iter(state.values()))["step"].item() == 4
    assert [path.name for path in tmp_path.glob("iter_*.pth")] == ["iter_4.pth"]


def test_signal_to_the_whole_group(config_path, train_segmentor, tmp_path):
    """Also to the loader's worker, as a job manager sends it."""
    argv = [str(config_path), "--work-dir", str(tmp_path), *RARELY]
    process = Forked(lambda: train_segmentor([*argv, "train_dataloader.num_workers=1", "train_cfg.max_iters=1000"]))
    lines = iter(process.stderr)
    seen = next(line for line in lines if "Iter(train)" in line)
    os.killpg(process.pid, signal.SIGTERM)
    seen += "".join(lines)
    assert process.wait() == 75, seen
    assert "interrupted by SIGTERM: " in seen
    assert len(list(tmp_path.glob("iter_*.pth"))) == 1


def test_signal_during_the_evaluation(run, config_path, train_segmentor, tmp_path, monkeypatch):
    """Does not wait for its end, and saves the trained weights beside their average, which is evaluated."""
    config = tmp_path / "config.py"
    config.write_text(f"""
_base_ = "{config_path}"
custom_hooks = [dict(type="EMAHook", momentum=0.5)]
train_cfg = dict(val_interval=2)
""")
    signal_at_call(monkeypatch, IoUMetric, "process", signal.SIGTERM, 1)
    pictures = []
    process = IoUMetric.process
    monkeypatch.setattr(IoUMetric, "process", lambda *args: (pictures.append(1), process(*args)))
    assert train_segmentor([str(config), "--work-dir", str(tmp_path / "work"), *RARELY]) == 75
    assert len(pictures) == 1
    content, trained = read(tmp_path / "work" / "iter_2.pth"), read(run / "iter_2.pth")["state_dict"]
    assert content["meta"]["iter"] == 2
    name = "decode_head.conv_seg.weight"
    torch.testing.assert_close(content["ema_state_dict"][f"module.{name}"], trained[name])
    assert not torch.equal(content["state_dict"][name], trained[name])


def test_signal_to_one_of_two_processes(config_path, train_segmentor, tmp_path, monkeypatch):
    signal_at_call(monkeypatch, LeanUPerHead, "loss_by_feat", signal.SIGUSR1, 2, rank=1)
    argv = [str(config_path), "--work-dir", str(tmp_path), *RARELY]
    assert run_ranks(lambda: train_segmentor(argv)) == [75, 75]
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_2.pth"]
