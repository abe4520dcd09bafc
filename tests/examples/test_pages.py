"""What the pages say holds: their Python runs, and the tests and files that they name are there."""

import re

import torch
from support.pages import run_python
from support.scripts import REPOSITORY

from vrwkv.ops._bi_wkv import reference


def run_page(name: str) -> dict:
    """The names that the Python on a page of ours leaves behind."""
    return run_python((REPOSITORY / f"docs/{name}.md").read_text(), {})


def test_operators_page() -> None:
    names = run_page("other_rwkv_models")
    w, u = torch.randn(2, 5).unbind()
    k, v = torch.randn(2, 2, 7, 5).unbind()
    y = names["RUN_CUDA"](2, 7, 5, w / 7, u / 7, k, v)
    torch.testing.assert_close(y, reference.bi_wkv(w / 7, u / 7, k, v))
    assert names["y"].shape == (2, 24 * 32, 48)


def test_operators() -> None:
    names = run_page("operators")
    assert names["z"].shape == (2, 24 * 32, 192)


def test_promises_name_tests_that_exist() -> None:
    page = (REPOSITORY / "docs/promises.md").read_text()
    file, named = None, 0
    for path, test in re.findall(r"`(tests/[a-z_/]+\.py)?(?:::(test_\w+))?`", page):
        file = path or file
        if test:
            assert f"def {test}(" in (REPOSITORY / file).read_text(), f"{file}::{test}"
        named += bool(path or test)
    assert named > 40


def test_links_lead_somewhere() -> None:
    for page in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("vrwkv/ops/*/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
