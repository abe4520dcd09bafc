"""What the benchmarks share: interleaved medians, peak memory, the machine's name, and CSV files."""

import csv
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: str) -> dict[str, Any]:
    """The columns that every row carries: processor, threads and versions."""
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        capability = torch.backends.cpu.get_cpu_capability()
        processor = f"{processor or platform.processor() or platform.machine()} ({capability})"
    return {"processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, as in any process that has once freed a large tensor.

    Before that it may return the memory of every layer to the system and take it again for the next one: 39 of 212 ms
    of a VRWKV-T forward at 8 x 224 px.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def interleaved_medians(
    functions: Mapping[str, Callable[[], Any]], device: str, seconds: float, least: int = 3
) -> dict[str, float]:
    """Median time of each function in seconds, from rounds that call each in turn.

    Interleaving lets a change of the machine's speed meet all functions alike. In each round a function that takes less
    than a second is called twice and the second call timed, so that what ran before does not decide which of its
    tensors lie in cache. There are at least ``least`` rounds, and as many as fit into ``seconds``, up to 100.
    """

    def call(function: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def timer(function: Callable[[], Any]) -> Callable[[], float]:
        is_short = call(function) < 1.0  # this call compiles, and allocates what stays

        def timed() -> float:
            if is_short:
                call(function)
            return call(function)

        return timed

    return _medians({name: timer(function) for name, function in functions.items()}, least, 100, seconds)


def device_medians(functions: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median time of each function on the current GPU in seconds, from rounds that call each in turn.

    Each is captured once in a CUDA graph, so that no time of the processor is counted, and timed by events. Before each
    call a buffer larger than any second-level cache is written: inputs come from memory, as in a network.
    """
    stream = torch.cuda.Stream()
    graphs = {}
    with torch.cuda.stream(stream):
        for name, function in functions.items():
            for _ in range(3):  # what is compiled or allocated once
                function()
            stream.synchronize()
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name], stream=stream):
                function()
        flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

        def timer(graph: torch.cuda.CUDAGraph) -> Callable[[], float]:
            def timed() -> float:
                flush.zero_()
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record(stream)
                graph.replay()
                last.record(stream)
                last.synchronize()
                return first.elapsed_time(last) * 1e-3

            return timed

        return _medians({name: timer(graph) for name, graph in graphs.items()}, 10, 1000, seconds)


def _medians(timers: Mapping[str, Callable[[], float]], least: int, most: int, seconds: float) -> dict[str, float]:
    """Of rounds that call each in turn: as many as fit into the seconds, from least to most."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    begin = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - begin > seconds:
            break
        for name, timed in timers.items():
            times[name].append(timed())
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    # Not ru_maxrss: on Linux a new process begins with its parent's.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


def peak_tensor_memory(function: Callable[[], Any]) -> int:
    """Largest sum of the tensors that torch has allocated on the CPU during a call, in bytes.

    Unlike the resident size it does not depend on the C library's allocator.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def write_rows(name: str, rows: list[dict[str, Any]], folder: Path) -> Path:
    """Write rows of one shape as ``<folder>/<name>.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
