"""tools/visualize.py: what it writes, and that bad input leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from support.colours import CLASSES, picture
from support.scripts import Main, load_tool

from vrwkv.classification import load_classifier
from vrwkv.visualize import to_picture

visualize = load_tool("visualize")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    args = dict(img_size=32, patch_size=8, num_classes=3)
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    torch.save(
        {"arch": "test_vrwkv", "model_args": args, "model": timm.create_model("test_vrwkv", **args).state_dict()}, path
    )
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"a {name}.png" for name in CLASSES]
    for path, colour in zip(paths, CLASSES.values(), strict=True):
        picture(colour, seed=0).save(path)
    return paths


def test_writes_a_picture_of_each_kind(
    checkpoint: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "looks"
    argv = [*map(str, pictures[:2]), "--checkpoint", str(checkpoint), "--out", str(out), "--at", "0", "0.9"]
    assert visualize(argv) == 0
    names = {"receptive_field.png", "decays.png", "gathered_0_a_blue.png", "gathered_1_a_green.png"}
    assert {path.name for path in out.iterdir()} == names
    assert set(capsys.readouterr().out.split()) == {str(out / name) for name in names}
    for name in names:
        with Image.open(out / name) as drawn:
            drawn.load()
            assert min(drawn.size) > 400


def test_picture_is_padded_as_the_model_pads_it(checkpoint: Path, pictures: list[Path]) -> None:
    """Then the grid of patches lies on it."""
    classifier = load_classifier(checkpoint, img_size=20)  # patches of 8
    image = classifier.prepare(pictures[0])
    padded = to_picture(image, classifier)
    assert image.shape == (3, 20, 20) and padded.shape == (24, 24, 3)
    std, mean = (torch.tensor(classifier.data_config[key]) for key in ("std", "mean"))
    torch.testing.assert_close(torch.from_numpy(padded[:20, :20]), image.permute(1, 2, 0) * std + mean)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["missing.png"], "image missing.png does not exist"),
        (["--at", "0.5", "1"], r"must lie in [0, 1) of the height and the width, got (0.5, 1.0)"),
        (["--img-size", "0"], "option img_size must be greater than or equal to 1, not 0"),
        (["--checkpoint", "missing.pth"], "checkpoint missing.pth does not exist"),
    ],
)
def test_bad_input_writes_nothing(
    checkpoint: Path,
    pictures: list[Path],
    tmp_path: Path,
    extra: list[str],
    message: str,
    error: Callable[[Main, list], str],
) -> None:
    argv = [pictures[0], *extra, "--out", tmp_path / "looks"]
    assert message in error(visualize, argv if "--checkpoint" in extra else [*argv, "--checkpoint", checkpoint])
    assert not (tmp_path / "looks").exists()


def test_folder_that_cannot_be_written(
    checkpoint: Path, pictures: list[Path], tmp_path: Path, error: Callable[[Main, list], str]
) -> None:
    (tmp_path / "file").write_text("")
    argv = [pictures[0], "--checkpoint", checkpoint, "--out", tmp_path / "file"]
    assert "cannot write to" in error(visualize, argv)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_models_are_refused(pictures: list[Path], tmp_path: Path, error: Callable[[Main, list], str]) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    argv = [pictures[0], "--model", "test_vit", "--checkpoint", tmp_path / "vit.pth", "--out", tmp_path / "looks"]
    assert "a model with Bi-WKV layers is required, VisionTransformer has none" in error(visualize, argv)
    assert not (tmp_path / "looks").exists()
