"""VRWKV as a backbone of mmsegmentation: any of our timm models with four maps as its output."""

from collections.abc import Mapping
from typing import Any

import timm
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.models.necks import Feature2Pyramid
from mmseg.registry import MODELS
from timm.models import model_entrypoint
from torch import Tensor

from vrwkv.models import VisionRWKVBase
from vrwkv.runtime.checkpoint import convert_on_load
from vrwkv.runtime.errors import nearest
from vrwkv.segmentation.checkpoint import checkpoint_filter_fn, load_pretrained

STRIDES = (4, 8, 16, 32)


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
    """What both backbones share: the timm model in `vrwkv`, any image size, and loading of the authors' files.

    Args:
        model: name of one of our timm models.
        model_args: keywords for it; ``pretrained=True`` takes its published weights.
        keep_norm: whether the model's final norm is used.
        with_cp: recompute the blocks in the backward pass instead of keeping their activations.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` for the authors' or our own classification weights.
    """

    def __init__(
        self,
        model: str,
        model_args: Mapping[str, Any] | None,
        keep_norm: bool,
        with_cp: bool,
        init_cfg: Mapping[str, Any] | None,
    ) -> None:
        super().__init__(init_cfg)
        if init_cfg and (set(init_cfg) != {"type", "checkpoint"} or init_cfg["type"] != "Pretrained"):
            raise ValueError(f"init_cfg must be dict(type='Pretrained', checkpoint=PATH), got {dict(init_cfg)}")
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
        """Maps of stride 4, 8, 16, 32.

        Args:
            x: images, ``(B, 3, H, W)`` of any size; they are padded with zeros at the right and bottom to multiples
                of 32 pixels.

        Returns:
            Four maps, ``(B, C, ceil(H / s), ceil(W / s))``.
        """
        height, width = x.shape[-2:]
        maps = self.forward_padded(F.pad(x, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1])))
        return tuple(
            y[..., : -(-height // stride), : -(-width // stride)] for y, stride in zip(maps, STRIDES, strict=True)
        )

    def forward_padded(self, x: Tensor) -> tuple[Tensor, ...]:
        """The four maps of images ``(B, 3, H, W)``, H and W multiples of 32."""
        raise NotImplementedError


@MODELS.register_module()
class VRWKV(VRWKVBackbone):
    """A plain VRWKV; its last map is brought to the four strides by transposed convolutions and pooling.

    Args:
        model: name of one of our timm models.
        model_args: keywords for it.
        norm_cfg: mmcv's name of the pyramid's BatchNorm.
        with_cp: recompute the blocks in the backward pass instead of keeping their activations.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` for classification weights.
    """

    def __init__(
        self,
        model: str,
        model_args: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = None,
        with_cp: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, model_args, keep_norm=True, with_cp=with_cp, init_cfg=init_cfg)
        self.pyramid = Feature2Pyramid(self.embed_dim, norm_cfg=dict(norm_cfg or {"type": "BN"}))

    def forward_padded(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`VRWKVBackbone.forward_padded`."""
        tokens = self.vrwkv.forward_features(x)
        # A view, so channels lie last in memory: transposed convolutions are up to four times as fast that way on CPUs.
        last = tokens.transpose(1, 2).unflatten(2, (x.shape[2] // 16, x.shape[3] // 16))
        return self.pyramid([last] * len(STRIDES))
