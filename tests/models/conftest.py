from collections.abc import Iterator

import pytest
import torch

from vrwkv.ops import _extension, use_backend


@pytest.fixture(autouse=True)
def seed_and_one_thread() -> Iterator[None]:
    """Draw the same numbers in every test, and spend one thread on models that are too small for more."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with the compiled ops, then with the pure-torch ones."""
    if request.param == "native" and "cpu" not in _extension.NATIVE_DEVICES:
        pytest.skip("the compiled ops are not built")
    with use_backend("torch" if request.param == "torch" else "auto"):
        yield request.param
