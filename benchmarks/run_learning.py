"""Trains small models of equal size from nothing and compares what they learn.

python benchmarks/run_learning.py --data-root DIR [--models vrwkv vit ...] [--epochs 30] [--seeds 3]

DIR holds train/class/picture and val/class/picture of 64 pixels. Each model is trained with each learning rate and
seed 0; with its best one also with the other seeds. Then the same weights are tested at 64, 96 and 128 pixels. VRWKV's
best learning rate is also that of its ablations, and of VRWKV after masked pre-training: as many epochs of that, which
sees a quarter of the patches, and half as many with classes. A row is added to learning.csv as soon as a training ends,
and what has a row is not trained again, so that the script may be stopped at any time; a training that was stopped goes
on. Several processes may train different models into one file.
"""

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from measure import RESULTS, machine
from torch import Tensor, nn

import vrwkv.layers.spatial_mix
from vrwkv.classification import Config, validate
from vrwkv.classification.task import ClassificationTask
from vrwkv.layers import SpatialMix
from vrwkv.pretraining import PretrainingConfig, pretrain
from vrwkv.runtime import trainer
from vrwkv.runtime.config import check

SIZE, OTHER_SIZES = 64, (96, 128)
SMALL = {"img_size": SIZE, "patch_size": 8, "embed_dim": 128, "depth": 6}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vrwkv": ("vrwkv_tiny_patch16_224", SMALL),
    "vrwkv6": ("vrwkv6_tiny_patch16_224", SMALL | {"embed_dim": 112, "head_size": 56, "mlp_ratio": 3.5}),
    "vit": ("vit_tiny_patch16_224", SMALL | {"embed_dim": 132, "num_heads": 4, "dynamic_img_size": True}),
    "convnext": ("convnext_atto", {"dims": [24, 48, 100, 196], "depths": [2, 2, 6, 2], "patch_size": 2}),
}
"""timm's names and arguments; 1.3 million parameters each."""


def without_shift(model: nn.Module) -> None:
    """No Q-Shift: every token is mixed with itself."""
    for module in model.modules():
        if hasattr(module, "shift_pixel"):
            cast(Any, module).shift_pixel = 0


@torch.no_grad()
def flat_decay(model: nn.Module) -> None:
    """All decays start at zero: every token gathers from all others alike."""
    for module in model.modules():
        if isinstance(module, SpatialMix):
            module.spatial_decay.zero_()


def one_way(model: nn.Module) -> None:
    """Tokens gather only from themselves and those before them."""
    vrwkv.layers.spatial_mix.bi_wkv = causal_wkv


def causal_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`bi_wkv` without the tokens behind, for short inputs ``(B, T, C)``."""
    place = torch.arange(k.shape[1], device=k.device)
    distance = place[:, None] - place  # (T, T)
    exponent = torch.where((distance == 0)[..., None], u, -(distance - 1)[..., None] * w)  # (T, T, C)
    exponent = exponent.masked_fill((distance < 0)[..., None], -torch.inf)
    weights = (exponent + k[:, None]).softmax(2)  # (B, T, T, C)
    return torch.einsum("btsc,bsc->btc", weights, v)


ABLATIONS: dict[str, Callable[[nn.Module], None]] = {
    "vrwkv without Q-Shift": without_shift,
    "vrwkv one way": one_way,
    "vrwkv with equal decays": flat_decay,
}
PRETRAINED = "vrwkv pre-trained"
ALL = [*MODELS, *ABLATIONS, PRETRAINED]


def shared_settings(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    model, model_args = MODELS[name.partition(" ")[0]]
    return {
        "epochs": args.epochs,
        "seed": seed,
        "device": args.device,
        "model": {"name": model, "args": model_args},
        "data": {
            "root": str(args.data_root),
            "batch_size": 64,
            "workers": args.workers,
            "img_size": SIZE,
            "crop_pct": 1.0,
        },
        "schedule": {"warmup_epochs": max(args.epochs // 15, 1)},
    }


def config_of(name: str, lr: float, seed: int, args: argparse.Namespace) -> Config:
    content = {
        **shared_settings(name, seed, args),
        "output": str(args.runs / f"{name.replace(' ', '_')}-lr{lr:g}-seed{seed}-epochs{args.epochs}"),
        "augment": {"scale": [0.35, 1.0], "label_smoothing": 0.1},
        "optim": {"lr": lr, "clip_grad": 5.0},
    }
    if name == PRETRAINED:
        content["model"]["checkpoint"] = str(masked_pretraining(seed, args))
        content["epochs"] = args.epochs // 2
    return check(Config, content)


def masked_pretraining(seed: int, args: argparse.Namespace) -> Path:
    """Weights of an autoencoder."""
    content = {
        **shared_settings(PRETRAINED, seed, args),
        "output": str(args.runs / f"autoencoder-seed{seed}-epochs{args.epochs}"),
        "decoder": {"dim": 64, "depth": 2},
        "optim": {"lr": 2e-3, "clip_grad": 1.0},
    }
    return pretrain(check(PretrainingConfig, content), resume="auto").with_name("last.pth")


def train(name: str, lr: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the results."""
    begin = time.monotonic()
    config, ablate = config_of(name, lr, seed, args), ABLATIONS.get(name)

    def make_task(config: Config, world: Any) -> ClassificationTask:
        task = ClassificationTask(config, world)
        if ablate:
            ablate(task.model)
        row["parameters"] = sum(p.numel() for p in task.model.parameters())
        return task

    row: dict[str, Any] = {"model": name, "lr": f"{lr:g}", "seed": seed, "epochs": args.epochs}
    ordinary = vrwkv.layers.spatial_mix.bi_wkv
    try:
        last = trainer.run(make_task, config, resume="auto").with_name("last.pth")
    finally:
        vrwkv.layers.spatial_mix.bi_wkv = ordinary
    row["seconds"] = round(time.monotonic() - begin)
    row[f"top1_{SIZE}"] = f"{torch.load(last, weights_only=True)['metrics']['top1']:.2f}"
    for size in () if ablate else OTHER_SIZES:
        found = validate(last, img_size=size, device=args.device, workers=args.workers)
        row[f"top1_{size}"] = f"{found['top1']:.2f}"
    return row


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add_row(path: Path, row: dict[str, Any]) -> None:
    names = ["model", "lr", "seed", "epochs", "parameters", "seconds", f"top1_{SIZE}"]
    names += [*(f"top1_{size}" for size in OTHER_SIZES), *machine("cpu")]
    is_new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("output/learning"), help="folder for the trainings")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.output / "learning.csv"

    def result(name: str, lr: float, seed: int) -> float:
        """Top-1 accuracy, trained now unless it is in the file."""
        wanted = (name, f"{lr:g}", str(seed), str(args.epochs))
        rows = {(row["model"], row["lr"], row["seed"], row["epochs"]): row for row in read_rows(path)}
        if wanted not in rows:
            add_row(path, {**train(name, lr, seed, args), **machine("cpu")})
            return result(name, lr, seed)
        return float(rows[wanted][f"top1_{SIZE}"])

    for name in args.models:
        base = name.partition(" ")[0]
        best = max(args.lrs, key=lambda lr: result(base, lr, 0))
        top1 = [result(name, best, seed) for seed in range(args.seeds)]
        mean = sum(top1) / len(top1)
        print(f"{name:26} lr {best:g}   top-1 {mean:.2f} %, {min(top1):.2f} to {max(top1):.2f}", flush=True)


if __name__ == "__main__":
    main()
