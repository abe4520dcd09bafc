"""Times what training adds to the network: the loop's own time in a step, and the loader beside timm's.

python benchmarks/run_training.py [--steps 40] [--threads 2]

The loop trains VRWKV-T by its recipe, with averaged weights, 8 pictures of 224 pixels a step. Its own time is what a
step takes beside data, forward and loss, backward, and optimizer (with clipping and averaging). The loaders read the
same JPEG files with the same transforms, a worker each. Prints, and writes training.csv.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import RESULTS, interleaved_medians, machine, write_rows
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_dataset, create_loader

from vrwkv.classification import Config, load_config
from vrwkv.classification.task import ClassificationTask
from vrwkv.runtime import trainer
from vrwkv.runtime.processes import join_world
from vrwkv.runtime.signals import StopSignals

RECIPE = Path(__file__).parents[1] / "configs" / "classification" / "vrwkv_tiny_patch16_224.yaml"
BATCH = 8


def write_pictures(root: Path, count: int) -> None:
    """Photographs of 500 x 375 pixels, ImageNet's usual size, of two classes."""
    for i, name in enumerate(("china", "flower")):
        picture = Image.fromarray(load_sample_image(f"{name}.jpg")).resize((500, 375))
        for split, pictures in (("train", count // 2), ("val", BATCH)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for j in range(pictures):
                picture.rotate(i + j).save(folder / f"{j:04}.jpg", quality=90)


def recipe(root: Path) -> Config:
    settings = [
        f"output={root / 'run'}",
        f"data.root={root}",
        f"data.batch_size={BATCH}",
        "data.workers=1",
        "device=cpu",
        "amp=none",
        "epochs=1",
        "schedule.warmup_epochs=0",
        "optim.ema_decay=0.9998",
        f"optim.lr_batch_size={BATCH}",
    ]
    return load_config(Config, RECIPE, settings)


class Spans:
    """Seconds spent in parts of a step, by name."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.now: dict[str, float] = defaultdict(float)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.now[name] += time.perf_counter() - begin

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return function(*args, **kwargs)

        return call


def own_time(root: Path) -> dict[str, float]:
    """Seconds of a step by its parts, the mean of the middle half; "loop" is what none of the others explains."""
    config, spans = recipe(root), Spans()
    with StopSignals() as signals, join_world(config.device) as world:
        loop = trainer.Trainer(ClassificationTask(config, world), config, world, signals)
        with loop.folder.locked():
            loop.start(None, False)
        state = loop.state
        loop.task.training_step = spans.timed("forward", loop.task.training_step)
        state.optimizer.step = spans.timed("optimizer", state.optimizer.step)
        state.optimizer.zero_grad = spans.timed("optimizer", state.optimizer.zero_grad)
        state.ema.update = spans.timed("optimizer", state.ema.update)
        trainer.dispatch_clip_grad = spans.timed("optimizer", trainer.dispatch_clip_grad)
        torch.Tensor.backward = spans.timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
        loop.task.train_loader = Batches(loop.task.train_loader, spans)
        loop._train_epoch()
    steps = sorted(spans.steps[3:], key=lambda step: step["step"])  # the first ones allocate
    middle = steps[len(steps) // 4 : -len(steps) // 4]  # without the noise of the machine
    return {name: sum(step[name] for step in middle) / len(middle) for name in middle[0]}


class Batches:
    """A loader whose waits are timed; a step goes from the request of a batch to the next one's."""

    def __init__(self, loader: Any, spans: Spans) -> None:
        self.loader, self.spans, self.batch_sampler = loader, spans, loader.batch_sampler

    def __iter__(self) -> Iterator[Any]:
        batches, begin = iter(self.loader), 0.0
        while True:
            now = time.perf_counter()
            if begin:
                step = self.spans.now
                step["loop"] = now - begin - sum(step.values())
                self.spans.steps.append({**step, "step": now - begin})
            self.spans.now, begin = defaultdict(float), now
            with self.spans.span("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def loaders(root: Path) -> dict[str, Any]:
    """Ours and timm's over the training pictures of the recipe."""
    config = recipe(root)
    with join_world(config.device) as world:
        task = ClassificationTask(config, world)
    augment = config.augment
    theirs = create_loader(
        create_dataset("", root=str(root / "train")),
        **task.data_config,
        batch_size=BATCH,
        is_training=True,
        num_workers=config.data.workers,
        persistent_workers=False,
        device=torch.device("cpu"),
        pin_memory=False,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
    )
    return {"vrwkv": task.train_loader, "timm": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with TemporaryDirectory() as folder:
        root = Path(folder)
        write_pictures(root, args.steps * BATCH)

        def drain(loader: Any) -> Callable[[], int]:
            return lambda: sum(len(images) for images, _ in loader)

        pairs = interleaved_medians({name: drain(loader) for name, loader in loaders(root).items()}, "cpu", 30.0)
        pictures = args.steps * BATCH
        for name, seconds in pairs.items():
            print(f"loader of {name:6} {pictures / seconds:8.1f} pictures/s, one worker")
            rows.append({"what": f"loader of {name}, a picture", "ms": f"{1e3 * seconds / pictures:.3f}"})
        parts = own_time(root)
    for name, seconds in parts.items():
        print(f"{name:10} {1e3 * seconds:8.2f} ms   {seconds / parts['step']:7.2%}")
        rows.append({"what": name if name == "step" else f"{name} of a step", "ms": f"{1e3 * seconds:.3f}"})
    print(write_rows("training", [{**row, **machine("cpu")} for row in rows], args.output))


if __name__ == "__main__":
    main()
