"""Nothing of a run is lost: one process at a time, no files of another run replaced, torn files noticed."""

import errno
import os
import random
import re
import resource
import signal
import socket
import sys
import time

import pytest
import torch
from support.mean_colour import MeanColour, MeanColourConfig
from support.ranks import Forked

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.recipe import OptimConfig
from vrwkv.runtime.run_folder import RunFolder
from vrwkv.runtime.trainer import run

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture
def config(tmp_path):
    def make(output="output", epochs=2):
        return MeanColourConfig(output=str(tmp_path / output), epochs=epochs, optim=OptimConfig(lr=0.05), device="cpu")

    return make


@pytest.fixture
def output(config, tmp_path):
    """The folder of a finished run of two epochs."""
    run(MeanColour, config())
    return tmp_path / "output"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def epoch(path):
    return torch.load(path, weights_only=True)["epoch"]


@pytest.fixture
def holder(config):
    """A process that trains in the folder until it is killed."""

    def train_for_ever():
        MeanColour.evaluate = lambda self, model: print("at it", file=sys.stderr) or signal.pause()
        run(MeanColour, config())
        return 0

    process = Forked(train_for_ever)
    for line in process.stderr:
        if line == "at it\n":
            break
    yield process
    process.process.kill()
    process.wait()


def test_second_process_stops_and_names_the_first(holder, config, tmp_path):
    before = content(tmp_path / "output")
    for resume in (None, "auto"):
        with pytest.raises(UserError) as error:
            run(MeanColour, config(), resume)
        expected = f"{tmp_path / 'output'} is in use by process {holder.pid} on {socket.gethostname()} since 2"
        assert str(error.value).startswith(expected)
    assert content(tmp_path / "output") == before


def test_lock_of_a_dead_process_does_not_block(holder, config, tmp_path):
    os.killpg(holder.pid, signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    assert (tmp_path / "output" / ".lock").exists()
    run(MeanColour, config(), "auto")
    assert epoch(tmp_path / "output" / "last.pth") == 2
    assert not (tmp_path / "output" / ".lock").exists()


def test_killed_at_any_moment(config, tmp_path):
    """And resumed each time, a run ends with the bits of one that was not."""
    generator = random.Random(0)
    run(MeanColour, config("unbroken", epochs=6))
    for _ in range(6):
        process = Forked(lambda: run(MeanColour, config("broken", epochs=6), "auto") and 0)
        time.sleep(generator.uniform(0.01, 0.2))
        process.process.kill()
        process.wait()
    run(MeanColour, config("broken", epochs=6), "auto")
    one, other = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("unbroken", "broken"))
    assert all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())
    lines = (tmp_path / "broken" / "summary.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["epoch", *"123456"]


def test_disk_that_fills(output, config):
    """What was there stays whole, and the run can go on when there is room."""
    states = ("last.pth", "last.1.pth")
    before = [(output / name).read_bytes() for name in states]

    def train():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[0]) // 2, len(before[0]) // 2))
        try:
            run(MeanColour, config(epochs=3), "auto")
        except UserError as error:
            print(error, file=sys.stderr)
            return 1
        return 0

    process = Forked(train)
    assert re.search(rf"cannot write {output}/(best|last).pth: ", process.stderr.read())
    assert process.wait() == 1
    assert [(output / name).read_bytes() for name in states] == before
    assert not list(output.glob("*.tmp"))
    run(MeanColour, config(epochs=3), "auto")
    assert epoch(output / "last.pth") == 3


def test_lock_that_is_removed_while_another_waits_for_it(tmp_path, monkeypatch):
    """Who has opened the file of a lock that is given up takes a new one, which others see."""
    import fcntl

    lockf, path = fcntl.lockf, tmp_path / ".lock"

    def give_up_first(file, flags):
        monkeypatch.setattr(fcntl, "lockf", lockf)
        path.unlink()
        lockf(file, flags)

    monkeypatch.setattr(fcntl, "lockf", give_up_first)
    with RunFolder(tmp_path).locked():
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert not path.exists()


