"""A checkpoint is there whole, old or new, whatever happens while it is written."""

import os

import pytest
import torch

from vrwkv.runtime import checkpoint
from vrwkv.runtime.errors import UserError

OLD, NEW = {"x": torch.zeros(10)}, {"x": torch.ones(10)}


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


def test_every_flipped_bit_is_noticed(path):
    """What is read is what was written, or nothing."""
    data, damaged = path.read_bytes(), path.with_name("damaged.pth")
    refused = 0
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        damaged.write_bytes(changed)
        try:
            assert torch.equal(checkpoint.read(damaged)["x"], OLD["x"])
        except UserError:
            refused += 1
    assert refused >= len(data) - 2  # a comment of another length is none of ours, and the rest is whole


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9])
def test_truncated_file(part, path):
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(UserError, match=rf"^{path} is not a checkpoint that can be read safely: "):
        checkpoint.read(path)


def test_files_without_a_checksum_are_read(tmp_path):
    torch.save(NEW, tmp_path / "x.pth")
    assert torch.equal(checkpoint.read(tmp_path / "x.pth")["x"], NEW["x"])
    torch.save(NEW, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoint.read(tmp_path / "x.pth")["x"], NEW["x"])


def test_checksum_covers_large_files(tmp_path):
    """Of several blocks that are read at a time."""
    checkpoint.save({"x": torch.zeros(1 << 20)}, tmp_path / "x.pth")
    with open(tmp_path / "x.pth", "r+b") as file:
        file.seek(3 << 20)
        file.write(b"1")
    with pytest.raises(UserError, match="is damaged: its checksum is not that of its content"):
        checkpoint.read(tmp_path / "x.pth")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("made by a checkpoint",)


def test_file_that_would_run_code(tmp_path, monkeypatch):
    """What it asks for is named, and nobody is advised to read it all the same."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": RunsCode()}, tmp_path / "x.pth")
    with pytest.raises(UserError) as error:
        checkpoint.read(tmp_path / "x.pth")
    assert (
        str(error.value) == f"{tmp_path / 'x.pth'} is not a checkpoint that can be read safely: it asks for posix.mkdir"
    )
    assert os.listdir(tmp_path) == ["x.pth"]


def test_file_that_is_no_checkpoint(tmp_path):
    for data in (b"", b"some text", b"PK\x03\x04", b"\x80\x02junk", bytes(range(256)) * 9):
        (tmp_path / "x.pth").write_bytes(data)
        with pytest.raises(UserError) as error:
            checkpoint.read(tmp_path / "x.pth")
        assert "weights_only" not in str(error.value)
        assert "\n" not in str(error.value)
    torch.save([1], tmp_path / "x.pth")
    with pytest.raises(UserError, match="is not a checkpoint: it holds list, not a dict"):
        checkpoint.read(tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"checkpoint .*absent.pth does not exist"):
        checkpoint.read(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.read(tmp_path)
