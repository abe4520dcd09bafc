"""tools/app.py: bad input is one line, before anything is served."""

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support.scripts import Main, load_script

from vrwkv.app.uploads import open_upload
from vrwkv.runtime.errors import UserError

app = load_script("tools/app.py")


@pytest.fixture(autouse=True)
def no_demos(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no model: give --checkpoint or --seg-checkpoint, or run `make demo` and `make demo-seg`"),
        (["--checkpoint", "missing.pth"], "checkpoint missing.pth does not exist"),
        (["--model", "test_vrwkv"], "required: --checkpoint PATH, or --model NAME with --pretrained"),
        (["--config", "some.py"], "--config needs --seg-checkpoint"),
        (["--seg-checkpoint", "missing.onnx"], "checkpoint missing.onnx does not exist"),
        (["--max-megapixels", "-1"], "--max-megapixels must be positive, not -1"),
        (["--max-megabytes", "0"], "--max-megabytes must be positive, not 0"),
        (["--port", "70000"], "--port must be 1 to 65535, not 70000"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, error: Callable[[Main, list], str]) -> None:
    assert message in error(app.main, argv)


def test_address_that_cannot_be_listened_at(classifier_path: Path, error: Callable[[Main, list], str]) -> None:
    argv = ["--checkpoint", classifier_path, "--device", "cpu", "--host", "192.0.2.1"]
    assert "cannot listen at 192.0.2.1:7860" in error(app.main, argv)


def test_examples_are_pictures(classifier_path: Path, tmp_path: Path, error: Callable[[Main, list], str]) -> None:
    argv = ["--checkpoint", classifier_path, "--device", "cpu", "--examples", tmp_path]
    assert f"folder {tmp_path} holds no pictures" in error(app.main, argv)
    for name in "cab":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    assert [path.stem for path in app.first_pictures(tmp_path)] == ["a", "b", "c"]


def test_demos_are_taken_where_nothing_else_is_named(classifier_path: Path) -> None:
    app.DEMO.parent.mkdir(parents=True)
    shutil.copy(classifier_path, app.DEMO)
    args = dict(checkpoint=None, model=None, pretrained=False, config=None, seg_checkpoint=None, device="cpu")
    classifier, segmentor = app.load_models(Namespace(**args))
    assert classifier.class_names == ["blue", "green", "red"]
    assert segmentor is None


def test_without_gradio(error: Callable[[Main, list], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vrwkv.app")
    assert "vrwkv.app needs gradio" in error(app.main, ["--checkpoint", "some.pth"])


def test_pictures_are_measured_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "x.png")
    upload = {"path": str(tmp_path / "x.png"), "orig_name": "holiday.png"}
    assert open_upload(upload, 600).size == (30, 20)
    monkeypatch.setattr("vrwkv.app.uploads.open_image", lambda path: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"^image holiday.png has 30 x 20 pixels, 0.0006 million: at most 0.000599 "):
        open_upload(upload, 599)
