"""A checkpoint is there whole, old or new, whatever happens while it is written."""

import os

import pytest
import torch

from vrwkv.runtime import checkpoint
from vrwkv.runtime.errors import UserError

OLD, NEW = {"x": torch.zeros(1000)}, {"x": torch.ones(1000)}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(OLD, tmp_path / "last.pth")
    return tmp_path / "last.pth"


def test_old_file_is_there_until_the_new_one_is_on_disk(path, monkeypatch):
    before, steps = path.read_bytes(), []

    def watch(module, name):
        call = getattr(module, name)

        def wrapper(*args, **kwargs):
            assert path.read_bytes() == before
            result = call(*args, **kwargs)
            steps.append(name)
            return result

        monkeypatch.setattr(module, name, wrapper)

    for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        watch(module, name)
    checkpoint.save(NEW, path)
    assert steps == ["save", "fsync", "replace"]
    assert torch.equal(torch.load(path, weights_only=True)["x"], NEW["x"])
    assert os.listdir(path.parent) == ["last.pth"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_failed_write(error, path, monkeypatch):
    before = path.read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=rf"cannot write {path}: .*(No space left|PytorchStreamWriter failed)"):
        checkpoint.save(NEW, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["last.pth"]


def test_interrupted_write(path, monkeypatch):
    before = path.read_bytes()

    def interrupt(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(NEW, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["last.pth"]
