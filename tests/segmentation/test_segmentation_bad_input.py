"""Every kind of bad input ends with one line that names it and a non-zero exit code."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.scripts import REPOSITORY


@pytest.fixture
def own_scenes(scenes, tmp_path):
    """A data set that a test may spoil, and the options that name it."""
    copy = shutil.copytree(scenes, tmp_path / "scenes")
    roots = [f"{name}_dataloader.dataset.data_root={copy}" for name in ("train", "val")]
    return copy, ["--cfg-options", *roots, "train_dataloader.batch_size=8"]


def spoil(path, value):
    mask = np.asarray(Image.open(path)).copy()
    mask[0, 0] = value
    Image.fromarray(mask).save(path)


def spoil_mask(root):
    spoil(root / "masks/train/0003.png", 11)
    return "masks/train/0003.png has the value 11; 11 classes have the values 0 to 10, 255 is ignored"


def colour_mask(root):
    Image.new("RGB", (32, 32)).save(root / "masks/train/0003.png")
    return "masks/train/0003.png must have one channel of class indices, it has 3"


def shrink_mask(root):
    Image.new("L", (31, 32)).save(root / "masks/train/0003.png")
    return "masks/train/0003.png is of size (32, 31), image "


def remove_mask(root):
    (root / "masks/train/0003.png").unlink()
    return "masks/train/0003.png does not exist (of image "


def cut_image(root):
    path = root / "images/train/0003.png"
    path.write_bytes(path.read_bytes()[:200])
    return f"cannot read image {path}: "


def remove_folder(root):
    shutil.rmtree(root / "images/val")
    return f"val_dataloader: the img_path folder {root / 'images/val'} does not exist"


def empty_folder(root):
    shutil.rmtree(root / "masks/train")
    (root / "masks/train").mkdir()
    return f"train_dataloader: the seg_map_path folder {root / 'masks/train'} is empty"


@pytest.mark.parametrize(
    "spoiling", [spoil_mask, colour_mask, shrink_mask, remove_mask, cut_image, remove_folder, empty_folder]
)
def test_bad_data(spoiling, own_scenes, config_path, train_segmentor, error, tmp_path):
    root, options = own_scenes
    expected = spoiling(root)
    message = error(train_segmentor, [config_path, "--work-dir", tmp_path / "work", *options])
    assert expected in message


def test_bad_mask_in_a_worker(own_scenes, config_path, train_segmentor, error, tmp_path):
    root, options = own_scenes
    expected = spoil_mask(root)
    argv = [config_path, "--work-dir", tmp_path / "work", *options, "train_dataloader.num_workers=1"]
    assert expected in error(train_segmentor, argv)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["modle.type=x"], "the config has no key 'modle'; nearest: model"),
        (["model.decode_head.num_classes=5"], "train_dataloader has 11 classes, model.decode_head.num_classes is 5"),
        (["model.backbone.model=vrwkv_tinny"], "model must be one of "),
        (["model.backbone.type=ResNott"], "ResNott is not in the mmseg::model registry"),
        (["model.backbone.deform_num_heads=5"], "must be a multiple of 5 heads"),
        (["load_from=absent.pth"], "checkpoint absent.pth does not exist"),
        (["model"], "--cfg-options takes KEY=VALUE, got 'model'"),
        (["model.backbone=[(1]"], "--cfg-options cannot be read: "),
        (["model=3"], "config key model must be a valid dictionary, not 3"),
        (
            ["val_evaluator.iou_metrics=[mIuO]"],
            "config key val_evaluator[0].iou_metrics[0] must be 'mIoU', 'mDice' or ",
        ),
        (["train_pipeline.x=3"], "train_pipeline.x=3 does not fit the config: "),
        (["model.test_cfg.mode=slid"], "config key model.test_cfg.mode must be 'whole' or 'slide', not 'slid'"),
        (
            ["model.test_cfg.stride=(0,0)"],
            "model.test_cfg.stride[0] must be greater than or equal to 1, not 0",
        ),
        (
            ["model.test_cfg.crop_size=(0,0)"],
            "model.test_cfg.crop_size[0] must be greater than or equal to 1",
        ),
        (["model.test_cfg.stride=(40,20)"], "needs a stride of at most the crop_size [32, 32], not [40, 20]"),
        (
            ["train_dataloader.batch_size=0"],
            "train_dataloader.batch_size must be greater than or equal to 1",
        ),
        (["val_dataloader.num_workers=-1"], "config key val_dataloader.num_workers must be greater than or equal to 0"),
        (["optim_wrapper.optimizer.lr=-1"], "config key optim_wrapper.optimizer.lr must be greater than 0, not -1"),
        (
            ["optim_wrapper.optimizer.weight_decay=-1"],
            "optim_wrapper.optimizer.weight_decay must be greater",
        ),
        (["optim_wrapper.clip_grad.max_norm=-1"], "config key optim_wrapper.clip_grad.max_norm must be greater than 0"),
        (["optim_wrapper.optimizer.momentums=1"], "unexpected keyword argument 'momentums' (TypeError in "),
        (["train_cfg.max_iters=0"], "config key train_cfg.max_iters must be greater than or equal to 1, not 0"),
        (["train_cfg.val_interval=0"], "config key train_cfg.val_interval must be greater than or equal to 1, not 0"),
        (["model.decode_head.in_index=[0,1,2,9]"], "the config cannot be used: "),
    ],
)
def test_settings(options, expected, config_path, train_segmentor, error, tmp_path):
    argv = [config_path, "--work-dir", tmp_path / "work", "--cfg-options", *options]
    assert expected in error(train_segmentor, argv)


def test_bad_configs(train_segmentor, error, tmp_path):
    assert "config absent.py does not exist" in error(train_segmentor, ["absent.py"])
    (tmp_path / "broken.py").write_text("model = dict(")
    assert "broken.py cannot be read" in error(train_segmentor, [tmp_path / "broken.py"])
    (tmp_path / "empty.py").write_text("x = 1")
    assert "empty.py has no model" in error(train_segmentor, [tmp_path / "empty.py"])


def test_earlier_run_is_not_overwritten(run, config_path, train_segmentor, error):
    message = error(train_segmentor, [config_path, "--work-dir", run])
    assert "holds an earlier run (iter_2.pth, iter_4.pth): add --resume" in message


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_without_torchrun(name, run, config_path, train_segmentor, error, monkeypatch):
    """Each would train by itself, into one folder; a shell of a SLURM job of many tasks is one process."""
    monkeypatch.setenv(name, "2")
    argv = [config_path, "--work-dir", run]
    assert f"started here were 2 ({name}) without it: start one on each node" in error(train_segmentor, argv)
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert "holds an earlier run" in error(train_segmentor, argv)


def test_all_problems_at_once(config_path, train_segmentor, error):
    options = ["model.test_cfg.mode=slid", "train_cfg.max_iters=0"]
    first, second = error(train_segmentor, [config_path, "--cfg-options", *options]).splitlines()
    assert "model.test_cfg.mode" in first and "train_cfg.max_iters" in second


def test_work_folder_that_cannot_be_made(config_path, train_segmentor, error, tmp_path):
    (tmp_path / "file").touch()
    argv = [config_path, "--work-dir", tmp_path / "file" / "work"]
    assert f"cannot write to output {tmp_path / 'file' / 'work'}: Not a directory" in error(train_segmentor, argv)


def test_weights_alone_cannot_be_resumed(config_path, train_segmentor, error, tmp_path):
    argv = [config_path, "--work-dir", tmp_path, "--resume"]
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "x.pth")
    assert "has no training state" in error(train_segmentor, [*argv, tmp_path / "x.pth"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_mixed_precision_without_gpu(config_path, train_segmentor, error):
    assert "mixed precision needs a GPU" in error(train_segmentor, [config_path, "--amp"])


class Wants:
    """A pickle of it runs code when it is read."""

    def __reduce__(self):
        return os.system, ("true",)


class Probes:
    """A pickle of it takes more of HistoryBuffer than mmengine's checkpoints do."""

    def __reduce__(self):
        from mmengine.logging import HistoryBuffer

        return getattr, (HistoryBuffer, "__init__")


