"""Building a model, and how pictures are given to it."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vrwkv.runtime.errors import UserError, first_line, nearest


def create_model(name: str, args: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """A timm model.

    Raises:
        UserError: unknown name, keywords that the model does not take, weights that cannot be had.
    """
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"unknown model {name!r}{_nearest_models(name)}")
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except Exception as error:  # the constructor, the network, the hub: each has its own types
        weights = " and its published weights" if pretrained else ""
        raise UserError(f"model {name} cannot be built with {dict(args)}{weights}: {first_line(error)}") from error


def _nearest_models(name: str) -> str:
    """A hint that does not mind missing endings such as _patch16_224, and prefers our own models."""
    names = [*timm.list_models(), *timm.list_models("*vrwkv*")]
    return nearest(name, {each[: len(name) + 1]: each for each in names})


def recompute_blocks(model: nn.Module, every: int) -> None:
    """Lets the backward pass compute every so-manieth block of a timm model again; 0: none.

    Raises:
        UserError: the model cannot do that.
    """
    if not every:
        return
    name, set_grad_checkpointing = type(model).__name__, model.set_grad_checkpointing
    try:
        set_grad_checkpointing(True, **({"every": every} if every > 1 else {}))  # type: ignore[operator]
    except TypeError as error:  # timm's own models take no more than enable
        wanted = f"0 or 1 for {name}, which recomputes no block or all"
        raise UserError(f"model.grad_checkpointing must be {wanted}, not {every}") from error
    except (AssertionError, ValueError) as error:
        raise UserError(f"model.grad_checkpointing cannot be {every} for {name}: {first_line(error)}") from error


def memory_format(channels_last: bool) -> torch.memory_format:
    """What `to` of a model and of pictures is given."""
    return torch.channels_last if channels_last else torch.preserve_format


def data_config_of(model: nn.Module, args: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """timm's data configuration of a model, changed by those `overrides` that are not None.

    Args:
        model: A timm model.
        args: Its constructor's keywords: img_size and in_chans count.
        overrides: timm's keys (input_size is (C, H, W)), and img_size, which goes before all others.

    Returns:
        input_size (C, H, W), interpolation, mean, std, crop_pct, crop_mode.

    Raises:
        UserError: pictures do not have the model's number of channels, or mean or std another one.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    size = given.pop("img_size", None)
    config = resolve_model_data_config(model, args={k: v for k, v in given.items() if k not in ("mean", "std")})
    channels, *default = config["input_size"]
    if "input_size" not in given:
        channels, default = args.get("in_chans", channels), args.get("img_size", default)
    if channels not in (1, 3):
        raise UserError(f"pictures have 1 or 3 channels, the model takes {channels}")
    size = default if size is None else size
    config["input_size"] = (channels, *((size, size) if isinstance(size, int) else size))
    for key in ("mean", "std"):
        values = tuple(given.get(key, config[key]))
        if len(values) not in (1, channels) and key in given:
            raise UserError(f"data.{key} must have 1 or {channels} values, not {list(values)}")
        config[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return config


def try_model(model: nn.Module, input_size: tuple[int, int, int], problem: str) -> Any:
    """What a model in evaluation mode makes of one black picture (C, H, W).

    Raises:
        UserError: it cannot take it; `problem` begins the message.
    """
    device, training = next(model.parameters()).device, model.training
    try:
        with torch.no_grad():  # in inference mode, what the model caches could not be trained with
            return model.eval()(torch.zeros(1, *input_size, device=device))
    except Exception as error:  # whatever its layers raise
        size = " x ".join(map(str, input_size))
        raise UserError(f"{problem} pictures of {size}: {first_line(error)}") from error
    finally:
        model.train(training)


def check_model(model: nn.Module, input_size: tuple[int, int, int], num_classes: int) -> float:
    """Tries a model on one picture, before much else is done.

    Args:
        model: On its device.
        input_size: (C, H, W) of the picture.
        num_classes: How many logits it is to give.

    Returns:
        Multiply-adds of matrix products and convolutions, in 1e9.

    Raises:
        UserError: it cannot take the picture, or gives something else.
    """
    with FlopCounterMode(display=False) as counter:
        result = try_model(model, input_size, f"{type(model).__name__} cannot take")
    shape = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
    if shape != (1, num_classes):
        raise UserError(f"{type(model).__name__} gives {shape} for a picture, required are (1, {num_classes}) logits")
    return counter.get_total_flops() / 2e9
