"""The page, clicked through in a headless browser: it shows what is in pictures, and says what is wrong with others."""

import io
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.colours import CLASSES, half_and_half, picture
from support.scripts import REPOSITORY

from vrwkv.segmentation import load_segmentor

playwright = pytest.importorskip("playwright.sync_api")
Page, expect = playwright.Page, playwright.expect

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if BROWSER is None:
    pytest.skip("needs Chromium", allow_module_level=True)

RESULTS = {"Classify": "#classes h2", "Segment": "#overlay img"}
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


@pytest.fixture(scope="module")
def address(classifier_path: Path, segmentor_paths: tuple[Path, Path], tmp_path_factory) -> Iterator[str]:
    """Of a page served by tools/app.py."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config, checkpoint = segmentor_paths
    log = tmp_path_factory.mktemp("app") / "log"
    argv = ["--checkpoint", classifier_path, "--config", config, "--seg-checkpoint", checkpoint, "--port", port,
            "--max-megapixels", "0.5", "--max-megabytes", "1", "--device", "cpu"]  # fmt: skip
    with open(log, "w") as err:
        process = subprocess.Popen(
            [sys.executable, REPOSITORY / "tools/app.py", *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )
    try:
        said = process.stdout.readline().strip()
        assert said == f"http://127.0.0.1:{port}", log.read_text()
        yield said
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        page.goto(address)
        yield page
        browser.close()


@pytest.fixture
def drop(page: Page, tmp_path: Path) -> Callable[[str, bytes | Image.Image], None]:
    """Opens a tab and gives it a file of a name, in place of the one that is there."""

    def call(tab: str, name: str, content: bytes | Image.Image) -> None:
        if isinstance(content, Image.Image):
            content.save(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
        page.get_by_role("tab", name=tab).click()
        panel = page.get_by_role("tabpanel").filter(visible=True)
        expect(panel.locator(f"#{tab.lower()}-picture")).to_be_visible()
        if panel.get_by_label("Remove Image").count():
            panel.get_by_label("Remove Image").click()
            expect(page.locator(RESULTS[tab])).to_have_count(0)
        panel.locator("input[type=file]").set_input_files(tmp_path / name)

    return call


def test_classes(page: Page, drop) -> None:
    for name, colour in CLASSES.items():
        drop("Classify", f"picture of {name}.png", picture(colour, seed=100))
        expect(page.locator("#classes h2")).to_have_text(name)
        rows = page.locator("#classes").get_by_role("button")
        assert rows.count() == 3
        assert float(re.search(r"(\d+)%", rows.first.inner_text()).group(1)) > 90
        expect(page.locator("#votes img")).to_be_visible()


@pytest.mark.parametrize("tab", ["Classify", "Segment"])
def test_bad_files_are_messages(page: Page, drop, tab: str) -> None:
    drop(tab, "broken.png", b"\x89PNG, but no more than that")
    panel = page.get_by_role("tabpanel").filter(visible=True)
    expect(panel.get_by_role("alert")).to_have_text(re.compile("^cannot read image broken.png: cannot identify"))
    drop(tab, "wide.png", Image.new("RGB", (1001, 500)))
    expect(panel.get_by_role("alert")).to_have_text(
        "image wide.png has 1001 x 500 pixels, 0.5005 million: at most 0.5 million are taken here"
    )
    assert page.locator(RESULTS[tab]).count() == 0
    drop(tab, "good.png", half_and_half("red", "blue"))
    expect(page.locator(RESULTS[tab])).to_be_visible()
    assert panel.get_by_role("alert").count() == 0


def test_large_files_are_not_taken(page: Page, drop) -> None:
    drop("Classify", "heavy.bmp", Image.new("RGB", (700, 500)))
    expect(page.get_by_test_id("toast-body")).to_contain_text('exceed the maximum allowed size of 1.0 Mb: "heavy.bmp"')
    page.get_by_test_id("toast-close").click()


def shown(page: Page) -> np.ndarray:
    """What the overlay shows, (H, W, 3)."""
    with urllib.request.urlopen(page.locator("#overlay img").get_attribute("src")) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"), np.float32)


def test_segments(page: Page, drop, segmentor_paths: tuple[Path, Path], tmp_path: Path) -> None:
    meta = load_segmentor(*segmentor_paths).dataset_meta
    sample = half_and_half("red", "blue", seed=100)
    truth = np.full((64, 96), 1 + list(CLASSES).index("blue"))
    truth[:, :32] = 1 + list(CLASSES).index("red")
    drop("Segment", "sample.png", sample)

    rows = page.locator("#shares tr")
    expect(rows.first).to_contain_text(re.compile(r"6\d\.\d %"))
    texts = [row.inner_text().split() for row in rows.all()]
    shares = {name: float(share) for name, share, _ in texts}
    blue, red = (meta["classes"][1 + list(CLASSES).index(name)] for name in ("blue", "red"))
    assert shares[blue] == pytest.approx(200 / 3, abs=3)
    assert shares[red] == pytest.approx(100 / 3, abs=3)

    with page.expect_download() as download:
        page.locator("#mask").click()
    assert download.value.suggested_filename == "mask.png"
    mask = np.asarray(Image.open(download.value.path()))
    assert mask.shape == (64, 96)
    assert (mask == truth).mean() > 0.97

    for opacity, expected in (("0", np.asarray(sample)), ("1", np.array(meta["palette"])[mask])):
        before = page.locator("#overlay img").get_attribute("src")
        page.get_by_label("number input for opacity of the colours").fill(opacity)
        page.get_by_label("number input for opacity of the colours").blur()
        expect(page.locator("#overlay img")).not_to_have_attribute("src", before)
        overlay = shown(page)  # four times as large
        means = overlay.reshape(64, 4, 96, 4, 3).mean((1, 3))
        assert np.abs(means - expected)[:, [*range(28), *range(36, 96)]].mean() < 6
