"""The configuration of a classifier's training."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from timm.data import create_transform

from vrwkv.runtime.config import MAY_CHANGE, NotNegative, Positive, PositiveShare, Range, Section, Share, Text
from vrwkv.runtime.errors import first_line
from vrwkv.runtime.recipe import RunConfig


def _rates_in_range(args: dict[str, Any]) -> dict[str, Any]:
    for key, value in args.items():
        if re.search(r"(^|_)drop(_path)?(_rate)?$", key) and not (type(value) in (int, float) and 0 <= value < 1):
            raise ValueError(f"must have a {key} of at least 0 and less than 1, not {value!r}")
    return args


ModelArgs = Annotated[dict[str, Any], AfterValidator(_rates_in_range)]


def _interval(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


class NetworkConfig(Section):
    name: Text  # any timm model
    args: ModelArgs = Field(default_factory=dict)
    """Keywords of its constructor."""
    grad_checkpointing: Annotated[int, BeforeValidator(_interval), Field(ge=0), MAY_CHANGE] = 0
    """Recompute every so-manieth block in the backward pass: 1 or true all, 0 or false none."""
    channels_last: Annotated[bool, MAY_CHANGE] = False  # memory layout of pictures and of the kernels of convolutions
    compile: Annotated[bool, MAY_CHANGE] = False


class ModelConfig(NetworkConfig):
    pretrained: Annotated[bool, MAY_CHANGE] = False  # start from the published weights
    checkpoint: Annotated[Text | None, MAY_CHANGE] = None
    """Start from this file's weights; a head of another size is left out."""
    head_only: bool = False  # a linear probe: train the classifier, with the rest as it is and in evaluation mode


Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos", "hamming", "box"]


class PictureConfig(Section):
    """How a picture becomes a tensor; None: as the model has it."""

    img_size: Annotated[int, Field(ge=1, le=16384)] | None = None  # height and width in pixels
    interpolation: Interpolation | None = None
    crop_pct: PositiveShare | None = None  # part of the resized picture that the centre crop of validation keeps
    mean: Annotated[list[Share], Field(min_length=1)] | None = None
    std: Annotated[list[Positive], Field(min_length=1)] | None = None


class DataSettings(Section, extra="ignore"):
    """timm's data configuration, as files of models hold it."""

    input_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    crop_pct: PositiveShare
    crop_mode: Literal["center", "squash", "border"]


class DataConfig(PictureConfig):
    root: Annotated[Text, MAY_CHANGE]  # holds train_split/class/picture and val_split/class/picture
    batch_size: Annotated[int, Field(ge=1)]  # per process and step
    train_split: Text = "train"
    val_split: Text = "val"
    workers: Annotated[int, Field(ge=0, le=256), MAY_CHANGE] = 4  # per process
    max_corrupt: Annotated[int, Field(ge=0), MAY_CHANGE] = 0
    """Pictures that cannot be read and are replaced by others, of an epoch and process; one more ends the run."""


def _known_to_timm(auto_augment: str) -> str:
    if not re.fullmatch(r"(rand|augmix|original|originalr|v0|v0r|3a)(-[a-z]+[0-9.]+|-t[a-z]+)*", auto_augment):
        raise ValueError(f"must be in timm's notation, such as rand-m9-mstd0.5-inc1, not {auto_augment!r}")
    try:
        create_transform(8, is_training=True, auto_augment=auto_augment)
    except Exception as error:  # asserts, lookups and conversions
        raise ValueError(f"must be in timm's notation, not {auto_augment!r} ({first_line(error)})") from error
    return auto_augment


class AugmentConfig(Section):
    scale: Range[PositiveShare] = Field(default_factory=lambda: [0.08, 1.0])  # of the random crop's area
    ratio: Range[Positive] = Field(default_factory=lambda: [3 / 4, 4 / 3])  # of its width to its height
    hflip: Share = 0.5
    color_jitter: Share = 0.4  # not used together with auto_augment
    auto_augment: Annotated[Text, AfterValidator(_known_to_timm)] | None = None
    """timm's notation, such as rand-m9-mstd0.5-inc1."""
    erase_prob: Share = 0.0
    mixup: Annotated[NotNegative, Field(le=100)] = 0.0
    cutmix: Annotated[NotNegative, Field(le=100)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Config(RunConfig):
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _even_batches(self) -> "Config":
        if (self.augment.mixup or self.augment.cutmix) and self.data.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even data.batch_size, not {self.data.batch_size}")
        return self
