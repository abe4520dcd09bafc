"""Times models of both families beside their own GEMMs and beside DeiT, forward and training, and takes peak memory.

python benchmarks/run_models.py [--short] [--device cpu|cuda] [--threads 2]

Before anything is timed, the model's output must agree with the one of the pure-torch reference ops in float64.
Peak memory is that of a fresh process that builds the model and calls it once: of all its tensors together, and of the
process, which is mostly torch itself for a small model; on a GPU it is that of the tensors of a call. Writes
models_<device>.csv and resolution_<device>.png.
"""

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from measure import (
    RESULTS,
    interleaved_medians,
    keep_freed_memory,
    machine,
    peak_memory,
    peak_tensor_memory,
    write_rows,
)
from torch import Tensor, nn

import vrwkv  # noqa: F401
from vrwkv.ops import use_backend

MEMORY_MODES = ("forward", "training", "training, checkpointed")


@dataclass(frozen=True)
class Cases:
    """Size, batch and pixels of what is timed in each mode."""

    forward: list[tuple[str, int, int]]  # the first two are the short set
    bfloat16: list[tuple[str, int, int]]
    compiled: list[tuple[str, int, int]]
    training: list[tuple[str, int, int]]
    fast_training: list[tuple[str, int, int]]  # under bf16 autocast, and compiled so


CASES = {
    "cpu": Cases(
        forward=[
            ("tiny", 8, 224),
            ("tiny", 1, 512),
            ("tiny", 1, 1024),
            ("tiny", 1, 2048),
            ("small", 8, 224),
            ("small", 1, 512),
            ("small", 1, 1024),
        ],
        bfloat16=[("tiny", 8, 224), ("tiny", 1, 512), ("tiny", 1, 1024), ("tiny", 1, 2048)],
        compiled=[("tiny", 8, 224), ("tiny", 1, 1024)],
        training=[("tiny", 8, 224), ("tiny", 1, 1024)],
        fast_training=[],
    ),
    "cuda": Cases(
        forward=[("tiny", 128, 224), ("tiny", 8, 1024), ("tiny", 2, 2048), ("small", 128, 224)],
        bfloat16=[("tiny", 128, 224), ("tiny", 8, 1024), ("tiny", 2, 2048), ("small", 128, 224)],
        compiled=[("tiny", 128, 224)],
        training=[("tiny", 128, 224), ("tiny", 8, 1024)],
        fast_training=[("tiny", 128, 224)],
    ),
}


def models_of(size: str) -> list[str]:
    """Both families and DeiT, in the order of the rows."""
    return [f"{family}_{size}_patch16_224" for family in ("vrwkv", "vrwkv6", "deit")]


def create(name: str, pixels: int, device: str) -> nn.Module:
    """A model of random weights; DeiT is built for its image size, ours takes any."""
    torch.manual_seed(0)
    keywords = {} if name.startswith("vrwkv") else {"img_size": pixels}
    return timm.create_model(name, **keywords).to(device).eval()


