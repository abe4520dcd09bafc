"""The configuration of masked pre-training."""

from typing import Annotated

from pydantic import Field

from vrwkv.classification.config import DataConfig, NetworkConfig
from vrwkv.runtime.config import Positive, PositiveShare, Range, Section, Share
from vrwkv.runtime.recipe import RunConfig


class CropConfig(Section):
    """The only augmentation."""

    scale: Range[PositiveShare] = Field(default_factory=lambda: [0.2, 1.0])  # of the random crop's area
    ratio: Range[Positive] = Field(default_factory=lambda: [3 / 4, 4 / 3])  # of its width to its height
    hflip: Share = 0.5


class DecoderConfig(Section):
    dim: Annotated[int, Field(ge=4, multiple_of=4)] = 512
    depth: Annotated[int, Field(ge=1)] = 8


class PretrainingConfig(RunConfig):
    model: NetworkConfig  # of vrwkv
    data: DataConfig  # classes do not matter, but for the folders
    augment: CropConfig = CropConfig()
    decoder: DecoderConfig = DecoderConfig()
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
