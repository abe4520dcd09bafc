"""Counts the instructions of compiled CUDA kernels; what `cuda_report.py --roofline` prints.

A kernel is disassembled with the source lines of its instructions. Comments in the source say how often a block of it
runs in a thread on the fast path:

    for (...) {  // count: segments - 1, unrolled 4
    } else {  // count: 0

with the names of the call's sizes. What is inlined from there counts so often, too; of a loop that the compiler has
unrolled, with a rest that follows it, a copy of its body counts. A comment on the line before a call gives sizes of the
function called:

    // with: depth = 64, copies = 2

Files with `_safe` in their name are not on that path.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Frame = tuple[str, int]  # a source file and a line in it


@dataclass(frozen=True)
class Instruction:
    """One instruction: its number in the kernel, and the line that it comes from with those that it is inlined at."""

    index: int
    opcode: str
    frames: tuple[Frame, ...]


@dataclass
class Function:
    """A compiled kernel; ``loops`` are first and last instruction of each, from branches backwards."""

    instructions: list[Instruction] = field(default_factory=list)
    loops: list[tuple[int, int]] = field(default_factory=list)


def parse(listing: str) -> dict[str, Function]:
    """The functions in what ``nvdisasm -c -gi`` prints, by their symbols."""
    functions: dict[str, Function] = {}
    function, labels, frames, fresh, done, end = Function(), {}, (), True, False, 0
    for line in listing.splitlines():
        if match := re.match(r"\.text\.(\S+):", line):
            function, labels, frames, done, end = Function(), {}, (), False, 0
            functions[match[1]] = function
        elif match := re.match(r"(\.L\S+|\$\S+):", line):
            done = done or match[1].startswith("$")  # a routine behind the kernel, such as the slow part of a division
            labels[match[1]] = len(function.instructions)
        elif match := re.match(r'\s*//## File "(.*?)", line (\d+)', line):
            frames = (*(() if fresh else frames), (match[1], int(match[2])))
            fresh = False
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(\S+)(.*?);", line):
            predicate, opcode, operands = match.groups()
            fresh = True
            if done or opcode == "NOP":
                continue
            index = len(function.instructions)
            if opcode == "WARPSYNC.COLLECTIVE":  # behind the kernel: shuffles where lanes have parted
                del function.instructions[end:]
                function.loops = [loop for loop in function.loops if loop[1] < end]
                done = True
                continue
            function.instructions.append(Instruction(index, opcode, frames))
            if opcode == "EXIT" and not predicate:
                end = index + 1
            target = re.search(r"`\((\S+)\)", operands)
            if opcode.startswith("BRA") and target and labels.get(target[1], index) < index:
                function.loops.append((labels[target[1]], index))
    return functions


@dataclass(frozen=True)
class Region:
    """The lines of a block from its opening, how often it runs, and into how many copies a loop is unrolled."""

    file: str
    first: int
    last: int
    times: str
    copies: str
    is_loop: bool

    def place(self, frames: tuple[Frame, ...]) -> int | None:
        """Which frame lies in the block; of a branch not in its condition, which always runs."""
        first = self.first if self.is_loop else self.first + 1
        for place, (file, line) in enumerate(frames):
            if file == self.file and first <= line <= self.last:
                return place
        return None

    def weight(self, function: Function, instruction: Instruction, sizes: Mapping[str, float]) -> float:
        """How often an instruction runs as far as this block decides."""
        place = self.place(instruction.frames)
        if place is None:
            return 1.0
        callers = instruction.frames[place + 1 :]
        sizes = dict(sizes) | {name: value for frame in reversed(callers) for name, value in given(*frame)}
        times = _evaluate(self.times, sizes)
        if not self.is_loop:
            return times
        copies = _evaluate(self.copies, sizes)
        loops = self._loops(function, callers)
        if not loops:
            return times / copies
        # The longest has the copies, and others like it where a loop around it is unrolled; shorter ones are the rest.
        longest = max(last - first for first, last in loops)
        bodies = [loop for loop in loops if copies == 1 or 5 * (loop[1] - loop[0]) >= 4 * longest]
        if any(first <= instruction.index <= last for first, last in bodies):
            return times / copies
        return float(instruction.frames[place][1] == self.first)  # what is done once before a loop

    def _loops(self, function: Function, callers: tuple[Frame, ...]) -> list[tuple[int, int]]:
        found = []
        for loop in function.loops:
            frames = function.instructions[loop[1]].frames
            place = self.place(frames)
            if place is not None and frames[place + 1 :] == callers:
                found.append(loop)
        return found


def _evaluate(expression: str, sizes: Mapping[str, float]) -> float:
    return float(eval(expression, {"__builtins__": {}}, dict(sizes)))


@cache
def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


@cache
def given(file: str, line: int) -> tuple[tuple[str, float], ...]:
    """The sizes that a ``// with:`` comment above a line gives."""
    lines = _lines(file)
    match = re.match(r"\s*// with: (.*)$", lines[line - 2]) if 2 <= line <= len(lines) else None
    pairs = [pair.split(" = ") for pair in match[1].split(", ")] if match else []
    return tuple((name, _evaluate(value, {})) for name, value in pairs)


