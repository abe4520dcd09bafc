"""Loaders: what the keys of `data` and `augment` do to the pictures."""

import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from support.ranks import Forked
from support.training import MEAN, STD, normalise

from vrwkv.classification import folder
from vrwkv.classification.config import AugmentConfig, DataConfig
from vrwkv.classification.data import (
    PictureDataset,
    _init_worker,
    create_eval_loader,
    create_train_loader,
    share_of,
)
from vrwkv.classification.folder import ImageFolder
from vrwkv.classification.task import create_mixing
from vrwkv.runtime.errors import UserError
from vrwkv.runtime.processes import World

CPU = World(torch.device("cpu"))
SETTINGS = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": MEAN,
    "std": STD,
    "crop_pct": 1.0,
    "crop_mode": "center",
}
NO_AUGMENT = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0, "color_jitter": 0.0}


def data(batch_size):
    return DataConfig(root="unused", batch_size=batch_size, workers=0)


def ramp(size=16):
    """(size, size, 3), brighter from left to right: each change of place or colour can be seen."""
    row = np.linspace(60, 190, size)
    return np.repeat(np.repeat(row[None, :, None], size, 0), 3, 2).astype(np.uint8)


def write(root, picture, count=8, splits=("train", "val")):
    for split in splits:
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count // 2):
                Image.fromarray(picture).save(root / split / name / f"{i}.png")


def train_batches(root, batch_size=8, picture=None, settings=None, **augment):
    if not root.joinpath("train").exists():
        write(root, ramp() if picture is None else picture)
    config = DataConfig(root=str(root), batch_size=batch_size, workers=0)
    augment = AugmentConfig(**{**NO_AUGMENT, **augment})
    settings = {**SETTINGS, **(settings or {})}
    return list(create_train_loader(ImageFolder(root, "train"), ["a", "b"], settings, config, augment, 0, CPU))


def test_pictures_come_unchanged_without_augmentation(tmp_path):
    ((images, target),) = train_batches(tmp_path)
    torch.testing.assert_close(images, normalise(ramp()).expand(8, 3, 16, 16), rtol=0, atol=1e-5)
    assert sorted(target.tolist()) == [0] * 4 + [1] * 4


def test_incomplete_batch_is_dropped_in_training_alone(tmp_path):
    assert [len(images) for images, _ in train_batches(tmp_path, batch_size=3)] == [3, 3]
    loader = create_eval_loader(ImageFolder(tmp_path, "val"), ["a", "b"], SETTINGS, data(3), CPU)
    assert [len(images) for images, _ in loader] == [3, 3, 2]


def test_erasing_puts_noise_of_single_pixels(tmp_path):
    flat = np.full((16, 16, 3), 120, np.uint8)
    ((images, target),) = train_batches(tmp_path, picture=flat)
    mixing, _ = create_mixing(AugmentConfig(erase_prob=1.0), 2, CPU)
    for image in mixing(images, target)[0]:
        erased = (image != normalise(flat)).all(0)
        assert 3 <= erased.sum() <= 16 * 16 / 2
        for channel in image:
            assert len(channel[erased].unique()) == erased.sum()


def test_no_erasing_by_default(tmp_path):
    ((images, target),) = train_batches(tmp_path)
    mixing, _ = create_mixing(AugmentConfig(), 2, CPU)
    assert torch.equal(mixing(images.clone(), target)[0], images)


@pytest.mark.parametrize(("hflip", "expected"), [(0.0, {0}), (1.0, {8}), (0.5, {*range(1, 8)})])
def test_hflip(hflip, expected, tmp_path):
    ((images, _),) = train_batches(tmp_path, hflip=hflip)
    mirrored = (images[:, 0, 0, 0] > images[:, 0, 0, -1]).sum().item()
    assert mirrored in expected


