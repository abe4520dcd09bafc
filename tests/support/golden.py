"""Golden files: the authors' weights and constructor arguments, and what the models and backbones must return.

A file may name another one, `shared`, that holds tensors of several files.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "golden"


@dataclass
class Case:
    """One input of a golden file."""

    image: Tensor  # (B, 3, H, W)
    features: list[Tensor]  # (B, C, H', W') after each block, the last one normalised; or that last one alone
    logits: Tensor  # (B, num_classes)


@dataclass
class Golden:
    """A golden file: our model and its arguments, the weights by the authors' names, the inputs and outputs."""

    model: str
    model_args: dict[str, Any]
    weights: dict[str, Tensor]
    cases: list[Case]


@dataclass
class AdapterGolden:
    """The same for VRWKVAdapter."""

    args: dict[str, Any]
    weights: dict[str, Tensor]  # by the authors' names
    cases: list[tuple[Tensor, list[Tensor]]]  # images (1, 3, H, W), maps of stride 4, 8, 16, 32


def _tensors(name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def _read(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The constructor arguments, the weights, and all tensors of a file."""
    metadata, tensors = _tensors(name)
    config = json.loads(metadata["config"])
    if "shared" in metadata:
        tensors |= _tensors(metadata["shared"])[1]
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    return config, weights, tensors


def load_golden(name: str) -> Golden:
    config, weights, tensors = _read(name)
    model_args = {
        "img_size": config["img_size"],
        "patch_size": config["patch_size"],
        "embed_dim": config["embed_dims"],
        "depth": config["depth"],
        "num_classes": config["num_classes"],
        "post_norm": config.get("post_norm", False),
        "init_values": config.get("init_values"),
        "head_hidden_size": config.get("hidden_dims"),
    }
    if config["arch"] == "VRWKV6":
        model, model_args["head_size"] = "test_vrwkv6", config["embed_dims"] // config["num_heads"]
    else:
        model, model_args["key_norm"] = "test_vrwkv", config.get("key_norm", config.get("k_norm", False))
    cases = []
    while (image := tensors.get(f"input/{len(cases)}")) is not None:
        prefix = f"output/{len(cases)}/"
        count = sum(key.startswith(f"{prefix}feature/") for key in tensors)
        features = [tensors[f"{prefix}feature/{i}"] for i in range(count)]
        cases.append(Case(image, features, tensors[f"{prefix}logits"]))
    return Golden(model, model_args, weights, cases)


def load_adapter_golden(name: str) -> AdapterGolden:
    config, weights, tensors = _read(name)
    taken = ("conv_inplane", "n_points", "deform_num_heads", "deform_ratio", "cffn_ratio", "interaction_indexes")
    model_args = {
        "img_size": config["img_size"],
        "embed_dim": config["embed_dims"],
        "depth": config["depth"],
        "init_values": config["init_values"],
        "post_norm": config.get("post_norm", False),
        "key_norm": config.get("key_norm", False),
        "drop_path_rate": config["drop_path_rate"],
    }
    args = {"model": "test_vrwkv", "model_args": model_args, **{key: config[key] for key in taken}}
    cases = [(tensors[f"input/{i}"], [tensors[f"output/{i}/feature/{level}"] for level in range(4)]) for i in range(2)]
    return AdapterGolden(args, weights, cases)
