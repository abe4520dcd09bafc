"""Loads the compiled kernels and chooses between them and the pure-torch ops.

``vrwkv/_C.abi3.so`` holds the operator schemas and the CPU kernels, ``vrwkv/_cuda.abi3.so`` the CUDA kernels. Both are
optional: a device without a kernel takes the pure-torch implementation of each op.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

_PACKAGE = Path(__file__).resolve().parent.parent
_BACKENDS = ("auto", "torch")


def _check_backend(name: str, backend: str) -> None:
    if backend not in _BACKENDS:
        raise ValueError(f"{name} must be one of {', '.join(_BACKENDS)}, got {backend!r}")


def _load(backend: str) -> frozenset[str]:
    """Load what was built, if ``backend`` has a use for it, and return the device types that have native kernels."""
    if backend == "torch":
        return frozenset()
    cpu = _PACKAGE / "_C.abi3.so"
    if not cpu.is_file():
        warnings.warn(
            "vrwkv runs on its pure-torch ops, because the compiled ones are missing: "
            "build them with `pip install . --no-build-isolation` in a checkout of vrwkv (needs g++)",
            stacklevel=2,
        )
        return frozenset()
    torch.ops.load_library(str(cpu))
    devices = {"cpu", "meta"}
    cuda = _PACKAGE / "_cuda.abi3.so"
    if torch.version.cuda and cuda.is_file():
        try:
            torch.ops.load_library(str(cuda))
            devices.add("cuda")
        except OSError as error:
            warnings.warn(
                f"vrwkv runs on its pure-torch ops on CUDA, because the compiled ones cannot be loaded beside torch "
                f"{torch.__version__} for CUDA {torch.version.cuda} ({error.__cause__ or error}): take a torch for the "
                "major version of CUDA that is missing, or build them with `pip install . --no-build-isolation` in a "
                "checkout of vrwkv (needs that torch's nvcc)",
                stacklevel=2,
            )
    return frozenset(devices)


_backend = os.environ.get("VRWKV_BACKEND", "auto")
_check_backend("VRWKV_BACKEND", _backend)

NATIVE_DEVICES = _load(_backend)
"""Device types whose kernels are loaded; empty where nothing was built and under ``VRWKV_BACKEND=torch``."""


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Choose the implementation of all ops of this package inside a ``with`` block.

    .. code-block:: python

        with vrwkv.ops.use_backend("torch"):
            reference = model.double()(images)

    The choice holds for the whole process, as those of ``torch.backends`` do: for every thread, and for what autograd
    recomputes meanwhile. The environment variable ``VRWKV_BACKEND`` sets what holds outside of any block; with
    ``VRWKV_BACKEND=torch`` the compiled kernels are not even loaded, and ``auto`` finds none. A function compiled by
    ``torch.compile`` is compiled once for each backend that it is called under; what ``torch.export`` and
    ``torch.jit.trace`` have written down stays as it is.

    Args:
        backend: ``auto``, the native kernels of the tensors' device, pure torch where there are none; or ``torch``,
            pure torch everywhere.

    Raises:
        ValueError: there is no such backend.
    """
    global _backend
    _check_backend("backend", backend)
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


def is_native(tensor: torch.Tensor) -> bool:
    """Whether the ops run native kernels on ``tensor``.

    The kernels know no forward mode and no transforms of ``torch.func``, which would take them for constant.
    """
    return _backend == "auto" and tensor.device.type in NATIVE_DEVICES and not is_transformed()


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward mode is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def call(
    name: str,
    torch_impl: Callable[..., Any],
    check: Callable[..., None],
    tensor: torch.Tensor,
    *arguments: Any,
) -> Any:
    """Run the op ``name`` on its arguments: by the kernel for the device of ``tensor``, else by ``torch_impl``.

    The kernels check their arguments themselves: ahead of each call ``check``, which says the same in Python, would
    take as long as a kernel for a small image.
    """
    if is_native(tensor):
        return getattr(torch.ops.vrwkv, name).default(*arguments)
    check(*arguments)
    return torch_impl(*arguments)


def register_autograd(name: str, torch_impl: Callable[..., torch.Tensor]) -> None:
    """Let the op ``_<name>_backward(grad, *inputs)`` be the backward pass of ``<name>(*inputs)``, all of them tensors.

    Where its kernel cannot serve, gradients are those of ``torch_impl``.
    """
    backward_op = getattr(torch.ops.vrwkv, f"_{name}_backward").default

    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if has_native_backward(grad):
            return backward_op(grad, *ctx.saved_tensors)
        return differentiable_gradients(torch_impl, ctx.saved_tensors, grad)

    torch.library.register_autograd(f"vrwkv::{name}", backward, setup_context=setup_context)


def has_native_backward(*grads: torch.Tensor) -> bool:
    """Whether kernels may compute a backward pass for ``grads``.

    They may not with ``create_graph``, in forward mode, under ``torch.func`` and with ``is_grads_batched``.
    """
    if torch.is_grad_enabled() or is_transformed():
        return False
    return not any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)


def differentiable_gradients(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], grads: Any
) -> tuple[Any, ...]:
    """Gradients of ``function`` in ``inputs``, None where none is needed, by torch ops alone."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [x.view_as(x) for x in inputs]  # one tensor may be given twice
        needed = [x for x in inputs if x.requires_grad]
        outputs = function(*inputs)
    found = iter(torch.autograd.grad(outputs, needed, grads, create_graph=create_graph, materialize_grads=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)
