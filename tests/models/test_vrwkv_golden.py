"""The models return what the authors' definition returns for the same weights."""

import pytest
import timm
import torch
from support.golden import load_golden
from torch import Tensor

import vrwkv  # noqa: F401

NAMES = ["vrwkv_pre_norm", "vrwkv_post_norm", "vrwkv_key_norm", "vrwkv_mlp_head", "vrwkv6_pre_norm", "vrwkv6_post_norm"]
# fp64 sees what fp32 would forgive, such as another eps in a norm; the files themselves are rounded to fp32.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 2e-7}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert actual.shape == expected.shape
    assert error <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_golden(name: str, dtype: torch.dtype, backend: str) -> None:
    golden = load_golden(name)
    model = timm.create_model(golden.model, **golden.model_args).eval().to(dtype)
    model.load_state_dict(golden.weights)
    assert len(golden.cases) == {"vrwkv_mlp_head": 1, "vrwkv6_pre_norm": 2, "vrwkv6_post_norm": 2}.get(name, 3)
    for case in golden.cases:
        final, features = model.forward_intermediates(case.image.to(dtype))
        height, width = features[-1].shape[-2:]
        features[-1] = final.transpose(1, 2).unflatten(2, (height, width))
        for actual, expected in zip(features[-len(case.features) :], case.features, strict=True):
            assert_close(actual, expected, TOLERANCES[dtype])
        assert_close(model(case.image.to(dtype)), case.logits, TOLERANCES[dtype])
