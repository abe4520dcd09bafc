"""Every op test runs on each backend (compiled kernel, pure torch) and device (CPU, CUDA where there is one)."""

from collections.abc import Iterator

import pytest
import torch

from vrwkv.ops import _extension, use_backend

CASES = [
    pytest.param(("native", "cpu"), id="native-cpu"),
    pytest.param(("torch", "cpu"), id="torch-cpu"),
    pytest.param(("native", "cuda"), id="native-cuda", marks=pytest.mark.cuda),
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.cuda),
]


@pytest.fixture(params=CASES)
def device(request) -> Iterator[torch.device]:
    """The device to test on, with the backend chosen for it."""
    backend, name = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if backend == "native" and name not in _extension.NATIVE_DEVICES:
        pytest.fail(f"the compiled kernels for {name} are missing")
    with use_backend("torch" if backend == "torch" else "auto"):
        yield torch.device(name)


@pytest.fixture
def native(device):
    """The device, for tests of what only the compiled ops have."""
    if not _extension.is_native(torch.empty(0, device=device)):
        pytest.skip("the pure-torch path is no registered op")
    return device
