"""The Python on the page about other RWKV models runs, and its two lines do what the compiled operator did."""

import re

import torch
from support.scripts import REPOSITORY

from vrwkv.ops._bi_wkv import reference


def test_operators_page() -> None:
    page = (REPOSITORY / "docs/other_rwkv_models.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    w, u = torch.randn(2, 5).unbind()
    k, v = torch.randn(2, 2, 7, 5).unbind()
    y = names["RUN_CUDA"](2, 7, 5, w / 7, u / 7, k, v)
    torch.testing.assert_close(y, reference.bi_wkv(w / 7, u / 7, k, v))
    assert names["y"].shape == (2, 24 * 32, 48)
