"""Activations that the backward pass computes again, where keeping them would cost more memory than it saves time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def recomputed(function: Callable[..., Any], *inputs: Tensor) -> Iterator[Any]:
    """``with recomputed(function, *inputs) as result:`` runs ops that keep ``inputs`` for the backward pass.

    For cheap functions whose inputs are kept anyway, in front of matrix products, which would keep the result too.
    Gradients and their bits are those of plain calls. Checkpoints and other saved-tensor hooks see the inputs but
    nothing else that the block keeps, so it should hold the products alone. ``torch.compile`` plans memory by itself.

    Args:
        function: from tensors to a tensor or a tuple of tensors; it must change nothing and return the same each time.
        inputs: what it is called with.
    """
    result = function(*inputs)
    # Nothing but tensors that autograd records has anything to keep; symbolic tracing is left alone with the rest.
    recorded = not torch.compiler.is_compiling() and torch.is_grad_enabled()
    if not (recorded and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)):
        yield result
        return
    recipe = _Recipe(function, inputs)
    outputs = (result,) if isinstance(result, Tensor) else result
    places = {output.untyped_storage().data_ptr(): place for place, output in enumerate(outputs) if output.numel()}

    def pack(tensor: Tensor) -> Any:
        place = places.get(tensor.untyped_storage().data_ptr())
        if place is None:
            return tensor
        return recipe, place, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        recipe, place, *view = packed
        return recipe.output(place).as_strided(*view)

    with saved_tensors_hooks(pack, unpack):
        yield result


class _Keep(torch.autograd.Function):
    """Keeps its inputs as any op does, in the node of its output."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(0)


class _Recipe:
    """How to make the outputs again."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        self.function = function
        self.node = _Keep.apply(*inputs).grad_fn
        device = inputs[0].device.type
        self.autocast: AbstractContextManager[Any] = nullcontext()
        if torch.amp.is_autocast_available(device):
            dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
            self.autocast = torch.autocast(device, dtype, enabled)
        self.outputs: dict[int, Tensor] = {}

    def output(self, place: int) -> Tensor:
        """Output number ``place``, once; all are computed when the first is asked for."""
        if place not in self.outputs:
            with self.autocast:
                result = self.function(*self.node.saved_tensors)
            self.outputs = dict(enumerate((result,) if isinstance(result, Tensor) else result))
        return self.outputs.pop(place)
