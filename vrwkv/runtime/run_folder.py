"""The output folder of a training run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.utils import trim_summary, update_summary

from vrwkv.runtime.errors import UserError
from vrwkv.runtime.progress import Measure, draw_curves


@dataclass(frozen=True)
class RunFolder:
    """last.pth, best.pth, summary.csv with a row for each epoch, curves.png."""

    path: Path

    @property
    def last(self) -> Path:
        return self.path / "last.pth"

    @property
    def best(self) -> Path:
        return self.path / "best.pth"

    @property
    def summary(self) -> Path:
        return self.path / "summary.csv"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    def prepare(self, epoch: int) -> None:
        """Makes the folder and drops the rows of epochs after `epoch`, which are yet to come.

        Raises:
            UserError: the folder cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            trim_summary(self.summary, epoch + 1)
        except OSError as error:
            raise UserError(f"cannot write to output {self.path}: {error.strerror}") from error

    def log(
        self,
        epoch: int,
        trained: dict[str, float],
        evaluated: dict[str, float],
        lr: float,
        measures: Sequence[Measure],
    ) -> None:
        """Adds an epoch's row and draws the curves.

        Raises:
            UserError: the folder cannot be written to.
        """
        try:
            update_summary(epoch, trained, evaluated, self.summary, lr=lr)
            draw_curves(self.summary, self.curves, measures)
        except OSError as error:
            raise UserError(f"cannot write to output {self.path}: {error.strerror}") from error
