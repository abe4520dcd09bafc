"""Learning rates that fall with the distance of a layer from the output."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models import group_parameters
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VRWKVLayerDecay(DefaultOptimWrapperConstructor):
    """Parameter groups by layer, for segmentors with one of our backbones: `paramwise_cfg=dict(decay_rate=0.9)`.

    The learning rate of a group is the base rate times ``decay_rate ** (depth + 1 - layer)``, with the layers of the
    timm model's `group_matcher` and depth + 1 for all that is outside it. Vectors, biases and what the model's
    `no_weight_decay` names have no weight decay.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Append the groups of all parameters of `module` that are trained to `params`."""
        if set(self.paramwise_cfg) != {"decay_rate"}:
            raise ValueError(f"paramwise_cfg must be dict(decay_rate=...), got {dict(self.paramwise_cfg)}")
        model = getattr(getattr(module, "backbone", None), "vrwkv", None)
        if model is None:
            raise ValueError("VRWKVLayerDecay needs a segmentor with one of our backbones")
        outside = len(model.blocks) + 1
        layers = {f"backbone.vrwkv.{name}": layer for name, layer
                  in group_parameters(model, model.group_matcher(), reverse=True).items()}  # fmt: skip
        exempt = {f"backbone.vrwkv.{name}" for name in model.no_weight_decay()}
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = layers.get(name, outside)
            decays = parameter.ndim > 1 and name not in exempt
            group = groups.setdefault(
                (layer, decays),
                {
                    "params": [],
                    "lr": self.base_lr * self.paramwise_cfg["decay_rate"] ** (outside - layer),
                    "weight_decay": self.base_wd if decays else 0.0,
                },
            )
            group["params"].append(parameter)
        params.extend(groups.values())
