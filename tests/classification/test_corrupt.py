"""Corrupt training pictures: which ones take their places, and when there are too many."""

import csv

import pytest
import torch
from support.training import MEAN, STD, numbers_of, write_squares

from vrwkv.classification.config import AugmentConfig, DataConfig
from vrwkv.classification.data import create_train_loader
from vrwkv.classification.folder import ImageFolder
from vrwkv.runtime.errors import UserError
from vrwkv.runtime.processes import World

PICTURES = 16  # even ones in class0, odd ones in class1
SETTINGS = {"input_size": (3, 16, 16), "interpolation": "bicubic", "mean": MEAN, "std": STD}


@pytest.fixture
def root(tmp_path):
    return write_squares(tmp_path / "squares", PICTURES)


def corrupt(root, *numbers):
    for number in numbers:
        path = root / "train" / f"class{number % 2}" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:100])


def loader_of(root, max_corrupt, workers=0, **augment):
    config = DataConfig(root=str(root), batch_size=4, workers=workers, max_corrupt=max_corrupt)
    augment = AugmentConfig(**{"scale": [1, 1], "ratio": [1, 1], "hflip": 0, "color_jitter": 0, **augment})
    cpu = World(torch.device("cpu"))
    return create_train_loader(ImageFolder(root, "train"), ["class0", "class1"], SETTINGS, config, augment, 0, cpu)


@pytest.mark.parametrize("workers", [0, 3])
def test_next_pictures_take_their_places(workers, root, capsys):
    """4 and 6 become 8, 15 (the last) becomes 0: each with its own class; a second epoch says nothing new."""
    corrupt(root, 4, 6, 15)
    loader = loader_of(root, 3, workers)
    for epoch in (0, 1):
        loader.batch_sampler.start(epoch)
        batches = list(loader)
        numbers = numbers_of(torch.cat([images for images, _ in batches]))
        assert sorted(numbers) == [0, 0, 1, 2, 3, 5, 7, 8, 8, 8, 9, 10, 11, 12, 13, 14]
        assert torch.cat([classes for _, classes in batches]).tolist() == [number % 2 for number in numbers]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[0] for line in lines] == [f"corrupt picture {i} of at most 3" for i in (1, 2, 3)]
    assert {line.split("cannot read image ")[1].split(":")[0][-6:] for line in lines} == {"/4.png", "/6.png", "15.png"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("numbers", "ending"), [((6,), ""), ((1, 6, 15), "so far: 3, data.max_corrupt is 2")])
def test_one_more_than_allowed(workers, numbers, ending, root):
    """Far from each other, so that each batch and worker for itself would bear them."""
    corrupt(root, *numbers)
    with pytest.raises(UserError, match=f"cannot read image .*{ending}"):
        list(loader_of(root, len(numbers) - 1, workers))


def test_nothing_can_be_read(root):
    corrupt(root, *range(PICTURES))
    with pytest.raises(UserError, match=r"so far: 16, data\.max_corrupt is 1000"):
        list(loader_of(root, 1000))


def test_augmented_replacements_do_not_depend_on_workers_or_where_an_epoch_starts(root):
    corrupt(root, 3, 8, 9)
    drawn = {"scale": [0.2, 1.0], "hflip": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1"}
    whole = torch.cat([images for images, _ in loader_of(root, 3, **drawn)])
    parts = []
    for begin, workers in ((0, 1), (1, 2), (3, 0)):
        loader = loader_of(root, 3, workers, **drawn)
        loader.batch_sampler.start(0, begin)
        parts.append(torch.cat([images for images, _ in loader]))
    for begin, images in zip((0, 4, 12), parts, strict=True):
        assert torch.equal(images, whole[begin:])


@pytest.mark.usefixtures("no_curves")
def test_training_bears_them(tmp_path, root, train, train_args, error):
    corrupt(root, 2, 5)
    settings = train_args(tmp_path / "output", f"data.root={root}", "data.workers=1")
    assert "data.max_corrupt is 1" in error(train, [*settings, "data.max_corrupt=1"])
    assert train([*settings, "data.max_corrupt=2", "--resume", "auto"]) == 0  # from the state before
    with open(tmp_path / "output" / "summary.csv") as file:
        assert len(list(csv.DictReader(file))) == 2
