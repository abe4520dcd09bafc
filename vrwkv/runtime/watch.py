"""Scalars of a run for TensorBoard and wandb, where they are asked for."""

import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vrwkv.runtime.errors import MissingExtra
from vrwkv.runtime.recipe import RunConfig


class Scalars:
    """What `watch` asks for; of one process. After a resumption, what is repeated is shown once.

    Args:
        config: The run's.
        updates: Updates done before.

    Raises:
        MissingExtra: a package that is asked for is not installed.
    """

    def __init__(self, config: RunConfig, updates: int) -> None:
        self._writer: Any = None
        self._run: Any = None
        if config.watch.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(config.output, purge_step=updates + 1)
        if config.watch.wandb:
            import wandb

            self._run = wandb.init(
                project=config.watch.wandb,
                name=Path(config.output).name,
                id=self._name_at_wandb(Path(config.output, "wandb_id"), new=not updates),
                resume="allow",
                dir=config.output,
                config=config.model_dump(),
            )

    @staticmethod
    def _name_at_wandb(file: Path, new: bool) -> str:
        """What no other run of the project is called, kept in a file for resumptions."""
        if new or not (file.is_file() and file.read_text()):
            file.write_text(uuid.uuid4().hex)
        return file.read_text()

    def __bool__(self) -> bool:
        return bool(self._writer or self._run)

    @staticmethod
    def check(config: RunConfig) -> None:
        """Raises a MissingExtra if a package that is asked for is not installed."""
        for name in ("tensorboard", "wandb"):
            if getattr(config.watch, name) and find_spec(name) is None:
                raise MissingExtra(f"watch.{name} needs {name}: pip install {name}")

    def add(self, values: Mapping[str, float], updates: int) -> None:
        """Adds values by name, which are those after so many updates of the run."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, updates)
        if self._run:
            self._run.log(dict(values), step=updates)

    def close(self) -> None:
        """Writes what is not yet written."""
        if self._writer:
            self._writer.close()
        if self._run:
            self._run.finish()
