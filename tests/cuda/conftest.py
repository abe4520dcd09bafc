import shutil

import pytest
from support.emulation import Emulated, build


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Emulated:
    """The CUDA kernels of the package, run on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("the emulated kernels need g++")
    namespace = "vrwkv_emulated"
    return Emulated(build(tmp_path_factory.mktemp("emulated"), namespace), namespace)
