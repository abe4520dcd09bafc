"""The example's model takes noise from a photograph it has not seen, and the script stops with a line on bad input."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.colours import picture
from support.scripts import Main, load_script

denoise = load_script("examples/denoise.py")


def test_gains_two_decibels() -> None:
    torch.set_num_threads(1)
    model = denoise.train(steps=150, batch_size=4)
    clean = denoise.photograph(denoise.HELD_OUT)[:, 100:228, 200:328]
    noisy = denoise.add_noise(clean, torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert denoise.psnr(model(noisy[None])[0], clean) > denoise.psnr(noisy, clean) + 2


def test_psnr() -> None:
    assert denoise.psnr(torch.full((3, 2, 2), 0.6), torch.full((3, 2, 2), 0.5)) == pytest.approx(20, abs=1e-4)


def test_script_writes_three_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture((200, 30, 30), seed=0).save(tmp_path / "red.png")
    out = tmp_path / "new" / "denoised"
    assert denoise.main([str(tmp_path / "red.png"), "--steps", "2", "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["denoised"]
    with Image.open(out) as written, Image.open(tmp_path / "red.png") as given:
        assert written.size == (60, 24)
        assert list(written.crop((40, 0, 60, 24)).getdata()) == list(given.getdata())
    assert "PSNR: noisy 2" in capsys.readouterr().out


def test_bad_input(tmp_path: Path, error: Callable[[Main, list], str]) -> None:
    out = tmp_path / "file" / "denoised.png"
    assert "image missing.png does not exist" in error(denoise.main, ["missing.png", "--out", out])
    assert "--steps must be at least 2, not 1" in error(denoise.main, ["--steps", "1", "--out", out])
    assert not out.parent.exists()
    (tmp_path / "file").write_text("")
    picture((200, 30, 30), seed=0).save(tmp_path / "red.png")
    assert "cannot write" in error(denoise.main, [tmp_path / "red.png", "--steps", "2", "--out", out])
