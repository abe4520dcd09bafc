"""Activations that the backward pass computes again, where keeping them would cost more memory than it saves time.

A matrix product keeps its input for the backward pass. Where that is the result of a cheap function, hooks on what
autograd saves put a recipe in its place: the function, its inputs, which view of which result is meant. The backward
pass calls the function again when it unpacks the first such view. The inputs stay in a node of autograd, so that
checkpoints see them and in-place changes are found. A block of VRWKV keeps 15 tensors of the size of its tokens,
(B, T, C), instead of 20, and shifts them once more for each mix.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputed(
    function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
) -> AbstractContextManager[tuple[Tensor, ...]]:
    """``with recomputed(function, *inputs) as result:`` runs ops that keep ``inputs`` for the backward pass.

    For cheap functions whose inputs are kept anyway, in front of matrix products, which would keep the result too.
    Gradients and their bits are those of plain calls. Checkpoints and other saved-tensor hooks see the inputs but
    nothing else that the block keeps, so it should hold the products alone. ``torch.compile`` plans memory by itself.

    Args:
        function: from tensors to a tuple of tensors; it must change nothing and return the same each time.
        inputs: what it is called with.
    """
    result = function(*inputs)
    return _keeping_recipe(function, inputs, result) if _recorded(inputs) else nullcontext(result)


@contextmanager
def _keeping_recipe(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], result: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, ...]]:
    """Hand out ``result``, and let what is saved of it be a recipe."""
    recipe = _Recipe(function, inputs)
    places = {
        output.untyped_storage().data_ptr(): (place, output._version)
        for place, output in enumerate(result)
        if output.numel()
    }

    def pack(tensor: Tensor) -> Any:
        place, version = places.get(tensor.untyped_storage().data_ptr(), (None, None))
        if place is None or tensor._version != version:
            return tensor, tensor._version
        return recipe, place, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed[0], _Recipe):
            recipe, place, *view = packed
            return recipe.output(place).as_strided(*view)
        tensor, version = packed
        if tensor._version != version:  # autograd's own check, which hooks switch off
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {tuple(tensor.shape)} is at version {tensor._version}; expected version {version}"
            )
        return tensor

    with saved_tensors_hooks(pack, unpack):
        yield result


def _recorded(inputs: tuple[Any, ...]) -> bool:
    """Whether autograd records what is done with the inputs; not for compilers, tracing and ``torch.func``."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    return any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


class _Keep(torch.autograd.Function):
    """Keeps its inputs as any op does, in the node of its output."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(0)


class _Recipe:
    """How to make the outputs again."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> None:
        self.function = function
        self.keeper = _Keep.apply(*inputs)
        self.outputs: dict[int, Tensor] = {}

    def output(self, place: int) -> Tensor:
        """Output number ``place``, once; all are computed when the first is asked for."""
        if place not in self.outputs:
            self.outputs = dict(enumerate(self.function(*self.keeper.grad_fn.saved_tensors)))
        return self.outputs.pop(place)
