"""Several runs in one picture."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from support.scripts import load_tool

plot_runs = load_tool("plot_runs")


def write(folder, values):
    folder.mkdir()
    rows = "".join(f"{epoch},{value},{10 * value}\n" for epoch, value in enumerate(values, 1))
    (folder / "summary.csv").write_text("epoch,eval_loss,eval_top1\n" + rows)
    return str(folder)


def test_each_run_is_a_line_in_each_panel(tmp_path, monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    runs = [write(tmp_path / "a", [3, 2]), write(tmp_path / "b", [4, 3, 1])]
    assert plot_runs([*runs, "--out", str(tmp_path / "x.png")]) == 0
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["loss", "top1"]
    for axes, factor in zip(figures[0].axes, (1, 10), strict=True):
        assert [text.get_text() for text in axes.get_legend().get_texts()] == runs
        assert list(axes.lines[0].get_ydata()) == [3 * factor, 2 * factor]
        assert list(axes.lines[1].get_ydata()) == [4 * factor, 3 * factor, factor]
        assert list(axes.lines[1].get_xdata()) == [1, 2, 3]
    assert f"{runs[1]}  epoch 3: loss 1.0000, top1 10.0000" in capsys.readouterr().out


def test_picture(tmp_path):
    run = write(tmp_path / "a", [3, 2])
    assert plot_runs([run, "--out", str(tmp_path / "x.png")]) == 0
    assert np.asarray(Image.open(tmp_path / "x.png")).shape[:2] == (480, 1200)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "cannot read"), ("epoch,eval_loss\n", "has no rows yet"), ("epoch\n1,2,\n", "cannot read")],
)
def test_runs_that_cannot_be_drawn(text, expected, tmp_path, error):
    if text is not None:
        (tmp_path / "summary.csv").write_text(text)
    assert f"{tmp_path / 'summary.csv'}" in (message := error(plot_runs, [tmp_path]))
    assert expected in message


def test_picture_that_cannot_be_written(tmp_path, error):
    run = write(tmp_path / "a", [1])
    assert "cannot write" in error(plot_runs, [run, "--out", str(tmp_path / "absent" / "x.png")])