@cache
def regions(file: str) -> tuple[Region, ...]:
    """The blocks of a source file that have a ``// count:`` comment."""
    lines = _lines(file)
    found = []
    for number, line in enumerate(lines):
        match = re.search(r"\{  // count: ([^,]+)(?:, unrolled (\w+))?$", line)
        if not match:
            continue
        depth, last = 1, number
        while depth > 0:
            last += 1
            code = lines[last].split("//")[0]
            depth += code.count("{") - code.count("}")
            if depth == 1 and code.strip().startswith("}") and "else" in code:
                break  # the block ends where its alternative begins
        found.append(Region(file, number + 1, last + 1, match[1], match[2] or "1", line.strip().startswith("for")))
    return tuple(found)


def _weight(function: Function, instruction: Instruction, sizes: Mapping[str, float]) -> float:
    files = {file for file, _ in instruction.frames}
    if any("_safe" in Path(file).name for file in files):
        return 0.0
    weight = 1.0
    for file in files:
        for region in regions(file):
            weight *= region.weight(function, instruction, sizes)
    return weight


def count(function: Function, sizes: Mapping[str, float]) -> Counter[str]:
    """Instructions that a thread executes, by opcode up to its first dot, for a call of these sizes."""
    totals: Counter[str] = Counter()
    for instruction in function.instructions:
        totals[instruction.opcode.split(".")[0]] += _weight(function, instruction, sizes)  # type: ignore[assignment]
    return totals


