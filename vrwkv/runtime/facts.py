"""What a file of an exported model says beside the weights: how pictures are given to it and what its outputs mean."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from vrwkv.runtime.errors import UserError

TaskName = Literal["classification", "segmentation"]
DATA_CONFIG = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""The fields that timm's data configuration consists of."""


@dataclass(frozen=True)
class Facts:
    """Kept in a file as its metadata: a key for each field, its value as JSON."""

    task: TaskName
    input_size: tuple[int, ...]  # (C, H, W) of training; pictures may have other sizes
    mean: tuple[float, ...]  # of pixels from 0 to 1, by channel, RGB
    std: tuple[float, ...]
    class_names: list[str] | None = None  # by output index; None where unknown
    interpolation: str | None = None  # how a classifier's pictures are resized and cropped, in timm's words
    crop_pct: float | None = None
    crop_mode: str | None = None
    palette: list[list[int]] | None = None  # a segmentor's RGB colour of each class
    arch: str | None = None  # timm's name of the model, and keywords of its constructor
    model_args: dict[str, Any] = field(default_factory=dict)

    def data_config(self) -> dict[str, Any]:
        """timm's data configuration."""
        return {name: getattr(self, name) for name in DATA_CONFIG}

    def to_metadata(self) -> dict[str, str]:
        """The fields that are known, as texts."""
        return {name: json.dumps(value) for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: str | Path) -> "Facts":
        """The facts in the metadata of the file `path`.

        Raises:
            UserError: there are none, or they are not as written here.
        """
        found = {each.name: metadata[each.name] for each in fields(cls) if each.name in metadata}
        try:
            values = {name: json.loads(text) for name, text in found.items()}
            facts = cls(**values | {name: tuple(values[name]) for name in ("input_size", "mean", "std")})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path} does not say how to use it: it was not written by tools/export.py") from error
        facts._check(path)
        return facts

    def _check(self, path: str | Path) -> None:
        channels = self.input_size[0] if _is_list(self.input_size, int) and len(self.input_size) == 3 else 0
        colours = self.palette is None or all(_is_list(each, int) and len(each) == 3 for each in self.palette)
        names = self.class_names is None or _is_list(self.class_names, str)
        norms = all(_is_list(each, float, int) and len(each) == channels for each in (self.mean, self.std))
        keywords = isinstance(self.model_args, dict) and isinstance(self.arch, str | None)
        if not (self.task in get_args(TaskName) and channels in (1, 3) and norms and names and colours and keywords):
            raise UserError(f"{path} is damaged: its metadata are not as tools/export.py writes them")


def _is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, kinds) for each in value)
