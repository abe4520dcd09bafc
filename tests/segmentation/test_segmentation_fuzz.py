"""Random settings with random values: each run either works or ends with one line that says why not."""

import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from mmengine.config import Config
from PIL import Image

CASES = int(os.environ.get("VRWKV_FUZZ_CASES", "40"))
VALUES = [  # few are large: a model of a million channels takes a while to fail
    *("0", "1", "2", "7", "-1", "-3", "0.5", "1.5", "-0.5", "1e-9", "nan", "inf", "-inf", "None", "True", "False"),
    *("foo", "x,y", "[]", "()", "(0,0)", "[0,1]", "(3,3)", "(40,40)", "(16,-16)", "[[1,2],[3]]", "SyncBN", "../x"),
]


def keys_of(settings: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings, of whole branches too."""
    for key, value in settings.items() if isinstance(settings, dict) else enumerate(settings):
        yield f"{prefix}{key}"
        if isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)):
            yield from keys_of(value, f"{prefix}{key}.")


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (20, 30)).save(tmp_path / "x.png")
    return tmp_path / "x.png"


@pytest.mark.parametrize("seed", range(CASES))
def test_fuzz(
    seed, config_path, checkpoint, picture, train_segmentor, test_segmentor, segment_main, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    keys = [key for key in keys_of(Config.fromfile(config_path).to_dict()) if not key.startswith("custom_imports")]
    keys += ["load_from", "work_dir", "randomness.seed", "resume", "model.backbone.init_cfg", "model.pretrained"]
    options = [f"{rng.choice(keys)}={rng.choice(VALUES)}" for _ in range(rng.randint(1, 2))]
    small = ["--cfg-options", "train_cfg.max_iters=2", "train_cfg.val_interval=2", *options]
    tool, argv = rng.choice(
        [
            (train_segmentor, [config_path, *small]),
            (test_segmentor, [config_path, checkpoint, *rng.choice([[], ["--tta"]]), *small]),
            (
                segment_main,
                [picture, "--config", config_path, "--checkpoint", checkpoint, "--out", tmp_path / "out", *small],
            ),
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = tool([str(each) for each in argv])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err, options
    assert (code, bool(lines)) in ((0, False), (1, True)), options
    print(tool.__module__, code, options, *lines)