@pytest.mark.parametrize(("payload", "named"), [(Wants(), "posix.system"), (Probes(), "getattr")])
def test_checkpoint_that_would_run_code(payload, named, config_path, test_segmentor, error, tmp_path, monkeypatch):
    monkeypatch.setattr("mmengine.runner.runner.time.strftime", lambda *_: "20260101_000000")
    torch.save({"state_dict": {"x": torch.zeros(1)}, "meta": payload}, tmp_path / "x.pth")
    for _ in range(2):  # in one second: mmengine names experiments by the second
        message = error(test_segmentor, [config_path, tmp_path / "x.pth"])
        assert "x.pth is not a checkpoint that can be read safely" in message
    assert named in message
    assert "if you trust it" in message


def test_checkpoints_that_do_not_fit(config_path, checkpoint, test_segmentor, segment_main, error, tmp_path):
    assert "absent.pth does not exist" in error(test_segmentor, [config_path, "absent.pth"])
    (tmp_path / "x.pth").write_bytes(b"no checkpoint")
    assert "x.pth is not a checkpoint" in error(test_segmentor, [config_path, tmp_path / "x.pth"])
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "x.pth")
    assert "is of no segmentor" in error(test_segmentor, [config_path, tmp_path / "x.pth"])
    argv = ["x.png", "--config", config_path, "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    options = ["--cfg-options", "model.decode_head.num_classes=5", "model.decode_head.loss_decode.class_weight=None"]
    assert f"checkpoint {checkpoint} has 11 classes, the config has 5" in error(segment_main, [*argv, *options])
    assert "is of another model than EncoderDecoder: " in error(
        segment_main, [*argv, "--cfg-options", "model.backbone.conv_inplane=8"]
    )
    assert "opacity must lie between 0 and 1" in error(segment_main, [*argv, "--opacity", "2"])
    assert "holds no pictures" in error(segment_main, [tmp_path, *argv[1:]])


def test_without_mmseg(subprocess_environment):
    """`import vrwkv` needs nothing of mmseg; a script of this folder names in one line what to install."""
    program = (
        "import runpy, sys\n"
        "for name in ('mmseg', 'mmengine', 'mmcv'): sys.modules[name] = None\n"
        "import vrwkv, vrwkv.classification\n"
        "sys.argv = 'segment.py x.png --config c.py --checkpoint c.pth --out out'.split()\n"
        f"runpy.run_path({str(REPOSITORY / 'tools' / 'segment.py')!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", program], env=subprocess_environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: vrwkv.segmentation needs mmsegmentation")
    assert last.endswith("pip install 'vrwkv[seg]'")