def test_scale(tmp_path):
    """The crop of a quarter of the area shows half of the ramp, somewhere."""
    ((images, _),) = train_batches(tmp_path, scale=[0.25, 0.25])
    spans = (images[:, 0, 0, -1] - images[:, 0, 0, 0]) / (normalise(ramp())[0, 0, -1] - normalise(ramp())[0, 0, 0])
    assert ((spans > 0.35) & (spans < 0.65)).all()
    assert spans.std() > 0


def test_ratio(tmp_path):
    """Four times as wide as high, the crop of a quarter of the area shows the whole ramp; the other way a quarter."""
    full = normalise(ramp())[0, 0, -1] - normalise(ramp())[0, 0, 0]
    for ratio, low, high in (([4.0, 4.0], 0.9, 1.1), ([0.25, 0.25], 0.1, 0.4)):
        ((images, _),) = train_batches(tmp_path, scale=[0.25, 0.25], ratio=ratio)
        spans = (images[:, 0, 0, -1] - images[:, 0, 0, 0]) / full
        assert ((spans > low) & (spans < high)).all()


def test_color_jitter(tmp_path):
    ((images, _),) = train_batches(tmp_path, color_jitter=0.4)
    assert images.mean((1, 2, 3)).std() > 0.1


def test_auto_augment(tmp_path):
    ((plain, _),) = train_batches(tmp_path)
    ((images, _),) = train_batches(tmp_path, auto_augment="rand-m9-n2")
    assert sum(not torch.equal(image, plain[0]) for image in images) >= 4


@pytest.mark.parametrize("training", [True, False])
def test_interpolation(training, tmp_path):
    """A checkerboard made twice as large: nearest neighbours keep its two values."""
    checker = np.indices((8, 8)).sum(0) % 2 * 255
    write(tmp_path, np.repeat(checker[..., None], 3, 2).astype(np.uint8))
    for interpolation, exact in (("nearest", True), ("bicubic", False)):
        settings = {**SETTINGS, "interpolation": interpolation}
        if training:
            ((images, _),) = train_batches(tmp_path, settings=settings)
        else:
            ((images, _),) = create_eval_loader(ImageFolder(tmp_path, "val"), ["a", "b"], settings, data(8), CPU)
        assert (len(images[:, 0].unique()) == 2) == exact


def test_evaluation_keeps_the_order_and_crops_the_centre(tmp_path):
    write(tmp_path, ramp(32))
    for crop_pct in (1.0, 0.5):
        loader = create_eval_loader(
            ImageFolder(tmp_path, "val"), ["a", "b"], {**SETTINGS, "crop_pct": crop_pct}, data(8), CPU
        )
        ((images, target),) = loader
        assert target.tolist() == [0] * 4 + [1] * 4
        whole = (normalise(ramp(32))[0, 0, -1] - normalise(ramp(32))[0, 0, 0]).item()
        assert (images[0, 0, 0, -1] - images[0, 0, 0, 0]).item() / whole == pytest.approx(crop_pct, abs=0.08)


def test_grey_pictures_for_models_of_one_channel(tmp_path):
    settings = {**SETTINGS, "input_size": (1, 16, 16), "mean": (0.5,), "std": (0.25,)}
    ((images, _),) = train_batches(tmp_path, settings=settings)
    assert images.shape == (8, 1, 16, 16)
    write(tmp_path / "more", ramp())
    ((images, _),) = create_eval_loader(
        ImageFolder(tmp_path / "more", "val"), ["a", "b"], {**SETTINGS, **settings}, data(8), CPU
    )
    torch.testing.assert_close(images[0, 0], torch.from_numpy((ramp()[..., 0] / 255 - 0.5) / 0.25).float())


def test_classes_are_ordered_by_number(tmp_path):
    for name in ("10", "9", ".hidden", "b", "a"):
        save(tmp_path / "train" / name / "x.png")
    (tmp_path / "train" / "notes.txt").write_text("no class")
    assert list(ImageFolder(tmp_path, "train").pictures) == ["9", "10", "a", "b"]


