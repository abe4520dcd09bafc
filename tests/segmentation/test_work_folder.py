"""Work folders that were copied or tidied: nothing of another run is replaced, and a run finds its own checkpoints."""

import shutil
from pathlib import Path

import pytest

from vrwkv.runtime.errors import UserError
from vrwkv.segmentation.work_folder import find_start


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of a finished run's work folder, whose `last_checkpoint` names the original's."""
    return shutil.copytree(run, tmp_path / "copy")


def test_tidied_folder(copy, config_path, train_segmentor, error):
    """Without `last_checkpoint`: not free, and resumed from the newest file that is whole."""
    (copy / "last_checkpoint").unlink()
    assert "holds an earlier run (iter_2.pth, iter_4.pth): add --resume" in error(
        train_segmentor, [config_path, "--work-dir", copy]
    )
    assert find_start(copy, "auto") == copy / "iter_4.pth"
    shutil.copy(copy / "iter_4.pth", copy / "iter_10.pth")
    assert find_start(copy, "auto") == copy / "iter_10.pth"
    (copy / "iter_10.pth").write_bytes((copy / "iter_4.pth").read_bytes()[:-100])
    assert find_start(copy, "auto") == copy / "iter_4.pth"


def test_folder_with_the_best_alone(run, tmp_path):
    """mmengine saves it without the optimizer's state."""
    shutil.copy(run / "iter_4.pth", tmp_path / "best_mIoU_iter_4.pth")
    with pytest.raises(UserError, match="holds an earlier run"):
        find_start(tmp_path, None)
    with pytest.raises(UserError, match=r"another work folder, where load_from=.*best_mIoU_iter_4.pth starts"):
        find_start(tmp_path, "auto")


def test_copied_folder(copy, run):
    """Its own file is taken, also where the one that was noted has been removed; the noted one where it has none."""
    assert find_start(copy, "auto") == copy / "iter_4.pth"
    (copy / "iter_4.pth").unlink()
    assert find_start(copy, "auto") == copy / "iter_2.pth"
    (copy / "iter_2.pth").unlink()
    assert find_start(copy, "auto") == run / "iter_4.pth"
    assert find_start(copy, str(run / "iter_2.pth")) == run / "iter_2.pth"  # as with CheckpointHook's out_dir


def test_resumed_run_does_not_replace_another(copy, run, config_path, train_segmentor, error, tmp_path):
    before = (copy / "iter_4.pth").read_bytes()
    argv = [config_path, "--work-dir", copy, "--resume", run / "iter_2.pth"]
    assert "holds an earlier run (iter_2.pth, iter_4.pth)" in error(train_segmentor, argv)
    assert (copy / "iter_4.pth").read_bytes() == before
    assert find_start(copy, str(copy / "iter_2.pth")) == copy / "iter_2.pth"
    assert find_start(tmp_path / "free", str(run / "iter_2.pth")) == run / "iter_2.pth"


def test_free_folder(tmp_path):
    (tmp_path / "pretrained.pth").touch()
    assert find_start(tmp_path, None) is None
    assert find_start(tmp_path, "auto") is None
