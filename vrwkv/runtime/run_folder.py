"""The output folder of a training run: what is in it, and who may write to it."""

import csv
import errno
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from timm.utils import update_summary

from vrwkv.runtime import checkpoint
from vrwkv.runtime.config import Section
from vrwkv.runtime.curves import draw_curves
from vrwkv.runtime.errors import UserError, first_line
from vrwkv.runtime.processes import is_primary
from vrwkv.runtime.progress import Measure, say


class RunFolder:
    """last.pth and earlier ones (last.1.pth, ...), best.pth, summary.csv with a row for each epoch, curves.png,
    config.yaml; and .lock while a process trains."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last, self.best = path / "last.pth", path / "best.pth"
        self.summary, self.curves = path / "summary.csv", path / "curves.png"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, and keeps others out of it that do the same; the end of the process frees it too.

        Raises:
            UserError: another process trains there, or the folder cannot be written to.
        """
        lock, is_new = self.path / ".lock", not os.path.exists(self.path)
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            file = _take(lock)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # before it is free for others: who has opened it finds that it is gone
            os.close(file)
            if is_new:
                with suppress(OSError):  # something is in it
                    self.path.rmdir()

    def owns(self, path: Path) -> bool:
        """Whether a file is in this folder."""
        return path.resolve().parent == self.path.resolve()

    def states(self) -> list[Path]:
        """last.pth and the earlier ones that there are, the newest first."""
        numbers = sorted(int(path.suffixes[0][1:]) for path in self.path.glob("last.[0-9]*.pth"))
        paths = [self.last, *(self.path / f"last.{number}.pth" for number in numbers)]
        return [path for path in paths if path.exists()]

    def read_newest(self) -> tuple[Path | None, dict[str, Any], list[Path]]:
        """The newest of `states` that can be read.

        Returns:
            Its path, None where there is none; what is in it; and newer ones, which cannot be read.

        Raises:
            UserError: there are some, and none can be read.
        """
        states, problems = self.states(), []
        for path in states:
            try:
                content = checkpoint.read(path)
            except UserError as error:
                problems.append(str(error))
                continue
            if problems and is_primary():
                say("\n".join([*problems, f"going on from the one before, {path}"]))
            return path, content, states[: len(problems)]
        if problems:
            way = f"; to go on from the best: --resume {self.best} --overwrite" * self.best.is_file()
            raise UserError(problems[0] + way)
        return None, {}, []

    def check_free(self, resumed: Path | None, damaged: Sequence[Path] = ()) -> None:
        """Raises a UserError if it holds files of a run other than that which goes on from the checkpoint `resumed`, or
        newer ones that are not `damaged`."""
        files = [path.name for path in self._files() if os.path.lexists(path)]
        newest = next((path for path in self.states() if path not in damaged), self.best)
        if files and not (resumed and resumed.resolve() == newest.resolve()):
            resume = f"--resume {self.best}" if newest is self.best and self.best.exists() else "--resume"
            raise UserError(
                f"{self.path} holds an earlier run ({', '.join(files)}): add {resume} to go on with it, --overwrite to "
                "replace it, or set another output"
            )

    def prepare(self, epoch: int | None, damaged: Sequence[Path] = ()) -> None:
        """Makes room for a run.

        Args:
            epoch: The run goes on after this epoch: rows of the summary that are of later epochs, or torn, are dropped.
                None: it is new, and all files are.
            damaged: Checkpoints to put aside.

        Raises:
            UserError: the folder cannot be written to.
        """
        with self._writing():
            if epoch is None:
                for path in self._files():
                    path.unlink(missing_ok=True)
                return
            for path in damaged:
                os.replace(path, path.with_name(f"{path.name}.damaged"))
            if self.summary.exists():
                self._mend_summary(epoch)

    def write_config(self, config: Section) -> None:
        """Leaves all keys that the run has, also those that no file names, in config.yaml.

        Raises:
            UserError: the folder cannot be written to.
        """
        with self._writing():
            (self.path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))

    def _files(self) -> list[Path]:
        return [*self.states(), self.best, self.summary, self.curves]

    def _mend_summary(self, epoch: int) -> None:
        lines = self.summary.read_bytes().decode(errors="replace").splitlines(keepends=True)
        names = next(csv.reader(lines[:1]), [])
        whole = [line for line in lines[1:] if line.endswith("\n") and _is_row(line, len(names))]
        kept = [line for line in whole if float(line.partition(",")[0]) <= epoch]
        if len(whole) < len(lines) - 1:
            say(f"dropped {len(lines) - 1 - len(whole)} torn rows of {self.summary}")
        temporary = self.summary.with_name(f"{self.summary.name}.tmp")
        temporary.write_bytes("".join([*lines[:1], *kept] if names[:1] == ["epoch"] else []).encode())
        os.replace(temporary, self.summary)

    def log(
        self,
        epoch: int,
        trained: Mapping[str, float],
        evaluated: Mapping[str, float],
        lr: float,
        measures: Sequence[Measure],
    ) -> None:
        """Adds an epoch's row and draws the curves.

        Raises:
            UserError: the folder cannot be written to.
        """
        with self._writing():
            update_summary(epoch, trained, evaluated, self.summary, lr=lr)
            draw_curves(self.summary, self.curves, measures)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to output {self.path}: {error.strerror or first_line(error)}") from error


def _is_row(line: str, length: int) -> bool:
    values = line.split(",")
    with suppress(ValueError):
        return len(values) == length and all(float(value) is not None for value in values)
    return False


def _take(path: Path) -> int:
    """Locks a file for this process, and returns its descriptor. Forked processes do not hold it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                os.ftruncate(file, 0)
                since = datetime.now().isoformat(" ", "seconds")
                os.write(file, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
                return file
        except OSError as error:
            holder = os.pread(file, 200, 0).decode(errors="replace")
            os.close(file)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{path.parent} is in use by {holder or 'another process'}") from None
            raise
        os.close(file)  # its holder removed it between our opening and our locking it
