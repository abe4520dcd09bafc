"""The configuration of a training run: a typed schema, read from YAML and from `key=value` settings."""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vrwkv.runtime.errors import UserError, first_line, nearest

Amp = Literal["none", "bfloat16", "float16"]


@dataclass
class ModelConfig:
    name: str  # any timm model
    args: dict[str, Any] = field(default_factory=dict)  # its constructor's keywords
    pretrained: bool = False  # start from the published weights
    checkpoint: str | None = None  # start from this file's weights; a head of another size is left out
    grad_checkpointing: bool = False
    compile: bool = False


@dataclass
class DataConfig:
    root: str  # holds train_split/class/picture and val_split/class/picture
    batch_size: int  # per process and step
    train_split: str = "train"
    val_split: str = "val"
    workers: int = 4  # per process
    img_size: int | None = None  # None here and below: as the model has it
    interpolation: str | None = None
    crop_pct: float | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass
class AugmentConfig:
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # of the random crop's area
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])  # of its width to its height
    hflip: float = 0.5
    color_jitter: float = 0.4  # not used together with auto_augment
    auto_augment: str | None = None  # timm's notation, such as rand-m9-mstd0.5-inc1
    erase_prob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0


@dataclass
class OptimConfig:
    lr: float
    lr_batch_size: int | None = None  # lr is meant for this many pictures per update and scaled to the real number
    name: str = "adamw"
    weight_decay: float = 0.05
    clip_grad: float | None = None  # largest norm of all gradients
    accumulate: int = 1  # steps per update
    ema_decay: float | None = None  # of averaged weights, which are then the ones validated and used


@dataclass
class ScheduleConfig:
    name: str = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0


@dataclass
class Config:
    output: str  # folder for checkpoints, summary.csv and curves.png
    epochs: int
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    seed: int = 0
    device: str = "auto"  # cuda where there is one, else cpu
    amp: Amp = "none"

    def __post_init__(self) -> None:
        counts = {
            "epochs": self.epochs,
            "data.batch_size": self.data.batch_size,
            "optim.accumulate": self.optim.accumulate,
        }
        for key, value in counts.items():
            if value < 1:
                raise UserError(f"config key {key} must be at least 1, not {value}")
        if (self.augment.mixup or self.augment.cutmix) and self.data.batch_size % 2:
            raise UserError(f"mixup and cutmix need an even data.batch_size, not {self.data.batch_size}")


def load_config(path: str | Path, settings: Sequence[str] = ()) -> Config:
    """Reads a YAML file and overrides it.

    Args:
        path: YAML file.
        settings: `dotted.key=value` strings; the value is parsed as YAML.

    Raises:
        UserError: no such file, no YAML, an unknown or missing key, a value of the wrong type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path} must be a mapping of keys to values")
    for setting in settings:
        _override(content, setting)
    return _build(Config, content)


def _override(content: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals:
        raise UserError(f"--set takes key=value, not {setting!r}")
    *parents, last = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise UserError(f"unknown config key {key!r}{nearest(key, _keys(Config))}")
    try:
        content[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {setting}: the value is not YAML ({first_line(error)})") from error


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    for name, kind in typing.get_type_hints(schema).items():
        yield prefix + name
        if dataclasses.is_dataclass(kind):
            yield from _keys(typing.cast(type, kind), f"{prefix}{name}.")


def _build(schema: type, content: Any, prefix: str = "") -> Any:
    if not isinstance(content, dict):
        raise UserError(f"config key {prefix.rstrip('.')} must be a mapping, not {content!r}")
    kinds = typing.get_type_hints(schema)
    for key in content:
        if key not in kinds:
            every = list(_keys(Config))
            same_leaf = [other for other in every if other.rpartition(".")[2] == key]
            hint = f"; nearest: {', '.join(same_leaf)}" if same_leaf else nearest(f"{prefix}{key}", every)
            raise UserError(f"unknown config key {prefix + str(key)!r}{hint}")
    for item in dataclasses.fields(schema):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in content:
            raise UserError(f"config key {prefix + item.name!r} is missing")
    return schema(**{key: _convert(value, kinds[key], prefix + key) for key, value in content.items()})


def _convert(value: Any, kind: Any, key: str) -> Any:
    """`value` as `kind`, one of: a dataclass, Literal, list[float], dict, an optional or plain scalar type."""
    arguments = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, f"{key}.")
    if type(None) in arguments:
        return None if value is None else _convert(value, arguments[0], key)
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [_convert(each, arguments[0], f"{key}[{i}]") for i, each in enumerate(value)]
    if typing.get_origin(kind) is Literal:
        if value in arguments:
            return value
        raise UserError(f"config key {key} must be one of {', '.join(arguments)}, not {value!r}")
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3, which has no dot, as a string
        except ValueError:
            pass
    plain = typing.get_origin(kind) or kind
    if isinstance(value, plain) and (plain is bool or not isinstance(value, bool)):
        return value
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    raise UserError(f"config key {key} must be {name}, not {value!r} ({type(value).__name__})")
