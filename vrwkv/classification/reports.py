"""What is told of a validation beside its totals: ImageNet-Real, a table of classes, a picture of confusions."""

import csv
import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from timm.data.readers.class_map import load_class_map
from torch import Tensor

from vrwkv.classification.folder import Pictures
from vrwkv.runtime.errors import UserError, first_line
from vrwkv.runtime.files import written
from vrwkv.runtime.processes import World

SHOWN = 10  # confusions that are named
NAMED = 40  # classes, if no more than these, have their names along the matrix


class Reports(NamedTuple):
    """Files that a validation reads and writes; None: without."""

    class_map: str | None = None
    """Names of the model's classes in timm's form: a .txt with a line for each, or a .pkl of {name: index}. Pictures
    of other classes are left out."""
    real_labels: str | None = None
    """real.json of ImageNet-Real, for the validation pictures of ImageNet-1k."""
    per_class: str | None = None
    """CSV to write: class, pictures, top1, top5."""
    confusion: str | None = None
    """PNG to write: what is taken for what."""


def read_class_map(path: str, num_classes: int) -> list[str]:
    """The names of a model's classes, by output; "" where the map has none.

    Raises:
        UserError: the file cannot be read, or is no such map.
    """
    try:
        indices = {name: index for name, index in load_class_map(path).items() if name != ""}
    except (OSError, ValueError, AssertionError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"cannot read class map {path}: {first_line(error)}") from error
    if path.endswith(".txt") and len(indices) != num_classes:
        raise UserError(
            f"class map {path} must have a line for each of the model's {num_classes} classes, not {len(indices)}; "
            "a .pkl of {name: index} may name some of them"
        )
    if set(indices.values()) - set(range(num_classes)) or len(set(indices.values())) < len(indices):
        raise UserError(f"class map {path} must give each name a different index from 0 to {num_classes - 1}")
    names = {index: str(name) for name, index in indices.items()}
    return [names.get(index, "") for index in range(num_classes)]


def leave_out(pictures: Pictures, class_names: list[str], path: str) -> str:
    """Takes the pictures away that are of none of the classes of a class map, and says how many."""
    unknown = pictures.pictures.keys() - set(class_names)
    lost = sum(len(pictures.pictures.pop(name)) for name in unknown)
    if not pictures.pictures:
        raise UserError(f"class map {path} names no class of {pictures.path}")
    return f"left out: {lost} pictures of {len(unknown)} classes that {path} does not name"