def gemms(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    """The model's matrix products alone: every Linear and the patch embedding as one, on inputs made beforehand."""
    calls: list[tuple[Tensor, Tensor, Tensor | None]] = []
    hooks = [
        module.register_forward_hook(lambda m, i, o: calls.append((torch.randn_like(i[0]), m.weight, m.bias)))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    projection = model.patch_embed.proj
    weight = projection.weight.flatten(1)
    tokens = images.shape[0] * (images.shape[2] // 16) * (images.shape[3] // 16)
    calls.append((images.new_empty(tokens, weight.shape[1]).normal_(), weight, projection.bias))

    def run() -> None:
        for x, w, b in calls:
            F.linear(x, w, b)

    return run


def training_step(model: nn.Module, images: Tensor, autocast: bool = False) -> Callable[[], Any]:
    """Forward, backward and AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    target = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def run() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def forward(model: nn.Module, images: Tensor, autocast: bool = False) -> Callable[[], Any]:
    """Inference."""

    @torch.inference_mode()
    def run() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            return model(images)

    return run


def has_bfloat16(device: str) -> bool:
    """Whether the processor has bf16 units; without them bf16 products are emulated, ten times slower than fp32."""
    capabilities = torch.cpu.get_capabilities()
    return device == "cuda" or any(capabilities.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))


def check(name: str, pixels: int, device: str) -> None:
    """Raise if the fast path of the model differs from float64 on the pure-torch ops."""
    model, images = create(name, pixels, device), torch.randn(1, 3, pixels, pixels, device=device)
    with torch.no_grad():
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the default rounds convolutions to TF32
            actual = model(images)
        with use_backend("torch"):
            wanted = model.double()(images.double())
    error = ((actual - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= 2e-5:
        raise SystemExit(f"{name} is wrong at {pixels} px: error {error:.3g} > 2e-5")


def measure_memory(mode: str, name: str, batch: int, pixels: int, threads: int) -> dict[str, str]:
    """Columns of peak memory in MiB, each from a fresh process."""
    columns = {}
    for kind in ("tensors", "process"):
        arguments = ["--peak", kind, mode, name, str(batch), str(pixels)]
        command = [sys.executable, __file__, "--threads", str(threads), *arguments]
        quiet = os.environ | {"KINETO_LOG_LEVEL": "5"}
        peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet).stdout)
        columns[f"peak_{kind}_mebibytes"] = f"{peak / 2**20:.0f}"
    return columns


def print_peak(kind: str, mode: str, name: str, batch: str, pixels: str) -> None:
    def run() -> None:
        model, images = create(name, int(pixels), "cpu"), torch.randn(int(batch), 3, int(pixels), int(pixels))
        model.set_grad_checkpointing(mode.endswith("checkpointed"))
        (forward if mode == "forward" else training_step)(model, images)()

    if kind == "tensors":
        print(peak_tensor_memory(run))
    else:
        run()
        print(peak_memory())


def peak_of_call(function: Callable[[], Any]) -> int:
    """Largest sum of tensors on the GPU during a call beyond those before it, in bytes."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def measure_case(
    mode: str, case: tuple[str, int, int], functions: dict[str, Callable[[], Any]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Times functions of one size, batch and resolution in turn, prints and returns a row for each."""
    size, batch, pixels = case
    name, *peers = models_of(size)
    times = interleaved_medians(functions, args.device, 3.0 if args.short else 12.0)
    rows = []
    print(f"{mode}, {batch} x {pixels} px")
    for label, seconds in times.items():
        memory = {"peak_tensors_mebibytes": "", "peak_process_mebibytes": ""}
        if mode in MEMORY_MODES and label in (name, *peers) and not args.short:
            if args.device == "cuda":
                memory["peak_tensors_mebibytes"] = f"{peak_of_call(functions[label]) / 2**20:.0f}"
            else:
                memory = measure_memory(mode, label, batch, pixels, args.threads)
        ratio, peaks = seconds / times[name], " / ".join(filter(None, memory.values()))
        line = f"  {label:40} {seconds * 1e3:10.2f} ms  {ratio:7.3f} x {name}"
        print(f"{line}  {peaks} MiB" if peaks else line, flush=True)
        row = {"mode": mode, "model": label, "batch": batch, "pixels": pixels, "milliseconds": f"{seconds * 1e3:.3f}"}
        row |= {"times_vrwkv": f"{ratio:.4f}", "images_per_second": f"{batch / seconds:.3f}"}
        rows.append({**row, **memory, **machine(args.device)})
    return rows


Measure = Callable[[str, tuple[str, int, int], dict[str, Callable[[], Any]]], None]


def create_all(case: tuple[str, int, int], device: str) -> tuple[dict[str, nn.Module], Tensor]:
    """All models of a size by their names, and images (B, 3, H, W) for them."""
    size, batch, pixels = case
    models = {name: create(name, pixels, device) for name in models_of(size)}
    return models, torch.randn(batch, 3, pixels, pixels, device=device)


def beside_first(
    models: dict[str, nn.Module], suffix: str, plain: Callable[..., Any], changed: Callable[..., Any]
) -> dict[str, Callable[[], Any]]:
    """A copy of the first model called plainly, for comparison, and every model called in another way."""
    first, model = next(iter(models.items()))
    functions = {first: plain(copy.deepcopy(model))}
    return functions | {f"{name} {suffix}": changed(each) for name, each in models.items()}


def measure_inference(args: argparse.Namespace, measure: Measure) -> None:
    cases = CASES[args.device]
    for case in cases.forward[:2] if args.short else cases.forward:
        models, x = create_all(case, args.device)
        functions = {name: forward(model, x) for name, model in models.items()}
        functions |= {f"{name} GEMMs": gemms(model, x) for name, model in models.items() if name.startswith("vrwkv")}
        measure("forward", case, {label: torch.inference_mode()(function) for label, function in functions.items()})
    if args.short:
        return
    for case in cases.bfloat16 if has_bfloat16(args.device) else ():
        models, x = create_all(case, args.device)
        plain, changed = partial(forward, images=x), partial(forward, images=x, autocast=True)
        measure("forward, bf16", case, beside_first(models, "bf16", plain, changed))


def measure_training(args: argparse.Namespace, measure: Measure) -> None:
    cases = CASES[args.device]
    for mode in ("training", "training, checkpointed"):
        for case in cases.training:
            models, x = create_all(case, args.device)
            for model in models.values():
                model.set_grad_checkpointing(mode.endswith("checkpointed"))
            measure(mode, case, {name: training_step(model, x) for name, model in models.items()})
    for case in cases.fast_training:
        models, x = create_all(case, args.device)
        plain, changed = partial(training_step, images=x), partial(training_step, images=x, autocast=True)
        measure("training, bf16", case, beside_first(models, "bf16", plain, changed))


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` for the compiled model."""
    return lambda model: call(torch.compile(model))


def measure_compiled(args: argparse.Namespace, measure: Measure) -> None:
    cases = CASES[args.device]
    for case in cases.compiled:
        torch.compiler.reset()
        models, x = create_all(case, args.device)
        call = partial(forward, images=x)
        measure("forward, compiled", case, beside_first(models, "compiled", call, compiled(call)))
    for case in cases.fast_training:
        torch.compiler.reset()
        models, x = create_all(case, args.device)
        step = partial(training_step, images=x, autocast=True)
        measure("training, bf16, compiled", case, beside_first(models, "compiled", step, compiled(step)))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory of one forward pass against the size of the image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = models_of("tiny") + models_of("small")
    for label in names + [f"{name} bf16" for name in names]:
        mode = "forward, bf16" if label.endswith("bf16") else "forward"
        mine = [row for row in rows if row["mode"] == mode and row["model"] == label]
        if not mine:
            continue
        pixels = [row["pixels"] for row in mine]
        for axis, values in (
            (axes[0], [1e3 / float(row["images_per_second"]) for row in mine]),
            (axes[1], [float(row["peak_tensors_mebibytes"] or "nan") for row in mine]),
        ):
            axis.plot(pixels, values, "o-" if label.startswith("vrwkv") else "o--", label=label)
    for axis, title in ((axes[0], "milliseconds per image"), (axes[1], "peak MiB of the tensors")):
        axis.set(xscale="log", yscale="log", xlabel="height and width in pixels", title=title)
        axis.set_xticks([224, 512, 1024, 2048], ["224", "512", "1024", "2048"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['processor']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two sizes, forward alone, no memory")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV file and the plot")
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.peak:
        return print_peak(*args.peak)

    rows: list[dict[str, Any]] = []
    suffix = "short" if args.short else args.device

    def measure(mode: str, case: tuple[str, int, int], functions: dict[str, Callable[[], Any]]) -> None:
        rows.extend(measure_case(mode, case, functions, args))
        write_rows(f"models_{suffix}", rows, args.output)  # now, lest a later case takes those before with it

    for name in models_of("tiny")[:2] + models_of("small")[:2]:
        check(name, 224, args.device)
    measure_inference(args, measure)
    if not args.short:
        measure_training(args, measure)
        draw(rows, args.output / f"resolution_{args.device}.png")
        measure_compiled(args, measure)  # last: it needs most of the machine, a C compiler among it
    print(args.output / f"models_{suffix}.csv")


if __name__ == "__main__":
    main()
