"""Learning rates that fall with the distance of a layer from the output."""

import re
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


def layer_of(name: str, depth: int) -> int:
    """The layer of a segmentor's parameter: 0 the patch and position embedding, i + 1 block i, depth + 1 all else.

    The norm `ln0` counts with block 0, as in the authors' models.
    """
    if re.match(r"backbone\.vrwkv\.(patch_embed|pos_embed)", name):
        return 0
    if name.startswith("backbone.vrwkv.ln0."):
        return 1
    block = re.match(r"backbone\.vrwkv\.blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VRWKVLayerDecay(DefaultOptimWrapperConstructor):
    """Parameter groups by layer, for segmentors with one of our backbones: `paramwise_cfg=dict(decay_rate=0.9)`.

    The learning rate of a group is the base rate times ``decay_rate ** (depth + 1 - layer)``. Vectors, biases, the
    position embedding and what the model's `no_weight_decay` names have no weight decay.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Append the groups of all parameters of `module` that are trained to `params`."""
        if set(self.paramwise_cfg) != {"decay_rate"}:
            raise ValueError(f"paramwise_cfg must be dict(decay_rate=...), got {dict(self.paramwise_cfg)}")
        model = getattr(getattr(module, "backbone", None), "vrwkv", None)
        if model is None:
            raise ValueError("VRWKVLayerDecay needs a segmentor with backbone VRWKV or VRWKVAdapter")
        depth = len(model.blocks)
        exempt = {f"backbone.vrwkv.{name}" for name in model.no_weight_decay()}
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = layer_of(name, depth)
            decays = parameter.ndim > 1 and name not in exempt
            group = groups.setdefault(
                (layer, decays),
                {
                    "params": [],
                    "lr": self.base_lr * self.paramwise_cfg["decay_rate"] ** (depth + 1 - layer),
                    "weight_decay": self.base_wd if decays else 0.0,
                },
            )
            group["params"].append(parameter)
        params.extend(groups.values())