def test_names_that_differ_in_zeros_or_case_alone_are_ordered(tmp_path, monkeypatch):
    """However the file system lists them."""
    for name in ("a/1.png", "a/01.png", "A/001.png"):
        save(tmp_path / "train" / name)
    found, scan = [], folder._scan
    for step in (1, -1):
        monkeypatch.setattr(folder, "_scan", lambda path: sorted(scan(path), key=lambda each: each.name)[::step])  # noqa: B023
        pictures = ImageFolder(tmp_path, "train")
        samples = PictureDataset(pictures, ["A", "a"], 3).samples
        found.append((list(pictures.pictures), [os.path.relpath(path, tmp_path / "train") for path, _ in samples]))
    assert found == [(["A", "a"], ["A/001.png", "a/01.png", "a/1.png"])] * 2


def test_only_links_are_asked_what_they_are(tmp_path, monkeypatch):
    """A question for each of a million pictures would take the start minutes."""
    for name in ("1.png", "2.png"):
        save(tmp_path / "train" / "a" / name)
    (tmp_path / "train" / "a" / "3.png").symlink_to("1.png")
    asked, isfile = [], os.path.isfile
    monkeypatch.setattr("os.path.isfile", lambda path: asked.append(os.path.basename(path)) or isfile(path))
    assert len(ImageFolder(tmp_path, "train").pictures["a"]) == 3
    assert asked == ["3.png"]


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ramp()).save(path)


def test_every_format_in_every_subfolder(tmp_path):
    """In the order of names; what is hidden, no picture or no file is left out, and that is said."""
    names = ["1.webp", "2.bmp", "3.tif", "4.gif", "10.JPEG", "deep/er/5.png", "x.png/6.ppm"]
    for name in (*names, ".hidden.png", ".hidden/7.png"):
        save(tmp_path / "val" / "a" / name)
    save(tmp_path / "val" / "b" / "1.png")
    (tmp_path / "val" / "b" / "notes.txt").write_text("none")
    os.mkfifo(tmp_path / "val" / "b" / "pipe.png")
    (tmp_path / "val" / "b" / "nowhere.png").symlink_to("absent.png")
    (tmp_path / "val" / "b" / "itself.png").symlink_to("itself.png")
    folder = ImageFolder(tmp_path, "val")
    assert folder.describe() == f"{tmp_path / 'val'}: 8 pictures of 12 files in 2 classes"
    dataset = PictureDataset(folder, ["b", "a"], 3)
    found = [os.path.relpath(path, tmp_path / "val") for path, _ in dataset.samples]
    assert found == [*(f"a/{name}" for name in names), "b/1.png"]
    assert [target for _, target in dataset.samples] == [1] * 7 + [0]
    dataset.transform = np.asarray
    assert len(dataset) == 8
    for i in range(8):
        assert np.abs(dataset[i][0].astype(int) - ramp()).max() <= 8


def test_links_to_folders_are_followed_once(tmp_path):
    """In circles too: to the class itself, to the split's folder and to one that a link has led to before."""
    save(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "train" / "a")
    save(tmp_path / "train" / "a" / "1.png")
    for name, target in (("link", "../../elsewhere"), ("again", "../../elsewhere"), ("self", "."), ("up", "..")):
        (tmp_path / "train" / "a" / name).symlink_to(target)
    pictures = ImageFolder(tmp_path, "train").pictures
    assert [sorted(os.path.basename(path) for path in paths) for paths in pictures.values()] == [["1.png", "2.png"]]


def test_folder_in_two_classes(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "train" / name / "1.png")
    (tmp_path / "train" / "a" / "link").symlink_to("../b")
    with pytest.raises(UserError, match=r"train/b lies in two classes, a and b"):
        ImageFolder(tmp_path, "train")


def test_folder_named_as_a_picture_is_no_class(tmp_path):
    save(tmp_path / "train" / "x.png" / "1.png")
    with pytest.raises(UserError, match=r"train/x.png is a folder and no picture"):
        ImageFolder(tmp_path, "train")


