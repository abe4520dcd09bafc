"""A network as one graph of torch's own operators that serves every batch and image size."""

import copy
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from vrwkv.ops import use_backend
from vrwkv.ops._bi_wkv.torch_impl import EXPORTED_DECAY
from vrwkv.runtime.errors import UserError, first_line


def trace(network: nn.Module, channels: int) -> ExportedProgram:
    """The program of a network from images ``(B, channels, H, W)`` to logits, in float32 on the CPU.

    Raises:
        UserError: the network does something that such a graph cannot hold, or its decays are too large.
    """
    _check_decays(network)
    network = copy.deepcopy(network).float().cpu().eval()
    # Sides and a batch that no part of the network could take for one of its own sizes, and tokens for several chunks.
    images = torch.zeros(2, channels, 250, 410)
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    # Oblivious: a size of 2 or more here may well be 1.
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    try:
        with torch.no_grad(), use_backend("torch"), oblivious, uncached():
            program = torch.export.export(network, (images,), dynamic_shapes=(sizes,))
    except Exception as error:  # of all kinds, from the depths of the tracer
        raise UserError(
            f"{type(network).__name__} cannot be exported for every image size: {first_line(error)}"
        ) from error
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    for graph in graphs:
        for node in graph.nodes:
            node.meta.pop("stack_trace", None)  # files are not to say where on this machine they were made
    return program


def uncached() -> AbstractContextManager[None]:
    """Tracing without a cache of operators: with sizes that are symbols it costs more than what it saves."""
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)


def _check_decays(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if name.endswith("spatial_decay") and (largest := float(parameter.detach().abs().max())) >= EXPORTED_DECAY:
            raise UserError(f"an exported graph needs decays below {EXPORTED_DECAY:.0f}, {name} has {largest:.0f}")
