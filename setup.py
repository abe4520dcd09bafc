"""The compiled kernels; everything else about the package stands in setup.cfg.

Both libraries use LibTorch's stable ABI, so one wheel serves every Python >= 3.10 and torch >= 2.10. ``_C`` (schemas
and CPU kernels) is built where there is a C++ compiler, ``_cuda`` where nvcc and a CUDA build of torch are there too.
Without them the package runs on its pure-torch operators. Environment: ``VRWKV_NATIVE=0`` and ``VRWKV_CUDA=0`` leave
all kernels or those for CUDA out, ``=1`` insists on them; ``TORCH_CUDA_ARCH_LIST`` chooses the architectures.
"""

import os
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

if "CUDA_HOME" not in os.environ and Path("/usr/local/cuda/bin/nvcc").is_file():
    os.environ["CUDA_HOME"] = "/usr/local/cuda"  # torch would follow whatever `nvcc` comes first on PATH

import torch
from torch.utils import cpp_extension

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch adds that of CPython's limited API
OLD_GLIBC = ["-include", str(Path(__file__).resolve().parent / "vrwkv/ops/common/old_glibc.h")]
CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-fno-math-errno",
    "-g0",
    *STABLE_ABI,
    *OLD_GLIBC,
]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fvisibility=hidden", *STABLE_ABI, *OLD_GLIBC]


def wanted(name: str) -> str:
    """The environment variable ``name``: 0, 1 or auto."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def build_native() -> bool:
    """Whether to build kernels at all; an explicit VRWKV_NATIVE=1 that cannot be met is an error."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    possible = shutil.which(compiler) is not None
    if wanted("VRWKV_NATIVE") == "1" and not possible:
        raise SystemExit(f"VRWKV_NATIVE=1 needs a C++ compiler: install g++, or name one by CXX (now {compiler})")
    if wanted("VRWKV_NATIVE") == "auto" and not possible:
        print(f"vrwkv: no C++ compiler ({compiler}): installing the pure-torch operators", file=sys.stderr)
    return possible and wanted("VRWKV_NATIVE") != "0"


def build_cuda() -> bool:
    """Whether to build the CUDA kernels; an explicit VRWKV_CUDA=1 that cannot be met is an error."""
    home = cpp_extension.CUDA_HOME  # any folder, of machines that have CUDA's libraries alone too
    possible = torch.version.cuda is not None and home is not None and (Path(home) / "bin" / "nvcc").is_file()
    if wanted("VRWKV_CUDA") == "1" and not possible:
        raise SystemExit(
            f"VRWKV_CUDA=1 needs a CUDA build of torch (found {torch.__version__}) and nvcc "
            f"(CUDA_HOME is {home}): install them, or leave VRWKV_CUDA unset"
        )
    return possible and wanted("VRWKV_CUDA") != "0"


def architecture_flags() -> list[str]:
    """Flags of nvcc for every GPU from compute capability 7.5 on that it knows, as far as its binaries differ.

    A binary runs on later minor versions of its major one; 8.6 and 8.9 have other multiprocessors than 8.0 and get
    their own. Code for the newest, and for 9.0, is kept as PTX too, for GPUs to come and those in between.
    """
    nvcc = str(Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    numbers = [name.removeprefix("compute_") for name in listed]
    known = sorted(int(number) for number in numbers if number.isdigit() and int(number) >= 75)
    first = {number // 10: number for number in reversed(known)}  # of each major version
    built = [number for number in known if number in (*first.values(), 86, 89)]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in built]
    return flags + [f"-gencode=arch=compute_{n},code=compute_{n}" for n in built if n in (90, built[-1])]


extensions = []
if build_native():
    extensions.append(
        cpp_extension.CppExtension(
            "vrwkv._C",
            sorted(glob("vrwkv/ops/*/*.cpp")),
            depends=glob("vrwkv/ops/**/*.h", recursive=True),
            extra_compile_args={"cxx": CXX_FLAGS},
            py_limited_api=True,
        )
    )
elif wanted("VRWKV_CUDA") == "1":
    raise SystemExit("VRWKV_CUDA=1 needs the CPU kernels too: a C++ compiler, and VRWKV_NATIVE not 0")
if extensions and build_cuda():
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        NVCC_FLAGS += architecture_flags()  # torch then adds none
    extensions.append(
        cpp_extension.CUDAExtension(
            "vrwkv._cuda",
            [*sorted(glob("vrwkv/ops/*/*.cu")), "vrwkv/ops/common/old_libstdcxx.cpp"],
            depends=glob("vrwkv/ops/**/*.cuh", recursive=True) + glob("vrwkv/ops/**/*.h", recursive=True),
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
            py_limited_api=True,
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": cpp_extension.BuildExtension})