class Reporter:
    """Gathers the answers to all pictures. What can be wrong with the reports is found before.

    Args:
        reports: What to make.
        samples: Pictures and classes, in order.
        class_names: By output of the model.
        world: This process.

    Raises:
        UserError: a file cannot be read or written, or real labels are not for these pictures and classes.
    """

    def __init__(self, reports: Reports, samples: list[tuple[Any, int]], class_names: list[str], world: World) -> None:
        self.reports, self.class_names, self.world = reports, class_names, world
        self.classes = np.array([target for _, target in samples])
        self.best: list[Tensor] = []
        for path in filter(None, (reports.per_class, reports.confusion)):
            if not Path(path).parent.is_dir() or Path(path).is_dir():
                raise UserError(f"cannot write {path}: required is the name of a file in a folder that exists")
        if reports.confusion and not reports.confusion.endswith(".png"):
            raise UserError(f"the picture of confusions must be a .png, not {reports.confusion}")
        files = [Path(str(picture)).name for picture, _ in samples]
        self.real = self._read_real_labels(reports.real_labels, files) if reports.real_labels else None

    def _read_real_labels(self, path: str, files: list[str]) -> RealLabelsImagenet:
        index = {name: place for place, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
        if absent := index.keys() - set(self.class_names):
            raise UserError(
                f"real labels need a model of ImageNet-1k's classes, named as its folders are: {min(absent)} and "
                f"{len(absent) - 1} others are missing; --class-map names a model's classes"
            )
        # Outputs of other classes get numbers of their own, which are never right.
        numbers = [index.get(name, len(index) + place) for place, name in enumerate(self.class_names)]
        self.real_classes = torch.tensor(numbers)
        try:
            labels = json.loads(Path(path).read_text())
            if not isinstance(labels, list) or len(labels) != len(files):
                raise UserError(f"{path} must hold a list of labels for each of the {len(files)} pictures")
            real = RealLabelsImagenet(files, path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read real labels {path}: {first_line(error)}") from error
        if unknown := [file for file in files if file not in real.real_labels]:
            raise UserError(f"real labels are for ILSVRC2012_val_00000001.JPEG and so on, not for {unknown[0]}")
        return real

    def add(self, logits: Tensor) -> None:
        """Takes the logits (B, classes) of the next pictures of this process's share."""
        self.best.append(logits.topk(min(5, logits.shape[1])).indices)

    def finish(self) -> dict[str, float]:
        """Writes the files, in the first process, and returns real_top1 and real_top5 (percent). All call it."""
        best = self._gather()
        if self.world.primary and self.reports.per_class:
            with written(Path(self.reports.per_class)) as path:
                self._write_table(path, best)
        if self.world.primary and self.reports.confusion:
            with written(Path(self.reports.confusion)) as path:
                draw_confusion(path, best[:, 0], self.classes, self.class_names)
        if not self.real:
            return {}
        width = int(self.real_classes.max()) + 1
        for answers in self.real_classes[torch.from_numpy(best)].split(1000):
            ranks = torch.arange(answers.shape[1], 0, -1.0).expand(answers.shape)
            self.real.add_result(torch.zeros(len(answers), width).scatter_(1, answers, ranks))
        return {f"real_top{k}": accuracy for k, accuracy in self.real.get_accuracy().items()}

    def _gather(self) -> np.ndarray:
        """(pictures, 5): the best classes of all pictures in their order. Process r has every n-th one from r on."""
        width, size = min(5, len(self.class_names)), self.world.size
        share = torch.cat([torch.empty(0, width, dtype=torch.long, device=self.world.device), *self.best])
        padded = share.new_zeros(-(-len(self.classes) // size), width)
        padded[: len(share)] = share
        return self.world.gather(padded).transpose(0, 1).flatten(0, 1)[: len(self.classes)].cpu().numpy()

    def _write_table(self, path: Path, best: np.ndarray) -> None:
        right = best == self.classes[:, None]
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "pictures", "top1", "top5"])
            for index in np.unique(self.classes):
                of_class = right[self.classes == index]
                percent = [f"{100 * value:.2f}" for value in (of_class[:, 0].mean(), of_class.any(1).mean())]
                writer.writerow([self.class_names[index], len(of_class), *percent])


def draw_confusion(path: Path, answers: np.ndarray, classes: np.ndarray, class_names: list[str]) -> None:
    """Draws how often each class is taken for each other into a PNG, with the most frequent confusions by name.

    Args:
        path: The PNG.
        answers: (pictures,) what the model says.
        classes: (pictures,) what is right.
        class_names: By class.
    """
    from matplotlib.figure import Figure  # slow to import

    present = np.union1d(answers, classes)
    names = [class_names[index] or str(index) for index in present]
    counts = np.zeros((len(present), len(present)), int)
    np.add.at(counts, (np.searchsorted(present, classes), np.searchsorted(present, answers)), 1)
    figure = Figure(figsize=(15, 7), layout="constrained")
    matrix, bars = figure.subplots(1, 2)
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    image = matrix.imshow(shares, cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, ax=matrix, label="share of the true class's pictures (%)")
    right = 100 * counts.trace() / counts.sum()
    matrix.set(xlabel="the model says", ylabel="true class")
    matrix.set_title(f"{counts.sum()} pictures, {len(names)} classes: {right:.2f} % right (on the diagonal)")
    if len(names) <= NAMED:
        matrix.set_xticks(range(len(names)), names, rotation=90)
        matrix.set_yticks(range(len(names)), names)
    wrong = counts - np.diag(counts.diagonal())
    order = [place for place in np.argsort(-wrong, axis=None, kind="stable")[:SHOWN] if wrong.flat[place]]
    pairs = [divmod(int(place), len(names)) for place in order]
    bars.barh([f"{names[true]} taken for {names[said]}" for true, said in pairs], [wrong[pair] for pair in pairs])
    bars.invert_yaxis()
    bars.xaxis.get_major_locator().set_params(integer=True)
    bars.set(xlabel="pictures", title=f"The {len(pairs)} most frequent confusions" if pairs else "No confusions")
    figure.savefig(path, dpi=120, format="png")
