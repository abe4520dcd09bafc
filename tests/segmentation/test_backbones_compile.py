"""One compiled backbone and one exported program serve pictures of every size."""

import pytest
import torch
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.export import Dim

import vrwkv.segmentation  # noqa: F401

SIZES = [(2, 96, 160), (3, 64, 96), (2, 70, 33), (4, 96, 64)]
KINDS = {
    "VRWKV": {},
    "VRWKVAdapter": dict(
        conv_inplane=4,
        deform_num_heads=3,
        interaction_indexes=[[0, 0], [1, 1], [2, 2], [3, 3]],
        model_args={"depth": 4},
    ),
    "VRWKVDetail": dict(detail_width=4),
}


@pytest.fixture(params=KINDS)
def backbone(request: pytest.FixtureRequest) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    options = KINDS[request.param]
    model_args = dict(embed_dim=24, depth=1) | options.get("model_args", {})
    backbone = MODELS.build(dict(type=request.param, model="test_vrwkv") | options | dict(model_args=model_args))
    nn.init.normal_(backbone.vrwkv.pos_embed)
    return backbone


@pytest.mark.parametrize("backbone", ["VRWKV", "VRWKVDetail"], indirect=True)  # the adapter would take minutes
def test_compiled_training_step(backbone: nn.Module) -> None:
    compiled = torch.compile(backbone, fullgraph=True, dynamic=True, backend="aot_eager")
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]

    def gradients(function: nn.Module, images: Tensor) -> list[Tensor]:
        loss = sum(y.square().mean() for y in function(images))
        return [x for x in torch.autograd.grad(loss, parameters, allow_unused=True) if x is not None]

    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for batch, height, width in SIZES:
            images = torch.randn(batch, 3, height, width)
            actual, expected = gradients(compiled, images), gradients(backbone, images)
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_exported_program(backbone: nn.Module) -> None:
    backbone.eval()
    dynamic = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    program = torch.export.export(backbone, (torch.randn(2, 3, 70, 100),), dynamic_shapes=dynamic).module()
    for batch, height, width in [*SIZES, (1, 64, 96)]:
        images = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(program(images), backbone(images))
