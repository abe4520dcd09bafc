"""Builds the CUDA sources with g++ for the CPU, where emulate_cuda.h runs and checks them, and loads them as ops."""

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent / "cuda"
OPS = HERE.parent.parent / "vrwkv" / "ops"


class Emulated:
    """The ops of a library as attributes, on CPU tensors; outputs that a kernel leaves unwritten are NaN."""

    def __init__(self, library: Path, namespace: str):
        torch.ops.load_library(str(library))
        self._ops = getattr(torch.ops, namespace)
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_configure.argtypes = (ctypes.c_int64, ctypes.c_uint)
        self._library.emulation_largest_shared_bytes.restype = ctypes.c_int64

    def __getattr__(self, name: str):
        op = getattr(self._ops, name)

        def call(*arguments):
            filled = torch.utils.deterministic.fill_uninitialized_memory
            previous = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(True)  # with it, torch fills new tensors by NaN
            torch.utils.deterministic.fill_uninitialized_memory = True
            try:
                return op(*arguments)
            finally:
                torch.use_deterministic_algorithms(previous)
                torch.utils.deterministic.fill_uninitialized_memory = filled

        return call

    def configure(self, max_blocks: int = 1 << 20, seed: int = 0) -> None:
        """Limit the blocks of a launch and set the order of blocks and threads."""
        self._library.emulation_configure(max_blocks, seed)

    def largest_shared_bytes(self) -> int:
        """Shared memory of the largest launch since ``configure``."""
        return self._library.emulation_largest_shared_bytes()


def _flags(namespace: str, root: Path) -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return [
        *("g++", "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"),
        *(f"-DVRWKV_EMULATE_CUDA={namespace}", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *(f"-I{HERE}", f"-I{root}", f"-I{include}"),
    ]


def _libraries() -> list[str]:
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:4000]}")


def link(library: Path, namespace: str, source: Path, root: Path = OPS, *options: str) -> None:
    """Build ``library`` from one source whose includes lie under ``root``; it registers in ``namespace``."""
    flags = [*_flags(namespace, root), *options, "-shared"]
    _run([*flags, "-x", "c++", str(source), "-x", "none", "-o", str(library), *_libraries()])


def build(directory: Path, namespace: str) -> Path:
    """Build the package's kernels into a library in ``directory`` and return its path."""
    sources = [*sorted(OPS.glob("*/*.cu")), HERE / "emulate.cpp"]
    objects = [directory / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        _run([*_flags(namespace, OPS), "-x", "c++", "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    library = directory / f"{namespace}.so"
    _run(["g++", "-shared", *map(str, objects), "-o", str(library), *_libraries()])
    return library