def disassemble(nvdisasm: str, cubin: Path) -> dict[str, Function]:
    result = subprocess.run([nvdisasm, "-c", "-gi", str(cubin)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{nvdisasm} {cubin}\n{result.stderr[:4000]}")
    return parse(result.stdout)


# ---- What a call launches, as the host functions cut it ----

SHAPES = ((128, 196, 192), (32, 196, 768), (8, 4096, 384), (1, 4096, 192), (1, 65536, 192))
DTYPES = {"float": 4, "bfloat16": 2}
MIXES = 3


@dataclass(frozen=True)
class Device:
    """Figures of the makers' data sheets: clock in GHz with boost, memory in TB/s."""

    name: str
    arch: str
    multiprocessors: int
    clock: float
    bandwidth: float


DEVICES = (
    Device("A100 80 GB", "8.0", 108, 1.41, 2.04),
    Device("H100 SXM", "9.0", 132, 1.98, 3.35),
    Device("H200", "9.0", 132, 1.98, 4.8),
    Device("RTX 4090", "8.9", 128, 2.52, 1.01),
)


@dataclass(frozen=True)
class Launch:
    """A kernel by the name that cuda_report gives it, and the sizes that its source's comments name."""

    kernel: str
    blocks: int
    threads: int
    sizes: dict[str, float]


@dataclass(frozen=True)
class Call:
    """``passes`` are times that a tensor of the call's shape crosses memory, beside ``workspace`` bytes; ``merges`` and
    ``waits`` the longest chains of merges and of loads that wait for those before them in their kernel."""

    op: str
    passes: int
    launches: list[Launch]
    merges: int = 0
    waits: int = 0
    workspace: int = 0


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _reduce(dtype: str, rows: int, columns: int, sums: int) -> Launch:
    return Launch(f"reduce_rows_kernel<{dtype}>", sums * _up(columns, 32), 1024, {"rows": rows})


def _reduce_waits(rows: int) -> int:
    return _up(rows, 32 * 8) - 1


def bi_wkv_calls(shape: tuple[int, int, int], dtype: str) -> list[Call]:
    batch, tokens, channels = shape
    segments = _up(tokens, 16)
    segments = _up(segments, _up(segments, 16))
    tiles = _up(_up(tokens, 16), segments)
    sizes = {"segments": segments, "tiles": tiles}
    length = 1 << (min(tiles, 256) - 1).bit_length()
    width = min(32, 512 // length)
    steps = (length - 1).bit_length()

    def cut(kernel: str) -> Launch:
        return Launch(f"{kernel}<{dtype}>", batch * tiles * _up(channels, 16), segments * 16, sizes)

    scan = Launch("scan_tiles_kernel<float>", 2 * batch * _up(tiles, length) * _up(channels, width), length * width,
                  {"steps": steps})  # fmt: skip
    before = [cut("sum_tiles_kernel"), scan] if tiles > 1 else []
    before_ab = [cut("sum_ab_kernel"), scan] if tiles > 1 else []
    last = [cut("backward_kernel"), _reduce("float", batch * tiles, channels, 2)]
    return [
        Call("bi_wkv", 5 if tiles > 1 else 3, [*before, cut("forward_kernel")], steps),
        Call(
            "bi_wkv backward", 10 if tiles > 1 else 5, [*before, *before_ab, *last], steps, _reduce_waits(batch * tiles)
        ),
    ]


def q_shift_calls(shape: tuple[int, int, int], dtype: str) -> list[Call]:
    batch, tokens, channels = shape
    widest = 16 // DTYPES[dtype]

    def cut(kernel: str, width: int, arguments: str = "") -> Launch:
        vectors = channels // width
        groups = _up(vectors, 32)
        lanes = _up(vectors, groups)
        rows = 256 // lanes
        run = rows * 16
        while run > rows and groups * _up(batch * tokens, run) < 296:
            run //= 2
        sizes = {"tokens": run / rows, "rows": rows, "mixes": MIXES, "threads": lanes * rows}
        return Launch(f"{kernel}<{dtype},{width}{arguments}>", groups * _up(batch * tokens, run), lanes * rows, sizes)

    backward = cut("mix_backward_kernel", min(widest, 4), f",{MIXES}")
    runs = _up(batch * tokens, int(backward.sizes["tokens"] * backward.sizes["rows"]))
    return [
        Call("q_shift", 2, [cut("shift_kernel", widest)]),
        Call("q_shift_mix", 1 + MIXES, [cut("mix_kernel", widest)]),
        Call(
            "q_shift_mix backward",
            2 + MIXES,
            [backward, _reduce("float", runs, channels, MIXES)],
            waits=_reduce_waits(runs),
        ),
    ]


def wkv6_calls(shape: tuple[int, int, int], dtype: str) -> list[Call]:
    """Heads of 64 channels and more than one chunk of 64 tokens; a state is 64 x 64 in fp32."""
    batch, tokens, channels = shape
    heads, chunks = channels // 64, _up(tokens, 64)
    all_chunks = batch * heads * chunks
    states = 2 * all_chunks * 64 * 64 * 4  # bytes of those that enter or leave all chunks, from either side
    sizes = {"chunks": chunks, "groups": 7 / 2}  # the latter beside a border of a chunk

    def cut(kernel: str, blocks: int, kind: str = dtype) -> Launch:
        return Launch(f"{kernel}<{kind}>", blocks, 256, sizes)

    before = [cut("chunk_states_kernel", 2 * all_chunks), cut("scan_states_kernel", 32 * batch * heads, "float")]
    outputs = cut("outputs_kernel", all_chunks)
    last = [cut("gradients_kernel", 2 * all_chunks), _reduce("float", batch * chunks, channels, 1)]
    waits = _up(chunks, 8) - 1  # of the scan
    return [
        Call("wkv6", 8, [*before, outputs], 0, waits, 4 * states),
        Call("wkv6 backward", 19, [*before, *before, outputs, *last], 0, 2 * waits + _reduce_waits(batch * chunks),
             9 * states),
    ]  # fmt: skip


def gating_calls(shape: tuple[int, int, int], dtype: str) -> list[Call]:
    width = 16 // DTYPES[dtype]
    blocks = _up(shape[0] * shape[1] * shape[2] // width, 256)
    functions = {"SigmoidGate": 3, "SigmoidGateBackward": 5, "SquaredRelu": 2, "SquaredReluBackward": 3}
    return [
        Call(re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower(), passes,
             [Launch(f"map_kernel<{name},{dtype},{width}>", blocks, 256, {})])
        for name, passes in functions.items()
    ]  # fmt: skip


# ---- The table ----

LAUNCH_US = 2.0  # assumed: from the end of a kernel to the start of one that waits for it
MERGE_US = 0.1  # assumed: a barrier, a read of shared memory and an exponential
WAIT_US = 0.6  # assumed: from a load of memory to its use


def _row(call: Call, shape: tuple[int, int, int], dtype: str, device: Device, functions: dict[str, Function]) -> str:
    elements = shape[0] * shape[1] * shape[2]
    totals: Counter[str] = Counter()
    barriers = 0.0
    for launch in call.launches:
        counted = count(functions[launch.kernel], launch.sizes)
        barriers += counted["BAR"]
        for opcode, times in counted.items():
            totals[opcode] += times * launch.threads * launch.blocks  # type: ignore[assignment]
    megabytes = (call.passes * elements * DTYPES[dtype] + call.workspace) / 1e6
    memory = megabytes / device.bandwidth
    issue = sum(totals.values()) / (32 * 4 * device.multiprocessors * device.clock * 1e3)
    latency = LAUNCH_US * len(call.launches) + MERGE_US * call.merges + WAIT_US * call.waits
    cells = [
        call.op, dtype, " x ".join(map(str, shape)), device.name, f"{megabytes:.1f}",
        f"{sum(totals.values()) / elements:.1f}",
        *(f"{totals[opcode] / elements:.2f}" for opcode in ("MUFU", "HMMA")),
        f"{barriers:.0f}", str(len(call.launches)), str(call.merges), str(call.waits),
        f"{min(launch.blocks for launch in call.launches) / device.multiprocessors:.1f}",
        f"{memory:.1f}", f"{issue:.1f}", f"{latency:.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(kernels: dict[str, dict[str, Function]]) -> str:
    """Every call as a row of Markdown, from the kernels compiled for each architecture, by their names."""
    lines = [
        "| op | dtype | shape | device | MB | instructions / element | MUFU / element | HMMA / element | barriers "
        "| launches | merges | waits | fewest blocks / multiprocessor | memory, us | issue, us | latency, us |",
        "|---|---|---|---|" + "---:|" * 12,
    ]
    for calls in (bi_wkv_calls, wkv6_calls, q_shift_calls, gating_calls):
        for dtype in DTYPES:
            for shape in SHAPES:
                for call in calls(shape, dtype):
                    lines += [_row(call, shape, dtype, device, kernels[device.arch]) for device in DEVICES
                              if device.arch in kernels]  # fmt: skip
    return "\n".join(lines)
