"""Random settings and options: no traceback, and nothing accepted that makes no sense.

VRWKV_FUZZ_CASES=2000 runs so many instead of 200, and trains with all that is accepted instead of with a few.
"""

import json
import math
import os
import random
import shutil

import pytest
import torch
import yaml
from support.colours import write_images
from support.fuzz import KEYS, as_arguments, random_options, random_settings, takes_long

from vrwkv.classification import Config, UserError, load_config
from vrwkv.runtime.config import Section

pytestmark = pytest.mark.usefixtures("no_curves")
CASES = int(os.environ.get("VRWKV_FUZZ_CASES", "200"))
TRAINED = 10 if CASES == 200 else CASES


@pytest.fixture
def small_config(tmp_path, monkeypatch):
    """A config that trains for a moment, in a folder that relative outputs go to."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data", train=4, val=2)
    content = {
        "output": "output",
        "epochs": 1,
        "device": "cpu",
        "model": {"name": "test_vrwkv", "args": {"img_size": 16, "patch_size": 8, "depth": 1}},
        "data": {"root": str(tmp_path / "data"), "batch_size": 4, "workers": 0},
        "optim": {"lr": 1e-3},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "config.yaml")


def leaves(schema, prefix=""):
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_key_is_tried():
    assert set(KEYS) == set(leaves(Config))


def call(main, argv, capsys):
    """Exit code and stdout; what fails says so on a line, and no traceback shows."""
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as error:  # of argparse
        code = error.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err, argv
    assert code == 0 or any("error: " in line for line in captured.err.splitlines()), argv
    return code, captured.out


def test_settings(small_config, train, capsys):
    generator, accepted, trained = random.Random(0), 0, 0
    for _ in range(CASES):
        chosen = random_settings(generator)
        argv = as_arguments(chosen)
        try:
            config = load_config(Config, small_config, argv)
        except UserError as error:
            for line in str(error).splitlines():
                assert any(key in line for key in chosen), (argv, line)
            continue
        accepted += 1
        for key, value in chosen.items():
            assert KEYS[key][0](value), f"{key}={value!r} was accepted"
        if trained < TRAINED and not takes_long(chosen):
            trained += 1
            code, _ = call(train, ["--config", small_config, "--set", *argv], capsys)
            if code == 0:
                content = torch.load(os.path.join(config.output, "last.pth"), weights_only=True)
                assert content["epoch"] == 1
                assert all(math.isfinite(value) for value in content["metrics"].values())
            shutil.rmtree(config.output, ignore_errors=True)
    assert accepted >= CASES / 10
    assert trained >= min(TRAINED, accepted / 2)


def test_options_of_validate(run, validate, capsys):
    generator = random.Random(1)
    names = ["--batch-size", "--workers", "--img-size", "--crop-pct", "--device", "--amp", "--split", "--data-root"]
    for _ in range(CASES // 4):
        argv = ["--checkpoint", str(run / "best.pth"), "--json", "-j", "0"]
        argv += random_options(generator, [*names, "--model"])
        if not any(f"--workers={workers}" in argv for workers in (1, 2, 3, 7)):
            code, out = call(validate, argv, capsys)
            assert code or set(json.loads(out)) == {"loss", "top1", "top5", "images_per_second", "images"}


def test_options_of_predict(run, data_root, predict, capsys):
    generator = random.Random(2)
    for _ in range(CASES // 4):
        path = str(data_root / "val" / "red" / "0.png")
        names = ["--topk", "--device", "--amp", "--model", "--checkpoint"]
        argv = [path, "--checkpoint", str(run / "best.pth"), "--json", *random_options(generator, names)]
        code, out = call(predict, argv, capsys)
        assert code or len(json.loads(out)) == 1