def test_class_that_holds_a_folder_named_as_a_picture_is_empty(tmp_path):
    (tmp_path / "train" / "a" / "x.png").mkdir(parents=True)
    with pytest.raises(UserError, match=r"class folder .*train/a is empty"):
        ImageFolder(tmp_path, "train")


def test_paths_that_are_no_folders(tmp_path):
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "train").write_text("")
    for root, split, expected in (
        (tmp_path / "absent", "train", "no data root .*absent"),
        (tmp_path / "file", "train", "has no folder 'train'"),
        (tmp_path, "x" * 5000, "has no folder"),
        ("a\0b", "train", "no data root"),
    ):
        with pytest.raises(UserError, match=expected):
            ImageFolder(root, split)


@pytest.mark.parametrize(("size", "pictures", "expected"), [(1, 5, [5]), (2, 5, [3, 2]), (4, 2, [1, 1, 0, 0])])
def test_shares(size, pictures, expected):
    dataset = range(pictures)
    assert [share_of(dataset, World(CPU.device, rank, size)) for rank in range(size)] == expected


def all_batches(root, workers, epoch=0, step=0, world=CPU, batch_size=4):
    if not root.joinpath("train").exists():
        write(root, np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8), count=16)
    config = DataConfig(root=str(root), batch_size=batch_size, workers=workers)
    augment = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1")
    loader = create_train_loader(ImageFolder(root, "train"), ["a", "b"], SETTINGS, config, augment, 5, world)
    loader.batch_sampler.start(epoch, step)
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize("workers", [1, 3])
def test_samples_do_not_depend_on_workers(workers, tmp_path):
    assert torch.equal(all_batches(tmp_path, workers), all_batches(tmp_path, 0))


def test_samples_do_not_depend_on_where_an_epoch_starts_or_what_was_drawn_before(tmp_path):
    whole = all_batches(tmp_path, 0, epoch=2)
    torch.manual_seed(1)
    assert torch.equal(all_batches(tmp_path, 0, epoch=2, step=3), whole[12:])
    assert torch.equal(all_batches(tmp_path, 2, epoch=2, step=1), whole[4:])


def test_epochs_and_pictures_differ(tmp_path):
    """All pictures are the same here: what differs is drawn."""
    first, second = all_batches(tmp_path, 0, epoch=0), all_batches(tmp_path, 0, epoch=1)
    assert len(first.flatten(1).unique(dim=0)) == 16
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) == 32


def test_what_was_trained_is_not_read_again(tmp_path, monkeypatch):
    read = []
    load = PictureDataset.__getitem__
    monkeypatch.setattr(PictureDataset, "__getitem__", lambda self, index: read.append(index) or load(self, index))
    all_batches(tmp_path, 0, step=3)
    assert len(read) == 4


def test_processes_share_the_batches_of_one(tmp_path):
    """A step's pictures are the same for two processes as for one with batches twice as large."""
    one = all_batches(tmp_path, 0, batch_size=8)
    shares = [all_batches(tmp_path, 0, world=World(CPU.device, rank, 2)) for rank in (0, 1)]
    for step in (0, 1):
        of_both = torch.cat([share[4 * step : 4 * step + 4] for share in shares])
        assert torch.equal(of_both, one[8 * step : 8 * step + 8])


def test_workers_outlive_the_signals_that_end_a_run(monkeypatch):
    """They go to the whole process group; the step that they interrupt may need more batches."""
    monkeypatch.setattr("vrwkv.runtime.signals.GRACE", 0.5)
    process = Forked(lambda: _init_worker(None) or print("ready", file=sys.stderr) or time.sleep(60))
    assert process.stderr.readline() == "ready\n"
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(process.pid, number)
    assert process.wait(0.2) is None
    assert process.wait() == 0  # nobody ended it after SIGTERM
