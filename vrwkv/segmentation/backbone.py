"""VRWKV as a backbone of mmsegmentation: any of our timm models with maps of several strides as its output."""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.models.necks import Feature2Pyramid
from mmseg.registry import MODELS
from timm.models import model_entrypoint
from torch import Tensor

from vrwkv.layers import compiled_layout
from vrwkv.models import VisionRWKVBase
from vrwkv.runtime.checkpoint import convert_on_load
from vrwkv.runtime.errors import nearest
from vrwkv.segmentation.checkpoint import checkpoint_filter_fn, load_pretrained

PATCH = 16


def create_vrwkv(name: str, args: Mapping[str, Any] | None) -> Any:
    """One of our timm models without its head.

    Raises:
        ValueError: the name is none of ours, or the patches are not 16 pixels wide and high.
    """
    families = {model_cls.__module__ for model_cls in VisionRWKVBase.__subclasses__()}
    ours = [model for model in timm.list_models() if model_entrypoint(model).__module__ in families]
    if name.partition(".")[0] not in ours:
        raise ValueError(f"model must be one of {', '.join(ours)}; got {name!r}{nearest(name, ours)}")
    model: Any = timm.create_model(name, num_classes=0, **(args or {}))
    if model.patch_embed.feat_ratio(as_scalar=False) != (16, 16):
        raise ValueError(f"patches must be 16 pixels wide and high, got {model.patch_embed.patch_size}")
    return model


class VRWKVBackbone(BaseModule):
    """What all backbones share: the timm model in `vrwkv`, any image size, and loading of the authors' files.

    Args:
        model: name of one of our timm models.
        model_args: keywords for it; ``pretrained=True`` takes its published weights.
        strides: of the maps that are returned.
        keep_norm: whether the model's final norm is used.
        with_cp: recompute the blocks in the backward pass instead of keeping their activations.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` for the authors' or our own classification weights.
    """

    def __init__(
        self,
        model: str,
        model_args: Mapping[str, Any] | None,
        strides: Sequence[int],
        keep_norm: bool,
        with_cp: bool,
        init_cfg: Mapping[str, Any] | None,
    ) -> None:
        super().__init__(init_cfg)
        if init_cfg and (set(init_cfg) != {"type", "checkpoint"} or init_cfg["type"] != "Pretrained"):
            raise ValueError(f"init_cfg must be dict(type='Pretrained', checkpoint=PATH), got {dict(init_cfg)}")
        self.strides = tuple(strides)
        self.vrwkv: Any = create_vrwkv(model, model_args)
        self.vrwkv.prune_intermediate_layers(1, prune_norm=not keep_norm)
        self.vrwkv.set_grad_checkpointing(with_cp)
        self.embed_dim: int = self.vrwkv.embed_dim
        convert_on_load(self, checkpoint_filter_fn)

    def init_weights(self) -> None:
        """Load the pretrained weights of `init_cfg`; everything else has its initial values from the constructor."""
        if self.init_cfg:
            load_pretrained(self, self.init_cfg["checkpoint"])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One map for each of `strides`.

        Args:
            x: images, ``(B, 3, H, W)`` of any size; they are padded with zeros at the right and bottom to multiples
                of a patch and of the largest stride.

        Returns:
            Maps ``(B, channels, ceil(H / s), ceil(W / s))``, s in `strides`.
        """
        height, width = x.shape[-2:]
        multiple = max(PATCH, *self.strides)
        right, below = _ceil_div(width, multiple) * multiple - width, _ceil_div(height, multiple) * multiple - height
        maps = self.forward_padded(compiled_layout(F.pad(x, (0, right, 0, below))))
        return tuple(
            _crop(y, _ceil_div(height, stride), _ceil_div(width, stride))
            for y, stride in zip(maps, self.strides, strict=True)
        )

    def forward_padded(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps of images ``(B, 3, H, W)``, H and W multiples of a patch and of the largest stride."""
        raise NotImplementedError


def _ceil_div(size: int, divisor: int) -> int:
    # Of all ways to write it the one that compilers can simplify where the size is a symbol.
    return (size + divisor - 1) // divisor


def _crop(maps: Tensor, height: int, width: int) -> Tensor:
    if torch.compiler.is_compiling():  # it would ask of a view whether it is the whole, and note the answer
        return F.pad(maps, (0, width - maps.shape[3], 0, height - maps.shape[2]))
    return maps[..., :height, :width]


_RESIZED_BY = {4: "upsample_4x", 8: "upsample_2x", 16: "identity", 32: "downsample_2x"}
"""The parts of mmseg's pyramid by the strides that they bring a map of stride 16 to."""


@MODELS.register_module()
class VRWKV(VRWKVBackbone):
    """A plain VRWKV; its last map is brought to other strides by transposed convolutions and pooling.

    Args:
        model: name of one of our timm models.
        model_args: keywords for it.
        strides: of the maps that are returned, some of 4, 8, 16 and 32; what the others need is not built.
        norm_cfg: mmcv's name of the pyramid's BatchNorm.
        with_cp: recompute the blocks in the backward pass instead of keeping their activations.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` for classification weights.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: str,
        model_args: Mapping[str, Any] | None = None,
        strides: Sequence[int] = tuple(_RESIZED_BY),
        norm_cfg: Mapping[str, Any] | None = None,
        with_cp: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        if not strides or list(strides) != [stride for stride in _RESIZED_BY if stride in strides]:
            raise ValueError(f"strides must be some of {', '.join(map(str, _RESIZED_BY))} in this order, got {strides}")
        super().__init__(model, model_args, strides, keep_norm=True, with_cp=with_cp, init_cfg=init_cfg)
        rescales = [PATCH / stride for stride in strides]
        self.pyramid = Feature2Pyramid(self.embed_dim, rescales, dict(norm_cfg or {"type": "BN"}))

    def forward_padded(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`VRWKVBackbone.forward_padded`."""
        tokens = self.vrwkv.forward_features(x)
        # A view, so channels lie last in memory: transposed convolutions are up to four times as fast that way on CPUs.
        last = tokens.transpose(1, 2).unflatten(2, (x.shape[2] // PATCH, x.shape[3] // PATCH))
        # The pyramid's own forward wants all four.
        return tuple(self.pyramid.get_submodule(_RESIZED_BY[stride])(last) for stride in self.strides)
