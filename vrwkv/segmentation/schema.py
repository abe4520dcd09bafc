"""Types and ranges of what mmengine's configs are made of; mmengine itself looks at few of them.

Only what is named here is checked: a config may hold anything else. Nothing is converted.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from vrwkv.runtime.config import NotNegative, Positive, Section, Share, check

MAX_CLASSES = 256  # of an 8-bit mask

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0, lt=2**32)]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_name(value: Any) -> Any:
    if not (isinstance(value, str) or callable(value)):
        raise ValueError(f"must be a name or a class, not {value!r}")
    return value


class _Settings(Section):
    model_config = ConfigDict(extra="allow")


class _Part(_Settings):
    """What a registry builds."""

    type: Annotated[Any, AfterValidator(_is_name)]


class _Step(_Part):
    """A transform of pictures, or several."""

    transforms: list["_Step | list[_Step]"] = Field([])


class _Inference(_Settings):
    mode: Literal["whole", "slide"] = "whole"
    crop_size: Pair | None = None
    stride: Pair | None = None

    @model_validator(mode="after")
    def _windows(self) -> "_Inference":
        if self.mode == "slide":
            if self.crop_size is None or self.stride is None:
                raise ValueError("needs crop_size and stride in mode slide")
            if any(step > side for step, side in zip(self.stride, self.crop_size, strict=True)):
                raise ValueError(f"needs a stride of at most the crop_size {self.crop_size}, not {self.stride}")
        return self


class _ModelArgs(_Settings):
    drop_path_rate: Share = 0.0

    @model_validator(mode="after")
    def _no_files(self) -> "_ModelArgs":
        for name in ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"):
            if name in (self.model_extra or {}):
                raise ValueError(f"takes no {name}; weights come from init_cfg")
        return self


class _Backbone(_Part):
    model_args: _ModelArgs | None = None


class _Loss(_Part):
    loss_weight: NotNegative = 1.0


class _Head(_Part):
    loss_decode: Annotated[list[_Loss], BeforeValidator(_listed)] = Field([])
    num_classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    channels: Count | None = None
    dropout_ratio: Share = 0.0


class _Preprocessor(_Part):
    mean: list[float] | None = None
    std: list[Positive] | None = None
    size: Pair | None = None


class _Model(_Part):
    backbone: _Backbone
    decode_head: _Head
    auxiliary_head: Annotated[list[_Head], BeforeValidator(_listed)] = Field([])
    data_preprocessor: _Preprocessor | None = None
    test_cfg: _Inference | None = None


class _MetaInfo(_Settings):
    classes: list[Any] | None = None
    palette: list[list[int]] | None = None


class _Dataset(_Part):
    metainfo: _MetaInfo | None = None
    data_root: str | None = None
    data_prefix: dict[str, str] | None = None
    pipeline: list[_Step] = Field([])
    dataset: "_Dataset | None" = None  # what it wraps
    datasets: list["_Dataset"] = Field([])


class _Sampler(_Part):
    shuffle: bool = True


class _Loader(_Settings):
    batch_size: Count = 1
    num_workers: Index = 0
    persistent_workers: bool = False
    sampler: _Sampler | None = None
    dataset: _Dataset


class _Optimizer(_Part):
    lr: Positive | None = None
    weight_decay: NotNegative = 0.0


class _Clip(_Settings):
    max_norm: Positive | None = None


class _OptimWrapper(_Settings):
    optimizer: _Optimizer
    clip_grad: _Clip | None = None
    accumulative_counts: Count = 1


class _Scheduler(_Part):
    by_epoch: bool = True
    power: NotNegative = 1.0


class _TrainLoop(_Settings):
    max_iters: Count | None = None
    max_epochs: Count | None = None
    val_interval: Count = 1


class _Evaluator(_Part):
    iou_metrics: list[Literal["mIoU", "mDice", "mFscore"]] = Field([])


class _Hook(_Settings):
    interval: int = -1


class _Randomness(_Settings):
    seed: Index | None = None


class _Config(_Settings):
    default_scope: str | None = None
    model: _Model
    train_dataloader: _Loader | None = None
    val_dataloader: _Loader | None = None
    test_dataloader: _Loader | None = None
    test_pipeline: list[_Step] = Field([])
    tta_pipeline: list[_Step] = Field([])
    val_evaluator: Annotated[list[_Evaluator], BeforeValidator(_listed)] = Field([])
    test_evaluator: Annotated[list[_Evaluator], BeforeValidator(_listed)] = Field([])
    optim_wrapper: _OptimWrapper | None = None
    param_scheduler: Annotated[list[_Scheduler], BeforeValidator(_listed)] = Field([])
    train_cfg: _TrainLoop | None = None
    default_hooks: dict[str, _Hook | None] = Field({})
    randomness: _Randomness | None = None
    load_from: str | None = None
    work_dir: str | None = None


def check_settings(cfg: Mapping[str, Any]) -> None:
    """Make sure that a config's settings have the types and ranges that they must have.

    Raises:
        UserError: a line for each that does not.
    """
    check(_Config, _plain(cfg))


def _plain(settings: Any) -> Any:
    """The same with lists in place of tuples, which mmengine takes alike."""
    if isinstance(settings, Mapping):
        return {key: _plain(value) for key, value in settings.items()}
    return [_plain(value) for value in settings] if isinstance(settings, list | tuple) else settings
