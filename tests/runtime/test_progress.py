"""What a run shows and leaves to look at."""

import numpy as np
from PIL import Image

from vrwkv.runtime.progress import Measure, draw_curves

MEASURES = (
    Measure("loss", "loss"),
    Measure("hidden"),
    Measure("error", "largest error"),
    Measure("near", "near", percent=True, higher_is_better=True),
)


def test_curves_have_a_panel_for_each_measure_that_is_shown(tmp_path):
    names = [f"{part}_{each.name}" for part in ("train", "eval") for each in MEASURES]
    rows = [["epoch", *names], *([str(epoch), *[str(epoch * i) for i in range(8)]] for epoch in (1, 2, 3))]
    (tmp_path / "summary.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    draw_curves(tmp_path / "summary.csv", tmp_path / "curves.png", MEASURES)
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert pixels.shape == (480, 3 * 600, 3)
    for panel in np.split(pixels, 3, axis=1):
        for colour in ((31, 119, 180), (255, 127, 14)):
            assert (panel == colour).all(2).sum() > 100  # a curve
