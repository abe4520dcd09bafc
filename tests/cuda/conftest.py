import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # not the package `cuda`, whose name NVIDIA's bindings have taken

from emulation import Emulated, build


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Emulated:
    """The CUDA kernels of the package, run on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("the emulated kernels need g++")
    namespace = "vrwkv_emulated"
    return Emulated(build(tmp_path_factory.mktemp("emulated"), namespace), namespace)