def test_folder_that_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "new").locked():
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
    with RunFolder(tmp_path / "new").locked():
        (tmp_path / "new" / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_new_run_does_not_replace_another(output, config):
    before = content(output)
    with pytest.raises(
        UserError, match=r"holds an earlier run \(last.pth, last.1.pth, best.pth, summary.csv, curves.png\): add"
    ):
        run(MeanColour, config())
    assert content(output) == before


def test_resumed_run_does_not_replace_another(output, config, tmp_path):
    run(MeanColour, config("other", epochs=1))
    before = content(output)
    with pytest.raises(UserError, match="holds an earlier run"):
        run(MeanColour, config(epochs=3), str(tmp_path / "other" / "last.pth"))
    with pytest.raises(UserError, match="holds an earlier run"):  # back to the best would lose the last
        run(MeanColour, config(epochs=3), str(output / "best.pth"))
    assert content(output) == before


def test_folder_without_last(output, config):
    for name in ("last.pth", "last.1.pth"):
        (output / name).unlink()
    before = content(output)
    for resume in (None, "auto"):
        with pytest.raises(UserError, match=rf"add --resume {output / 'best.pth'} to go on"):
            run(MeanColour, config(epochs=3), resume)
    assert content(output) == before
    run(MeanColour, config(epochs=3), str(output / "best.pth"))
    assert epoch(output / "last.pth") == 3
    assert len((output / "summary.csv").read_text().splitlines()) == 4


def test_folder_with_a_summary_alone(output, config):
    for name in ("last.pth", "last.1.pth", "best.pth", "curves.png"):
        (output / name).unlink()
    with pytest.raises(UserError, match=r"holds an earlier run \(summary.csv\): add --resume to"):
        run(MeanColour, config(epochs=3), "auto")


@pytest.mark.parametrize("epochs", [1, 3])
def test_overwrite(epochs, output, config):
    """The whole run is new, whatever was there."""
    run(MeanColour, config(epochs=epochs), overwrite=True)
    assert epoch(output / "last.pth") == epochs
    assert len((output / "summary.csv").read_text().splitlines()) == epochs + 1


def test_overwrite_removes_the_earlier_best(output, config, monkeypatch):
    monkeypatch.setattr(MeanColour, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(MeanColour, config(), overwrite=True)
    assert {path.name for path in output.iterdir()} == {"config.yaml", "last.pth"}


def test_overwrite_with_what_another_run_has_reached(output, config, tmp_path):
    run(MeanColour, config("other", epochs=1))
    run(MeanColour, config(epochs=2), str(tmp_path / "other" / "last.pth"), overwrite=True)
    lines = (output / "summary.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["epoch", "2"]


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_back_to_the_one_before(config, tmp_path, capsys):
    """A cut last.pth is put aside, which is said, and the run ends with the bits of one to which nothing happened."""
    for name in ("unbroken", "broken"):
        run(MeanColour, config(name))
    output = tmp_path / "broken"
    (output / "last.pth").write_bytes((output / "last.pth").read_bytes()[:1000])
    capsys.readouterr()
    run(MeanColour, config("broken"), "auto")
    said = capsys.readouterr().err
    assert f"{output / 'last.pth'} is not a checkpoint" in said
    assert f"going on from the one before, {output / 'last.1.pth'}\nresuming from" in said
    assert (output / "last.pth.damaged").stat().st_size == 1000
    assert (output / "summary.csv").read_bytes() == (tmp_path / "unbroken" / "summary.csv").read_bytes()
    one, other = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("unbroken", "broken"))
    assert all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())


def test_killed_between_the_renames(output, config):
    """What is then the newest is last.1.pth, and the next save does not replace it by something older."""
    (output / "last.pth").unlink()
    run(MeanColour, config(epochs=3), "auto")
    assert [epoch(output / name) for name in ("last.pth", "last.1.pth")] == [3, 2]


def test_back_to_the_best(output, config):
    """Where no last.pth can be read, the way is named, and the way works."""
    for name in ("last.pth", "last.1.pth"):
        damage(output / name)
    with pytest.raises(UserError) as error:
        run(MeanColour, config(epochs=3), "auto")
    way = f"to go on from the best: --resume {output / 'best.pth'} --overwrite"
    assert str(error.value) == f"{output / 'last.pth'} is damaged: its checksum is not that of its content; {way}"
    run(MeanColour, config(epochs=3), str(output / "best.pth"), overwrite=True)
    assert epoch(output / "last.pth") == 3
    assert len((output / "summary.csv").read_text().splitlines()) == 4


def test_damaged_checkpoint_elsewhere_names_no_way(output, config, tmp_path):
    (tmp_path / "x.pth").write_bytes(b"none")
    with pytest.raises(UserError) as error:
        run(MeanColour, config("other"), str(tmp_path / "x.pth"))
    assert str(error.value).startswith(f"{tmp_path / 'x.pth'} is not a checkpoint")
    assert "--resume" not in str(error.value)


def test_paths_are_compared_as_files(output, config, monkeypatch):
    monkeypatch.chdir(output)
    run(MeanColour, config(epochs=3), "../output/last.pth")
    assert len((output / "summary.csv").read_text().splitlines()) == 4


def test_nothing_left_to_train_elsewhere(output, config, tmp_path):
    with pytest.raises(UserError, match="has done 2 epochs, which is all that epochs asks for"):
        run(MeanColour, config("other"), str(output / "last.pth"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_torn_row_is_dropped(cut, output, config, capsys):
    """With its newline, with some numbers, or within the first: the row of the last epoch before."""
    data = (output / "summary.csv").read_bytes()
    rows = data.splitlines(keepends=True)
    (output / "summary.csv").write_bytes(data[:-cut])
    run(MeanColour, config(epochs=3), "auto")
    assert f"dropped 1 torn rows of {output / 'summary.csv'}" in capsys.readouterr().err
    after = (output / "summary.csv").read_bytes().splitlines(keepends=True)
    assert after[:2] == rows[:2]
    assert [line.partition(b",")[0] for line in after] == [b"epoch", b"1", b"3"]


@pytest.mark.parametrize("text", [b"", b"epo", b"\\xff\\x00\\n1,2\\n"])
def test_torn_header(text, output, config):
    (output / "summary.csv").write_bytes(text)
    run(MeanColour, config(epochs=3), "auto")
    lines = (output / "summary.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["epoch", "3"]


def test_rows_of_later_epochs_are_dropped(output, config):
    """As after a kill between the row and last.pth."""
    rows = (output / "summary.csv").read_bytes().splitlines(keepends=True)
    (output / "summary.csv").write_bytes(b"".join([*rows, b"3" + rows[2][1:]]))
    before = (output / "summary.csv").read_bytes()
    run(MeanColour, config(epochs=3), "auto")
    after = (output / "summary.csv").read_bytes()
    assert after.startswith(b"".join(rows))
    assert len(after.splitlines()) == 4
    assert after != before


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("function", ["mkdir", "open"])
def test_output_that_cannot_be_written(resume, function, output, config, monkeypatch):
    error = PermissionError(errno.EACCES, "Permission denied")
    if function == "open":
        error = OSError(errno.EROFS, "Read-only file system")

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr("pathlib.Path.mkdir" if function == "mkdir" else "os.open", refuse)
    with pytest.raises(UserError, match=rf"cannot write to output {output}: {error.strerror}"):
        run(MeanColour, config(epochs=3), resume)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"epoch": -1}, "entry epoch must be greater than or equal to 0, not -1"),
        ({"epoch": None}, "entry epoch must be a valid integer, not None"),
        ({"config": {}}, "config key 'output' is missing"),
        ({"config": []}, "entry config must be a valid dictionary"),
        ({"scaler": 3}, "entry scaler must be a valid dictionary"),
        ({"optimizer": {}}, "has no state of this optimizer"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "has no state of this optimizer"),
        ({"state_dict": {}}, "no state dict of tensors in it"),
        ({"state_dict": {"x": torch.zeros(1)}}, "is of another model than Sequential: 2 missing"),
        ({"best_metric": "low"}, "entry best_metric must be a valid number"),
        ({"processes": 2}, "is of another run: the number of processes was 2, is 1"),
    ],
)
def test_checkpoints_with_entries_that_are_no_good(change, expected, output, config):
    path = output / "last.pth"
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(UserError, match=rf"^(checkpoint )?{path}.* {expected}"):
        run(MeanColour, config(epochs=3), "auto")


@pytest.mark.parametrize("entry", ["config", "processes", "epoch", "best_metric", "state_dict", "scaler", "inputs"])
def test_checkpoints_without_an_entry(entry, output, config):
    path = output / "last.pth"
    saved = torch.load(path, weights_only=True)
    del saved[entry]
    torch.save(saved, path)
    expected = "is of another run: inputs" if entry == "inputs" else f"entry '{entry}' is missing"
    with pytest.raises(UserError, match=rf"checkpoint {path}.* {expected}"):
        run(MeanColour, config(epochs=3), "auto")


def test_checkpoint_without_averages(output, config, tmp_path):
    saved = torch.load(output / "last.pth", weights_only=True)
    wanted = config().model_copy(update={"optim": OptimConfig(lr=0.05, ema_decay=0.5)})
    saved["config"]["optim"]["ema_decay"] = 0.5
    torch.save(saved, output / "last.pth")
    with pytest.raises(UserError, match="no state dict of tensors in it"):
        run(MeanColour, wanted.model_copy(update={"epochs": 3}), "auto")
