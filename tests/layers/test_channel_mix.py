"""The channel mix: large images piece by piece, and what hooks inside see."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrwkv.layers import channel_mix
from vrwkv.ops import squared_relu


def test_inference_of_large_images_goes_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = timm.create_model("test_vrwkv").eval(), torch.randn(2, 3, 40, 56)
    wanted = model(images).detach()
    widths = []

    def square(x: Tensor, inplace: bool) -> Tensor:
        widths.append(x.shape[1])
        return squared_relu(x, inplace)

    monkeypatch.setattr(channel_mix, "squared_relu", square)
    monkeypatch.setattr(channel_mix, "PIECE", 5)
    with torch.no_grad():
        actual = model(images)
    assert widths == [5, 5, 2] * len(model.blocks)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("wrap", [None, nn.Sequential])
@pytest.mark.parametrize("site", ["module", "all modules"])
def test_hooks_see_hidden_values_whole_and_as_they_are(
    grad: bool, wrap: Any, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = timm.create_model("test_vrwkv").eval(), []
    key = model.blocks[0].ffn.key
    if wrap:
        model.blocks[0].ffn.key = wrap(key)
    if site == "module":
        handle = key.register_forward_hook(lambda *seen_by_hook: seen.append(seen_by_hook))
    else:
        handle = nn.modules.module.register_module_forward_hook(
            lambda *seen_by_hook: seen.append(seen_by_hook) if seen_by_hook[0] is key else None
        )
    monkeypatch.setattr(channel_mix, "PIECE", 5)
    with torch.set_grad_enabled(grad), handle:
        model(torch.randn(2, 3, 40, 56))
    ((_, (given,), hidden),) = seen
    assert hidden.shape[1] == 12 and hidden.min() < 0
    assert torch.equal(hidden, F.linear(given, key.weight))
