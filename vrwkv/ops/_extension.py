"""Loads the compiled kernels and says which devices have one.

``vrwkv/_C.abi3.so`` holds the operator schemas and the CPU kernels, ``vrwkv/_cuda.abi3.so`` the CUDA kernels. Both are
optional: a device without a kernel takes the pure-torch implementation of each op. The environment variable
``VRWKV_BACKEND`` (``auto`` or ``torch``, read once at import) forces that path everywhere.
"""

import os
import warnings
from pathlib import Path

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
