from collections.abc import Iterator

import pytest
import torch

from vrwkv.ops import _extension


@pytest.fixture(autouse=True)
def seed_and_one_thread() -> Iterator[None]:
    """Draw the same numbers in every test, and spend one thread on models that are too small for more."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the compiled ops, then with the pure-torch ones."""
    if request.param == "torch":
        monkeypatch.setattr(_extension, "NATIVE_DEVICES", frozenset())
    elif "cpu" not in _extension.NATIVE_DEVICES:
        pytest.skip("the compiled ops are not built")
    return request.param
