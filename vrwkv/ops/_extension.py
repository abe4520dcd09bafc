"""Loads the compiled kernels and says which devices have one.

``vrwkv/_C.abi3.so`` holds the operator schemas and the CPU kernels, ``vrwkv/_cuda.abi3.so`` the CUDA kernels. Both are
optional: a device without a kernel takes the pure-torch implementation of each op. The environment variable
``VRWKV_BACKEND`` (``auto`` or ``torch``, read once at import) forces that path everywhere.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_BACKENDS = ("auto", "torch")


def _load() -> frozenset[str]:
    """Load what was built and return the device types that have native kernels."""
    backend = os.environ.get("VRWKV_BACKEND", "auto")
    if backend not in _BACKENDS:
        raise ValueError(f"VRWKV_BACKEND must be one of {', '.join(_BACKENDS)}, got {backend!r}")
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
        torch.ops.load_library(str(cuda))
        devices.add("cuda")
    return frozenset(devices)


NATIVE_DEVICES = _load()
"""Device types with native kernels; empty when the pure-torch path is forced or nothing was built."""


def is_native(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` lies on a device with native kernels."""
    return tensor.device.type in NATIVE_DEVICES


def call(
    name: str,
    torch_impl: Callable[..., Any],
    check: Callable[..., None],
    tensor: torch.Tensor,
    *arguments: Any,
) -> Any:
    """Run the op ``name`` on its arguments: by the kernel for the device of ``tensor``, else by ``torch_impl``.

    ``check`` raises what the public function promises. The kernels refuse bad arguments by themselves, in fewer words,
    and fake kernels by ``check``, so here it only has to run where one refused: ahead of each call it would take as
    long as a kernel for a small image.
    """
    if not is_native(tensor):
        check(*arguments)
        return torch_impl(*arguments)
    try:
        return getattr(torch.ops.vrwkv, name).default(*arguments)
    except RuntimeError as error:
        refusal = error
    try:  # not in the handler: the check's message is all that the caller should read
        check(*arguments)
        raise refusal
    finally:
        del refusal  # which would keep itself alive, and with it the arguments
