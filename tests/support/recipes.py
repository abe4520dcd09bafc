"""docs/recipes.md, from what the configs resolve to; `PYTHONPATH=tests python -m support.recipes` writes it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from support.scripts import REPOSITORY
from torch import nn

from vrwkv.classification import Config, load_config
from vrwkv.models import VisionRWKVBase
from vrwkv.pretraining import MaskedAutoencoder, PretrainingConfig
from vrwkv.runtime.recipe import RunConfig, create_optimizer

PAGE = REPOSITORY / "docs" / "recipes.md"
FOLDERS = {"classification": Config, "pretraining": PretrainingConfig}
ABOUT = """# Recipes

What the files of [configs/classification](../configs/classification) and [configs/pretraining](../configs/pretraining)
resolve to, with their `base` and all defaults; the head of a file says whose choices they are. Pictures per update are
processes (of the file's command) x `data.batch_size` x `optim.accumulate`. All are AdamW with a linear warm-up and a
cosine, by updates. `PYTHONPATH=tests python -m support.recipes` writes this page; a test compares it with the files.
"""
GROUPS = """## Parameter groups
The peak of the learning rate, and how many parameters have which weight decay: vectors (biases, norms, mixes, decays,
layer scale), position embeddings and VRWKV6's low-rank matrices have none. Drop path rises from block to block.
"""


def configs() -> Iterator[tuple[Path, Any]]:
    """All files, and what is in them."""
    for folder, schema in FOLDERS.items():
        for path in sorted((REPOSITORY / "configs" / folder).glob("*.yaml")):
            yield path, load_config(schema, path)


def build(config: Any) -> nn.Module:
    """The model of a config at its full size, without memory."""
    with torch.device("meta"), patch.object(VisionRWKVBase, "init_weights"):
        if isinstance(config, Config):
            return timm.create_model(config.model.name, **config.model.args)
        backbone = timm.create_model(config.model.name, **config.model.args, num_classes=0)
        return MaskedAutoencoder(backbone, config.decoder.dim, config.decoder.depth, config.mask_ratio)


def update_size(path: Path, config: RunConfig) -> tuple[int, int, int]:
    """Processes of the file's command, pictures of each, steps of an update."""
    command = path.read_text()
    processes = 1
    for number in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", command):
        processes *= int(number)
    return processes, config.data.batch_size, config.optim.accumulate


def recipe_row(path: Path, config: Any) -> dict[str, str]:
    """What a config asks for as a whole."""
    optim, schedule = config.optim, config.schedule
    assert (optim.name, schedule.name) == ("adamw", "cosine")
    processes, batch, steps = update_size(path, config)
    per = f" for {optim.lr_batch_size}" if optim.lr_batch_size else ""
    return {
        "config": path.stem,
        "pictures per update": f"{processes} x {batch} x {steps}",
        "epochs": str(config.epochs),
        "warm-up": str(schedule.warmup_epochs),
        "lr": f"{optim.lr:g}{per}",
        "from, to": f"{schedule.warmup_lr:g}, {schedule.min_lr:g}",
        "betas": ", ".join(f"{beta:g}" for beta in optim.betas or (0.9, 0.999)),
        "clipping": _or_none(optim.clip_grad),
        "layer decay": _or_none(optim.layer_decay),
        "EMA": _or_none(optim.ema_decay) + ", with warm-up" * optim.ema_warmup,
        "amp": config.amp,
    }


def picture_row(path: Path, config: Any) -> dict[str, str]:
    """What a config does to pictures."""
    augment = config.augment
    row = {"config": path.stem, "area": f"{augment.scale[0]:g} to {augment.scale[1]:g}", "flip": f"{augment.hflip:g}"}
    if isinstance(config, Config):
        row |= {
            "RandAugment": augment.auto_augment or "",
            "colour": "" if augment.auto_augment else f"{augment.color_jitter:g}",
        }
        row |= {"erasing": f"{augment.erase_prob:g}", "mixup": f"{augment.mixup:g}", "cutmix": f"{augment.cutmix:g}"}
        row |= {"smoothing": f"{augment.label_smoothing:g}"}
    return {**row, "crop of validation": f"{config.data.crop_pct:g}" if config.data.crop_pct else "the model's"}


def group_rows(path: Path, config: Any) -> list[dict[str, str]]:
    """The parameter groups of a config's optimizer: a row for each learning rate."""
    model, (processes, batch, steps) = build(config), update_size(path, config)
    optimizer, _ = create_optimizer(model, config, processes * batch * steps, 10)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates: dict[float, dict[float, list[nn.Parameter]]] = {}
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * group.get("lr_scale", 1)
        rates.setdefault(rate, {}).setdefault(group["weight_decay"], []).extend(group["params"])
    backbone = model if isinstance(config, Config) else model.backbone
    depths = [getattr(block.drop_path, "drop_prob", 0.0) for block in backbone.blocks]
    rows = []
    for rate, decays in sorted(rates.items()):
        layers = sorted({_layer(names[id(each)]) for found in decays.values() for each in found})
        blocks = [depths[number] for number, _ in layers if 0 <= number < len(depths)]
        counts = {decay: sum(each.numel() for each in found) / 1e6 for decay, found in decays.items()}
        rows.append(
            {
                "config": path.stem,
                "layers": "all" if len(rates) == 1 else ", ".join(dict.fromkeys(name for _, name in layers)),
                "lr": f"{rate:.4g}",
                "weight decay": "; ".join(
                    f"{decay:g}: {counts[decay]:.3f} M" for decay in sorted(counts, reverse=True)
                ),
                "drop path": " to ".join(dict.fromkeys(f"{depth:.3g}" for depth in (blocks[0], blocks[-1])))
                if blocks
                else "",
            }
        )
    return rows


def _layer(name: str) -> tuple[int, str]:
    """Where a parameter stands, and what that is called; ln0 belongs to the first block."""
    if number := re.match(r"(?:backbone\.)?blocks\.(\d+)\.", name):
        return int(number[1]), f"block {number[1]}"
    if name.startswith("ln0."):
        return 0, "block 0"
    return (-1, "stem") if name.startswith(("pos_embed", "patch_embed")) else (10**6, name.partition(".")[0])


def _or_none(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def table(rows: list[dict[str, str]]) -> str:
    """In Markdown; cells that a row does not have are empty."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    """All of docs/recipes.md."""
    every = list(configs())
    pictures = table([picture_row(*each) for each in every])
    groups = table([row for each in every for row in group_rows(*each)])
    return f"{ABOUT}\n{table([recipe_row(*each) for each in every])}\n## Pictures\n{pictures}\n{GROUPS}\n{groups}"


if __name__ == "__main__":
    PAGE.write_text(page())
