"""The adapter's golden files: the authors' weights and constructor arguments, and what the backbone must return."""

import json
from dataclasses import dataclass
from typing import Any

from models.golden import GOLDEN
from safetensors import safe_open
from torch import Tensor


@dataclass
class AdapterGolden:
    args: dict[str, Any]  # of VRWKVAdapter
    weights: dict[str, Tensor]  # by the authors' names
    cases: list[tuple[Tensor, list[Tensor]]]  # images (1, 3, H, W), maps of stride 4, 8, 16, 32


def load_adapter_golden(name: str) -> AdapterGolden:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
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
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    cases = [(tensors[f"input/{i}"], [tensors[f"output/{i}/feature/{level}"] for level in range(4)]) for i in range(2)]
    return AdapterGolden(args, weights, cases)
