"""Training written out in plain PyTorch, to compare the trainer with, and a recorder of the batches that it sees."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

SIZE = 16
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def square(seed: int) -> np.ndarray:
    """Noise (16, 16, 3), bytes."""
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def write_squares(root: Path, count: int = 16, classes: int = 2) -> Path:
    """Writes root/{train,val}/{class}/N.png: `count` pictures of noise in each split, one after another in each class.

    They have the size of the model's input, so that nothing resizes or crops them.
    """
    for split in ("train", "val"):
        for i in range(count):
            folder = root / split / f"class{i % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(square(i)).save(folder / f"{i}.png")
    return root


def normalise(picture: np.ndarray) -> torch.Tensor:
    """(H, W, 3) bytes to (3, H, W)."""
    return torch.from_numpy(((picture / 255.0 - MEAN) / STD).astype(np.float32)).permute(2, 0, 1)


@dataclass
class Batch:
    images: torch.Tensor  # (B, 3, H, W)
    seed: int  # of torch's generator at that time


@contextmanager
def recorded_batches(kind: type[nn.Module]) -> Iterator[list[Batch]]:
    """Records what models of one type are given in training mode."""
    batches: list[Batch] = []

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if type(module) is kind and module.training:
            batches.append(Batch(inputs[0].detach().clone(), torch.initial_seed()))

    handle = register_module_forward_pre_hook(record)
    try:
        yield batches
    finally:
        handle.remove()


def numbers_of(images: torch.Tensor, count: int = 16) -> list[int]:
    """Which of the squares (B, 3, 16, 16) unaugmented pictures are."""
    known = torch.stack([normalise(square(i)) for i in range(count)]).flatten(1)
    distances = (images.flatten(1)[:, None] - known).abs().amax(2)
    assert (distances.min(1).values < 1e-3).all(), "a picture was changed on its way to the model"
    return distances.argmin(1).tolist()


def learning_rate(update: int, peak: float, updates: int, warmup: int, warmup_lr: float, min_lr: float) -> float:
    """Linear warm-up, then what is left of a cosine over all updates."""
    if update < warmup:
        return warmup_lr + update * (peak - warmup_lr) / warmup
    return min_lr + 0.5 * (peak - min_lr) * (1 + math.cos(math.pi * update / updates))


def ema_decay(update: int, decay: float, warmup: bool) -> float:
    """Of the average after an update, counted from 1; with warm-up an average that forgets less and less."""
    if update == 1:
        return 0.0
    return min(decay, 1 - update ** (-2 / 3)) if warmup else decay


def train_plainly(
    model: nn.Module,
    updates: list[list[torch.Tensor]],
    rates: list[float],
    *,
    weight_decay: float,
    clip_grad: float,
    decay: float,
    label_smoothing: float,
    ema_warmup: bool = False,
    optimizer_name: str = "adamw",
    classes: int = 2,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Trains `model`.

    Args:
        model: At its initial weights.
        updates: The batches (B, 3, 16, 16) of each update; all of an update count the same.
        rates: The learning rate of each update.
        weight_decay: Of all parameters with more than one dimension that the model does not except.
        clip_grad: Largest norm of all gradients of an update.
        decay: Of averaged weights.
        label_smoothing: Of the loss.
        ema_warmup: Let the decay rise.
        optimizer_name: adamw or sgd, by timm's names.
        classes: The class of square i is i modulo this.

    Returns:
        The state dicts of the weights and of their average.
    """
    model.train()
    spared = model.no_weight_decay()
    kept = [p for name, p in model.named_parameters() if p.ndim <= 1 or name in spared]
    shrunk = [p for name, p in model.named_parameters() if not (p.ndim <= 1 or name in spared)]
    groups = [{"params": kept, "weight_decay": 0.0}, {"params": shrunk}]
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0, weight_decay=weight_decay),
        "sgd": lambda: torch.optim.SGD(groups, lr=0, weight_decay=weight_decay, momentum=0.9, nesterov=True),
    }[optimizer_name]()
    average = {key: value.clone() for key, value in model.state_dict().items()}
    for number, (batches, rate) in enumerate(zip(updates, rates, strict=True), 1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        images = torch.cat(batches)
        target = torch.tensor([i % classes for i in numbers_of(images)])
        nn.functional.cross_entropy(model(images), target, label_smoothing=label_smoothing).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        optimizer.step()
        keep = ema_decay(number, decay, ema_warmup)
        for key, value in model.state_dict().items():
            average[key] = keep * average[key] + (1 - keep) * value
    return model.state_dict(), average
