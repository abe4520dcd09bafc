"""The comparison of a network with what was exported of it."""

import copy

import pytest
import torch
from torch import nn

from vrwkv.export.report import compare
from vrwkv.export.subject import Subject
from vrwkv.runtime.facts import Facts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_models_in_training_are_compared_in_evaluation_and_stay_as_they_are(dtype):
    layers = (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*layers).to(dtype)
    model[1].eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    facts = Facts("classification", input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    rows = compare(Subject(model, facts), copy.deepcopy(model).float().eval())
    assert [row.difference for row in rows] == [0] * len(rows)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name])
