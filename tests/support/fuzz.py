"""Random values for the keys of a classification config, of right and wrong types, and which of them make sense."""

import math
import random
from collections.abc import Callable
from typing import Any

import yaml

Sense = Callable[[Any], bool]

ODD = [
    -1, 0, 1, 2, 3, 7, 0.5, 1.5, -0.5, 1e-3, 1e30, -1e300, 10**20, math.nan, math.inf, -math.inf, True, False, None, "",
    " ", "x", "1", "auto", "a/b", "\0", "é\n", "x" * 300, [], [1], [0, 0], [1, 0], [0.5, 0.6], [-1, 1], [1, 2, 3],
    [0.5, 0.5, 0.5], "none", ["a", "b"], [[1]], {}, {"a": 1}, {1: 2}, "{", "[", "&a", "*a",
    "!!python/object:os.system x",
]  # fmt: skip


def number(low: float, high: float, without: tuple[float, ...] = ()) -> Sense:
    return lambda value: type(value) in (int, float) and low <= value <= high and value not in without


def whole(low: int, high: float = math.inf) -> Sense:
    return lambda value: type(value) is int and low <= value <= high


def one_of(*options: str | bool) -> Sense:
    return lambda value: any(value is option or (type(value) is str and value == option) for option in options)


def optional(holds: Sense) -> Sense:
    return lambda value: value is None or holds(value)


def several(holds: Sense, *lengths: int) -> Sense:
    return lambda value: type(value) is list and len(value) in lengths and all(map(holds, value))


def rising(holds: Sense) -> Sense:
    return lambda value: several(holds, 2)(value) and value[0] <= value[1]


def text(value: Any) -> bool:
    return type(value) is str and value != "" and "\0" not in value


SHARE, NOT_NEGATIVE = number(0, 1), number(0, 1e308)
POSITIVE, POSITIVE_SHARE = number(0, 1e308, without=(0,)), number(0, 1, without=(0,))

KEYS: dict[str, tuple[Sense, list[Any]]] = {
    "output": (text, []),
    "epochs": (whole(1), [1]),
    "seed": (whole(0, 2**31), [5]),
    "device": (lambda value: type(value) is str, ["cpu", "meta"]),
    "amp": (one_of("none", "bfloat16", "float16"), ["bfloat16", "float16", "float8"]),
    "fsdp": (one_of(True, False), [True]),
    "optim.lr": (NOT_NEGATIVE, [1e-3]),
    "optim.lr_batch_size": (optional(whole(1)), [16]),
    "optim.name": (one_of("sgd", "lion"), ["sgd", "lion", "adamv"]),
    "optim.weight_decay": (NOT_NEGATIVE, [0.1]),
    "optim.betas": (optional(several(number(0, 1, without=(1,)), 2)), [[0.9, 0.95], [0.9], [0.9, 1]]),
    "optim.layer_decay": (optional(POSITIVE_SHARE), [0.7]),
    "optim.clip_grad": (optional(POSITIVE), [1]),
    "optim.accumulate": (whole(1), [2]),
    "optim.ema_decay": (optional(number(0, 1, without=(0, 1))), [0.9]),
    "optim.ema_warmup": (one_of(True, False), [True]),
    "schedule.name": (
        one_of("cosine", "step", "poly", "wsd", "constant"),
        ["step", "poly", "wsd", "plateau"],
    ),
    "schedule.warmup_epochs": (whole(0), [1]),
    "schedule.warmup_lr": (NOT_NEGATIVE, [1e-5]),
    "schedule.min_lr": (NOT_NEGATIVE, [1e-5]),
    "save.minutes": (optional(POSITIVE), [0.5]),
    "save.keep": (whole(0, 1000), [2]),
    "watch.tensorboard": (one_of(True, False), [False]),
    "watch.wandb": (optional(text), []),
    "model.name": (text, ["test_vit", "test_resnet", "vrwkv_tny"]),
    "model.args": (
        lambda value: type(value) is dict and all(type(key) is str for key in value) and value != {"drop_path_rate": 2},
        [{"drop_path_rate": 2}, {"depth": 2}, {"img_size": 0}, {"in_chans": 5}, {"num_classes": 2}, {"img_size": "a"}],
    ),
    "model.pretrained": (one_of(True, False), [False]),
    "model.checkpoint": (optional(text), ["absent.pth"]),
    "model.head_only": (one_of(True, False), [True]),
    "model.grad_checkpointing": (lambda value: type(value) is bool or whole(0)(value), [True, 2]),
    "model.channels_last": (one_of(True, False), [True]),
    "model.compile": (one_of(True, False), [False]),
    "data.root": (text, ["absent"]),
    "data.batch_size": (whole(1), [6, 12, 13]),
    "data.train_split": (text, ["val", "absent"]),
    "data.val_split": (text, ["train", "absent"]),
    "data.workers": (whole(0, 256), [0]),
    "data.max_corrupt": (whole(0), [3]),
    "data.img_size": (optional(whole(1, 16384)), [16, 24]),
    "data.interpolation": (optional(one_of("nearest", "bicubic")), ["nearest", "bicubic", "foo"]),
    "data.crop_pct": (optional(POSITIVE_SHARE), [0.8]),
    "data.mean": (optional(several(SHARE, 1, 2, 3)), [[0.5], [0.5, 0.5, 2], [0.5, 0.5]]),
    "data.std": (optional(several(POSITIVE, 1, 2, 3)), [[0.5], [0.5, 0, 0.5], [1, 1]]),
    "augment.scale": (rising(POSITIVE_SHARE), [[0.5, 1], [0.2, 1.2]]),
    "augment.ratio": (rising(POSITIVE), [[0.5, 2], [1, 1]]),
    "augment.hflip": (SHARE, [0.1]),
    "augment.color_jitter": (SHARE, [0.1]),
    "augment.auto_augment": (
        optional(one_of("rand-m5", "3a")),
        ["rand-m5", "3a", "rand-foo"],
    ),
    "augment.erase_prob": (SHARE, [0.3]),
    "augment.mixup": (number(0, 100), [0.2]),
    "augment.cutmix": (number(0, 100), [0.2]),
    "augment.label_smoothing": (number(0, 1, without=(1,)), [0.1]),
}
"""For each key of the schema what makes sense by itself, and values of the right type, of which some do not."""

TOO_MUCH = {
    "epochs": whole(2),
    "data.workers": whole(1),
    "data.img_size": whole(100),
    "model.pretrained": one_of(True),
    "model.compile": one_of(True),
}
"""What makes sense and takes long, or looks for a network."""


def random_settings(generator: random.Random) -> dict[str, Any]:
    """One to three keys, half of their values of the right type."""
    chosen = {}
    for key in generator.sample(sorted(KEYS), generator.randint(1, 3)):
        own = KEYS[key][1]
        chosen[key] = generator.choice(own if own and generator.random() < 0.5 else ODD)
    return chosen


def random_options(generator: random.Random, names: list[str]) -> list[str]:
    """One or two options of a tool with odd values."""
    return [f"{name}={generator.choice(ODD)}" for name in generator.sample(names, generator.randint(1, 2))]


def takes_long(chosen: dict[str, Any]) -> bool:
    return any(key in TOO_MUCH and TOO_MUCH[key](value) for key, value in chosen.items())


def as_arguments(chosen: dict[str, Any]) -> list[str]:
    """`key=value` strings with the values in YAML."""
    return [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=9999)}" for key, value in chosen.items()]
