"""Activations that the backward pass computes again, where keeping them would cost more memory than it saves time.

An op keeps its inputs for the backward pass. Where they are results of a cheap function, hooks on what autograd saves
put a recipe in their place: which view of which result of the function's node. That node keeps what the function was
called with and nothing else. The backward pass calls the function again when it unpacks the first such view, and goes
back through that second call, so nothing that is computed on the way to the results is kept either.

A block of VRWKV or VRWKV6 keeps 15 tensors of the size of its tokens, (B, T, C).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from vrwkv.ops._extension import is_transformed


def recomputed(
    function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
) -> AbstractContextManager[tuple[Tensor, ...]]:
    """``with recomputed(function, *inputs) as result:`` runs ops that keep ``inputs`` in place of ``result``.

    For cheap functions in front of ops that would keep their results. Gradients and their bits are those of plain
    calls. Checkpoints and other saved-tensor hooks see the inputs and all else that the block keeps. ``torch.compile``
    plans memory by itself.

    Args:
        function: from tensors to a tuple of tensors that share no memory, with each other or with the inputs. It must
            change nothing and return the same each time, within autocast and outside, and get all that wants a gradient
            as arguments.
        inputs: what it is called with.
    """
    if not _recorded(inputs):
        return nullcontext(function(*inputs))
    return _keeping_recipe(_Recomputed.apply(function, *inputs))


@contextmanager
def _keeping_recipe(result: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Hand out ``result``, and let what is saved of it be a recipe."""
    node: Any = result[0].grad_fn
    anchor = torch.empty(0, requires_grad=True)
    places = {
        output.untyped_storage().data_ptr(): (place, output._version)
        for place, output in enumerate(result)
        if output.numel()
    }

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        place, version = places.get(tensor.untyped_storage().data_ptr(), (None, None))
        if place is not None and tensor._version == version:
            return partial(_output, node, place, tensor.size(), tensor.stride(), tensor.storage_offset())
        # As if there were no hooks of ours: outer ones see it, and autograd notices changes in place.
        hooks.__exit__()
        try:
            with torch.enable_grad():
                kept: Any = _Keep.apply(anchor, tensor.detach())  # with its history it would hold its own node
        finally:
            hooks.__enter__()
        return lambda: kept.grad_fn.saved_tensors[0]

    hooks: Any = saved_tensors_hooks(pack, lambda unpack: unpack())
    try:
        with hooks:
            yield result
    finally:
        hooks = None  # they and `pack` hold each other until the garbage collector comes


def _output(node: Any, place: int, *view: Any) -> Tensor:
    """A view of result number ``place`` of the function's node, once; the first that is asked for computes them all."""
    if node.again is None or place not in node.again.outputs:
        node.again = _Again(node.function, _saved(node), node.needs_input_grad[1:])
    return node.again.outputs.pop(place).as_strided(*view)


def _saved(node: Any) -> Sequence[Tensor]:
    """What the function's node keeps. A checkpoint hands it out once in a backward pass."""
    return node.saved_tensors if node.again is None else node.again.saved


def _recorded(inputs: tuple[Any, ...]) -> bool:
    """Whether autograd records what is done with the inputs; not for compilers, tracing and forward mode."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or is_transformed():
        return False
    return not torch.jit.is_tracing() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


class _Keep(torch.autograd.Function):
    """Keeps a tensor as any op does, in the node of its output."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.new_empty(0)


class _Recomputed(torch.autograd.Function):
    """Calls a function and keeps what it was called with."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.function = function
        ctx.save_for_backward(*inputs)
        ctx.again = None
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # gradients of the gradients are wanted
            again = _Again(ctx.function, _saved(ctx), needed, attached=True)
        else:
            again = ctx.again or _Again(ctx.function, _saved(ctx), needed)
        ctx.again = None
        return None, *again.gradients(grads)


class _Again:
    """A second call of a function: its results, and the way back through it, which outlives them.

    Args:
        function: what is called.
        inputs: its arguments.
        needed: which of them want gradients.
        attached: whether the way back goes on through what made the arguments.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        needed: Sequence[bool],
        attached: bool = False,
    ) -> None:
        self.saved = inputs
        if not attached:
            inputs = [x.detach().requires_grad_(wanted) for x, wanted in zip(inputs, needed, strict=True)]
        with torch.enable_grad():
            result = function(*inputs)
        self.wanted = [x if wanted else None for x, wanted in zip(inputs, needed, strict=True)]
        self.edges = [get_gradient_edge(y) if y.requires_grad else None for y in result]
        self.outputs = {place: y.detach() for place, y in enumerate(result)}

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the arguments, None for those that want none, from those of the results."""
        pairs = [(edge, grad) for edge, grad in zip(self.edges, grads, strict=True) if edge and grad is not None]
        if not pairs:
            return [None] * len(self.wanted)
        edges, given = zip(*pairs, strict=True)
        wanted = [x for x in self.wanted if x is not None]
        found = iter(torch.autograd.grad(edges, wanted, given, allow_unused=True, create_graph=torch.is_grad_enabled()))
        return [None if x is None else next(found) for x in self.wanted]
