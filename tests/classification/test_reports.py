"""Reports of a validation: real labels, class maps, the table of classes, the picture of confusions."""

import csv
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from support.ranks import run_ranks
from support.training import square
from timm.data import ImageNetInfo

from vrwkv.classification.reports import Reporter, Reports, draw_confusion, read_class_map
from vrwkv.runtime.errors import UserError
from vrwkv.runtime.processes import World, join_world

PICTURES, CLASSES = 11, 7
NAMES = [f"name{i}" for i in range(CLASSES)]
SAMPLES = [(f"{i}.png", i % 4) for i in range(PICTURES)]
LOGITS = torch.randn(PICTURES, CLASSES, generator=torch.Generator().manual_seed(0))
CPU = World(torch.device("cpu"))


def report(reports, world, samples=SAMPLES, names=NAMES, logits=LOGITS):
    reporter = Reporter(reports, samples, names, world)
    for batch in logits[world.rank :: world.size].split(2):
        reporter.add(batch)
    return reporter.finish()


def table_of(path):
    with open(path) as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_table(ranks, tmp_path):
    path = tmp_path / "classes.csv"

    def call():
        with join_world("cpu") as world:
            report(Reports(per_class=str(path)), world)

    run_ranks(call, ranks)
    expected = [["class", "pictures", "top1", "top5"]]
    order = LOGITS.argsort(1, descending=True)
    for index in range(4):
        mine = order[index::4]
        top1, top5 = ((mine[:, :k] == index).any(1).float().mean() * 100 for k in (1, 5))
        expected.append([f"name{index}", str(len(mine)), f"{top1:.2f}", f"{top5:.2f}"])
    assert len({row[3] for row in expected}) > 2  # so that an order that is lost shows
    assert table_of(path) == expected
    assert [file.name for file in tmp_path.iterdir()] == ["classes.csv"]


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_real_labels(ranks, others, tmp_path):
    """Pictures of several labels are right with any of them; those of none do not count. A model may have more classes,
    in any order."""
    known = ImageNetInfo("imagenet-1k").label_names()
    names = known if not others else [*["other", "", ""], *reversed(known)]
    logits = torch.randn(PICTURES, len(names), generator=torch.Generator().manual_seed(1))
    logits[:, :others] = 2.5  # among the first five, and never right
    order = logits.argsort(1, descending=True)
    labels = [
        [known.index(name) for name in (names[order[i, i % 7]], names[order[i, 500]]) if name in known]
        for i in range(PICTURES)
    ]
    labels[1] = []
    (tmp_path / "real.json").write_text(json.dumps(labels))
    samples = [(f"somewhere/ILSVRC2012_val_{i + 1:08}.JPEG", 0) for i in range(PICTURES)]

    def call():
        with join_world("cpu") as world:
            return report(Reports(real_labels=str(tmp_path / "real.json")), world, samples, names, logits)

    asked = [i for i in range(PICTURES) if labels[i]]
    said = [[known.index(names[n]) if names[n] in known else -1 for n in row] for row in order[:, :5]]
    right = {k: sum(not {*said[i][:k]}.isdisjoint(labels[i]) for i in asked) for k in (1, 5)}
    assert 0 < right[1] < right[5] < len(asked)
    for result in run_ranks(call, ranks):
        assert result == pytest.approx({f"real_top{k}": 100 * right[k] / len(asked) for k in right})


def test_what_the_picture_of_confusions_shows(monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    classes, answers = np.array([0, 0, 0, 0, 2, 2, 5]), np.array([0, 2, 2, 5, 2, 0, 6])
    draw_confusion(None, answers, classes, NAMES)
    matrix, bars = drawn[0].axes[:2]
    expected = [[25, 50, 25, 0], [50, 50, 0, 0], [0, 0, 0, 100], [0, 0, 0, 0]]  # true classes 0, 2, 5 and 6
    assert matrix.images[0].get_array().tolist() == expected
    assert matrix.get_title().startswith("7 pictures, 4 classes: 28.57 % right")
    assert [label.get_text() for label in matrix.get_yticklabels()] == ["name0", "name2", "name5", "name6"]
    assert [bar.get_width() for bar in bars.patches] == [2, 1, 1, 1]
    labels = [label.get_text() for label in bars.get_yticklabels()]
    assert labels[0] == "name0 taken for name2" and "name5 taken for name6" in labels


def test_real_labels_that_do_not_fit(tmp_path):
    path, names = tmp_path / "real.json", ImageNetInfo("imagenet-1k").label_names()
    reports = Reports(real_labels=str(path))
    for content, samples, classes, expected in (
        ("[]", SAMPLES, NAMES, "need a model of ImageNet-1k's classes.* n01440764 and 999 others are missing"),
        ("[]", SAMPLES, names, "a list of labels for each of the 11 pictures"),
        ("nonsense", SAMPLES, names, "cannot read real labels"),
        (json.dumps([[1]] * PICTURES), SAMPLES, names, r"not for 0\.png"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=expected):
            Reporter(reports, samples, classes, CPU)


def test_class_maps_that_do_not_fit(tmp_path):
    text, pickled = tmp_path / "map.txt", tmp_path / "map.pkl"
    text.write_text("b\na\n\n")
    assert read_class_map(str(text), 2) == ["b", "a"]
    pickled.write_bytes(pickle.dumps({"x": 2}))
    assert read_class_map(str(pickled), 4) == ["", "", "x", ""]
    with pytest.raises(UserError, match=r"a line for each of the model's 3 classes, not 2"):
        read_class_map(str(text), 3)
    for content in ({"x": 4}, {"x": 1, "y": 1}):
        pickled.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="a different index from 0 to 3"):
            read_class_map(str(pickled), 4)
    for path in (tmp_path / "absent.txt", tmp_path / "map.json"):
        with pytest.raises(UserError, match=f"cannot read class map {path}"):
            read_class_map(str(path), 2)


def test_all_by_the_tool(run, data_root, tmp_path, validate, capsys, error):
    """Names of the data that the checkpoint does not know, one of them none of the map's."""
    for i, name in enumerate(("rot", "blau", "gelb")):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        Image.fromarray(square(i)).save(tmp_path / "data" / "val" / name / "1.png")
    (tmp_path / "map.txt").write_text("blau\ngruen\nrot\n")
    argv = ["--checkpoint", str(run / "best.pth"), "-j", "0", "--data-root", str(tmp_path / "data")]
    assert "none of the 3 known classes" in error(validate, argv)
    argv += ["--class-map", str(tmp_path / "map.txt"), "--per-class", str(tmp_path / "classes.csv")]
    assert validate([*argv, "--confusion", str(tmp_path / "confusion.png")]) == 0
    captured = capsys.readouterr()
    assert "2 images" in captured.out
    assert "left out: 1 pictures of 1 classes" in captured.err
    assert [row[:2] for row in table_of(tmp_path / "classes.csv")[1:]] == [["blau", "1"], ["rot", "1"]]
    assert Image.open(tmp_path / "confusion.png").size == (1800, 840)
    assert "cannot write" in error(validate, [*argv, "--confusion", str(tmp_path / "absent" / "x.png")])
    assert "must be a .png" in error(validate, [*argv, "--confusion", str(tmp_path / "x.jpg")])
