"""Compiles the CUDA kernels and prints what each takes: registers, shared memory, spills, occupancy.

    python tools/cuda_report.py                       # every architecture of a release build
    python tools/cuda_report.py --arch 8.0 9.0
    python tools/cuda_report.py --roofline            # instructions and bytes of every call, and what they take at best

Needs nvcc and torch, no GPU; for the roofline nvdisasm, too. Exits with 1 if a kernel spills registers.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

OPS = Path(__file__).resolve().parent.parent / "vrwkv" / "ops"
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "11.0", "12.0")
ELEMENT_BYTES = {"half": 2, "bfloat16": 2, "float": 4, "double": 8}


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA programming guide, compute capabilities)."""

    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int = 1024  # of shared memory, for each block
    registers: int = 65536


MULTIPROCESSORS = {
    "7.5": Multiprocessor(32, 16, 64 * 1024, reserved_bytes=0),
    "8.0": Multiprocessor(64, 32, 164 * 1024),
    "8.6": Multiprocessor(48, 16, 100 * 1024),
    "8.9": Multiprocessor(48, 24, 100 * 1024),
    "9.0": Multiprocessor(64, 32, 228 * 1024),
    "10.0": Multiprocessor(64, 32, 228 * 1024),
    "11.0": Multiprocessor(48, 24, 228 * 1024),
    "12.0": Multiprocessor(48, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture; ``shared_bytes`` and ``threads`` are those of its largest launch."""

    name: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    threads: int
    shared_bytes: int

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's warps that are resident at once in the largest launch."""
        limits = MULTIPROCESSORS[self.arch]
        warps = -(-self.threads // 32)
        registers = -(-self.registers * 32 // 256) * 256 * warps  # given out to warps by 256
        shared = self.shared_bytes + limits.reserved_bytes
        by_shared = limits.shared_bytes // shared if shared else limits.blocks
        blocks = min(limits.registers // registers, by_shared, limits.warps // warps, limits.blocks)
        return blocks * warps / limits.warps


def largest_shared_bytes(name: str) -> int:
    """Dynamic shared memory of a kernel's largest launch, which ptxas does not know.

    The emulated kernels are asked in tests/cuda whether this holds.
    """
    kernel, _, arguments = name.partition("<")
    size = ELEMENT_BYTES.get(re.split("[,>]", arguments)[0], 0)
    accumulate = max(size, 4)
    if kernel in ("sum_tiles_kernel", "forward_kernel", "sum_ab_kernel", "backward_kernel"):
        kinds = 2 if kernel in ("sum_ab_kernel", "backward_kernel") else 1
        channels, length = (8, 8) if size == 8 else (16, 16)
        return channels * accumulate * (length + 4 + 16 + 4 + kinds * 2 * 4 * 16)
    tokens = 32 if size == 8 else 64
    if kernel == "chunk_states_kernel":
        return (tokens * (2 * 40 + 72) + 256) * accumulate
    if kernel == "outputs_kernel":
        return max(2 * tokens * 36 + 256, tokens * (tokens + 5 + 72)) * accumulate
    if kernel == "gradients_kernel":
        return (2 * tokens * 36 + tokens * (tokens + 4) + 5 * 256 + 32) * accumulate
    if kernel == "scan_tiles_kernel":
        return 2 * 512 * 4 * accumulate
    if kernel == "reduce_rows_kernel":
        return 1024 * 8
    if kernel == "mix_backward_kernel":
        return 256 * int(arguments.rstrip(">").split(",")[1]) * accumulate
    return 0


def find_nvcc() -> str | None:
    """The path of nvcc: in ``CUDA_HOME``, in /usr/local/cuda, or on ``PATH``."""
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{(result.stdout + result.stderr)[:4000]}")
    return result.stdout + result.stderr


def _short_name(symbol: str) -> str:
    """``forward_kernel<half>`` for a mangled kernel of the package."""
    name = _run(["c++filt", symbol])
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w+::|vrwkv::|c10::", "", name).removeprefix("void ")
    kernel, _, arguments = name.strip().partition("<")
    kept = [part.strip().removeprefix("(int)") for part in arguments.split(">(")[0].split(",")]
    kept = [{"Half": "half", "BFloat16": "bfloat16"}.get(part, part) for part in kept]
    if kept[0] in ELEMENT_BYTES and kept[-1] in ("float", "double"):
        kept = kept[: max(1, len(kept) - 1)]  # the accumulator's type follows from the first argument
    return f"{kernel}<{','.join(kept)}>"


def _options() -> list[str]:
    import torch

    include = Path(torch.__file__).parent / "include"
    return ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{include}"]


def compile_kernels(nvcc: str, source: Path, arch: str) -> list[Kernel]:
    """Compile one source file for one architecture, such as "8.0"."""
    number = arch.replace(".", "")
    options = _options()
    with tempfile.TemporaryDirectory() as directory:
        ptx = Path(directory) / "kernels.ptx"
        _run([nvcc, *options, "-ptx", f"-arch=compute_{number}", str(source), "-o", str(ptx)])
        ptxas = str(Path(nvcc).parent / "ptxas")
        log = _run([ptxas, "-v", f"-arch=sm_{number}", str(ptx), "-o", str(Path(directory) / "kernels.cubin")])
        threads = dict(re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx.read_text()))
    kernels = []
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for symbol, stack, stores, loads, registers in re.findall(pattern, log, flags=re.DOTALL):
        name = _short_name(symbol)
        kernels.append(
            Kernel(name, arch, int(registers), int(stack), int(stores) + int(loads), int(threads[symbol]),
                   largest_shared_bytes(name))
        )  # fmt: skip
    return kernels


def report(nvcc: str, architectures: tuple[str, ...] = ARCHITECTURES) -> list[Kernel]:
    """Compile every kernel of the package for each architecture, two at a time."""
    jobs = [(source, arch) for source in sorted(OPS.glob("*/*.cu")) for arch in architectures]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: compile_kernels(nvcc, *job), jobs)
    unique = {(kernel.name, kernel.arch): kernel for kernels in results for kernel in kernels}
    return [unique[key] for key in sorted(unique)]


def find_nvdisasm(nvcc: str) -> str | None:
    """The path of nvdisasm: beside nvcc, from the package nvidia-cuda-nvdisasm, or on ``PATH``."""
    places = [Path(nvcc).parent, *(Path(place) / "nvidia" / "cu13" / "bin" for place in sys.path)]
    found = [place / "nvdisasm" for place in places if (place / "nvdisasm").is_file()]
    return str(found[0]) if found else shutil.which("nvdisasm")


def roofline(nvcc: str, nvdisasm: str) -> str:
    """The table of ``cuda_roofline`` for its devices' architectures."""
    import cuda_roofline

    def compiled(source: Path, arch: str) -> dict[str, cuda_roofline.Function]:
        with tempfile.TemporaryDirectory() as directory:
            cubin = Path(directory) / "kernels.cubin"
            number = arch.replace(".", "")
            _run([nvcc, *_options(), "-lineinfo", "-cubin", f"-arch=sm_{number}", str(source), "-o", str(cubin)])
            return cuda_roofline.disassemble(nvdisasm, cubin)

    architectures = sorted({device.arch for device in cuda_roofline.DEVICES})
    jobs = [(source, arch) for source in sorted(OPS.glob("*/*.cu")) for arch in architectures]
    kernels: dict[str, dict[str, cuda_roofline.Function]] = {arch: {} for arch in architectures}
    with ThreadPoolExecutor(2) as pool:
        for (_, arch), functions in zip(jobs, pool.map(lambda job: compiled(*job), jobs), strict=True):
            kernels[arch] |= {_short_name(symbol): function for symbol, function in functions.items()}
    return cuda_roofline.table(kernels)


def table(kernels: list[Kernel]) -> str:
    """The kernels as a Markdown table, a column for each architecture: registers, occupancy."""
    architectures = [arch for arch in ARCHITECTURES if any(kernel.arch == arch for kernel in kernels)]
    rows = {}
    for kernel in kernels:
        rows.setdefault(kernel.name, {})[kernel.arch] = kernel
    lines = [
        f"| kernel | threads | shared memory | stack | spills | {' | '.join(f'sm_{a}' for a in architectures)} |",
        "|---|---|---|---|---|" + "---|" * len(architectures),
    ]
    for name, by_arch in rows.items():
        some = next(iter(by_arch.values()))
        cells = [f"{by_arch[a].registers}, {by_arch[a].occupancy:.0%}" if a in by_arch else "" for a in architectures]
        stack = max(kernel.stack_bytes for kernel in by_arch.values())
        spills = max(kernel.spill_bytes for kernel in by_arch.values())
        lines.append(f"| `{name}` | {some.threads} | {some.shared_bytes} | {stack} | {spills} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES, metavar="ARCH",
                        help=f"compute capabilities, of {', '.join(ARCHITECTURES)}")  # fmt: skip
    parser.add_argument("--roofline", action="store_true", help="count the instructions of every call instead")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_report: nvcc was not found; install the CUDA toolkit or set CUDA_HOME", file=sys.stderr)
        return 2
    nvdisasm = find_nvdisasm(nvcc)
    if arguments.roofline and nvdisasm is None:
        print("cuda_report: nvdisasm was not found; pip install nvidia-cuda-nvdisasm", file=sys.stderr)
        return 2
    try:
        if arguments.roofline:
            print(roofline(nvcc, str(nvdisasm)))
            return 0
        kernels = report(nvcc, tuple(arguments.arch))
    except RuntimeError as error:
        print(f"cuda_report: {error}", file=sys.stderr)
        return 2
    print("Registers of a thread and theoretical occupancy of the largest launch; bytes otherwise.\n")
    print(table(kernels))
    return 1 if any(kernel.spill_bytes for kernel in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
