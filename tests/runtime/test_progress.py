"""What a run shows and leaves to look at."""

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from vrwkv.runtime import progress
from vrwkv.runtime.curves import draw_curves
from vrwkv.runtime.processes import World
from vrwkv.runtime.progress import Measure, Meters, Progress, clock, text_of

CPU = World(torch.device("cpu"))

MEASURES = (
    Measure("loss", "loss"),
    Measure("hidden"),
    Measure("error", "largest error"),
    Measure("near", "near", percent=True, higher_is_better=True),
)


@pytest.fixture
def summary(tmp_path):
    """Of three epochs; the training's values are the epoch's number times 0, 1, 2, 3, the validation's times 4 to 7."""
    names = [f"{part}_{each.name}" for part in ("train", "eval") for each in MEASURES]
    rows = [["epoch", *names], *([str(epoch), *[str(epoch * i) for i in range(8)]] for epoch in (1, 2, 3))]
    (tmp_path / "summary.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    return tmp_path / "summary.csv"


def test_curves_have_a_panel_for_each_measure_that_is_shown(summary, tmp_path):
    draw_curves(summary, tmp_path / "curves.png", MEASURES)
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert pixels.shape == (480, 3 * 600, 3)
    for panel in np.split(pixels, 3, axis=1):
        for colour in ((31, 119, 180), (255, 127, 14)):
            assert (panel == colour).all(2).sum() > 100  # a curve


def test_what_the_curves_show(summary, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append((figure, path)))
    draw_curves(summary, "somewhere.png", MEASURES)
    ((figure, path),) = figures
    assert path == "somewhere.png"
    labels = ["loss", "largest error", "near (%)"]
    assert [axes.get_ylabel() for axes in figure.axes] == labels
    for axes, place in zip(figure.axes, (0, 2, 3), strict=True):
        assert axes.get_xlabel() == "epoch"
        train, val = axes.lines
        assert np.array_equal(train.get_xydata(), [[epoch, epoch * place] for epoch in (1, 2, 3)])
        assert np.array_equal(val.get_xydata(), [[epoch, epoch * (place + 4)] for epoch in (1, 2, 3)])
        assert train.get_marker() == val.get_marker() == "."  # a single epoch can be seen
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training, augmented", "validation"]


def test_curves_of_a_measure_that_was_not_logged(summary, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    draw_curves(summary, "somewhere.png", [Measure("new", "new")])
    assert all(math.isnan(y) for line in figures[0].axes[0].lines for y in line.get_ydata())


def test_texts():
    values = {"loss": 0.12345, "hidden": 1.0, "error": 2.0, "near": 33.333}
    assert text_of(MEASURES, values) == "loss 0.1235, largest error 2.0000, near 33.33 %"
    assert clock(3725.4) == "1:02:05"
    assert clock(59.6) == "0:01:00"


def test_meters():
    """Means over samples, in percent where that is asked for; batches count by their size."""
    meters = Meters([MEASURES[0], MEASURES[3]], CPU)
    assert meters.values() == {"loss": 0.0, "near": 0.0}
    meters.update({"loss": torch.tensor(6.0, requires_grad=True), "near": torch.tensor(1), "other": torch.ones(3)}, 3)
    meters.update({"loss": torch.tensor(2.0), "near": torch.tensor(0)}, 1)
    assert meters.values() == {"loss": 2.0, "near": 25.0}


def test_sums_of_all_processes():
    """What is gathered gives the means of all, and each process goes on from its own part."""
    gathered = torch.tensor([[6.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
    meters = Meters([MEASURES[0], MEASURES[3]], World(CPU.device, 1, 2))
    assert meters.values(gathered) == {"loss": 2.0, "near": 25.0}
    meters.restore(gathered)
    assert meters.values() == {"loss": 2.0, "near": 0.0}
    with pytest.raises(ValueError, match=r"required are \(2, 3\) sums, not \(1, 3\)"):
        meters.restore(gathered[:1])


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def meters():
    meters = Meters(MEASURES[:1], CPU)
    meters.update({"loss": torch.tensor(2.0)}, 4)
    return meters


def test_plain_lines_once_a_minute(meters, monkeypatch, capfd):
    clock = Clock(monkeypatch)
    with Progress("epoch 1/2", 10, 4, CPU) as bar:
        for seconds in (59, 1, 59, 1, 1):
            clock.now += seconds
            bar.step(meters)
        assert bar.images_per_second == pytest.approx(5 * 4 / 121)
    assert capfd.readouterr().err.splitlines() == [
        "epoch 1/2 2/10: loss 0.5000, 0 images/s, 0% waiting for data, 0:04:00 left",
        "epoch 1/2 4/10: loss 0.5000, 0 images/s, 0% waiting for data, 0:03:00 left",
    ]


def test_share_of_waiting_and_what_was_done_before(meters, monkeypatch, capfd):
    clock = Clock(monkeypatch)

    def slow():
        for i in range(3):
            clock.now += 15
            yield i

    with Progress("x", 10, 4, CPU, done=6) as bar:
        for i, batch in enumerate(bar.waiting(slow())):
            assert batch == i
            clock.now += 45
            bar.step(meters)
        assert bar.images_per_second == pytest.approx(3 * 4 / 180)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "x 7/10: loss 0.5000, 0 images/s, 25% waiting for data, 0:03:00 left"
    assert len(lines) == 3


def test_images_of_all_processes_count(meters, monkeypatch):
    clock = Clock(monkeypatch)
    with Progress("x", 10, 4, World(CPU.device, 0, 3)) as bar:
        clock.now += 2
        bar.step(meters)
        assert bar.images_per_second == 6.0


def test_only_the_first_process_shows(meters, monkeypatch, capfd):
    clock = Clock(monkeypatch)
    with Progress("x", 10, 4, World(CPU.device, 1, 2)) as bar:
        clock.now += 100
        bar.step(meters)
    assert capfd.readouterr().err == ""


def test_bar_on_a_terminal(meters, monkeypatch, capfd):
    clock = Clock(monkeypatch)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("epoch 1/2", 10, 4, CPU) as bar:
        for seconds in (0.4, 0.2, 0.2):
            clock.now += seconds
            bar.step(meters)
    text = capfd.readouterr().err
    assert "epoch 1/2" in text
    assert "loss 0.5000, 13 images/s" in text  # two steps in 0.6 s
    assert "\n" not in text
