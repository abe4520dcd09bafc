"""Times Bi-WKV, WKV6 and the mixes beside torch.exp, a copy and attention.

python benchmarks/run_ops.py [--short] [--device cpu|cuda] [--threads 2]

Every shape must first agree with the float64 reference on a few channels; a shape that does not gives no row, and the
exit code is 1. On a GPU calls are timed by events in a CUDA graph, with a cold second-level cache. `share_of_copy` is
the bandwidth over that of a copy of one tensor, for the bytes that an op must move at least.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import RESULTS, device_medians, interleaved_medians, keep_freed_memory, machine, write_rows

from vrwkv.ops import _extension, bi_wkv, q_shift_mix, sigmoid_gate, squared_relu, wkv6
from vrwkv.ops._bi_wkv import reference
from vrwkv.ops._wkv6 import reference as wkv6_reference

SHAPES = [  # (B, T, C), dtype; the first four are the short set
    ((8, 196, 192), torch.float32),
    ((8, 196, 768), torch.float32),
    ((1, 4096, 192), torch.float32),
    ((1, 16384, 192), torch.float32),
    ((1, 65536, 192), torch.float32),
    ((1, 262144, 192), torch.float32),
    ((8, 196, 192), torch.bfloat16),
    ((1, 4096, 192), torch.bfloat16),
    ((1, 16384, 192), torch.bfloat16),
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
WKV6_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # of the largest output
HEAD = 64  # channels, of attention and WKV6
CUDA_SHAPES = [
    ((128, 196, 192), torch.float32),
    ((8, 4096, 384), torch.float32),
    ((1, 65536, 192), torch.float32),
    ((128, 196, 192), torch.bfloat16),
    ((32, 196, 768), torch.bfloat16),
    ((8, 4096, 384), torch.bfloat16),
    ((1, 4096, 192), torch.bfloat16),
    ((1, 65536, 192), torch.bfloat16),
]
PASSES = {  # times that a tensor of the shape crosses memory at least
    "copy": 2, "exp": 2, "bi_wkv": 3, "bi_wkv backward": 5, "q_shift_mix": 4, "q_shift_mix backward": 5,
    "sigmoid_gate": 3, "squared_relu": 2, "wkv6": 5, "wkv6 backward": 9, "attention": 4,
}  # fmt: skip
ATTENTION_UP_TO = 4096  # tokens: beyond, one call takes seconds


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    _, tokens, channels = shape
    w = torch.linspace(-5, 3, channels) / tokens  # as a new model has it
    u = torch.randn(channels) / tokens
    return [w.to(device), u.to(device), *(torch.randn(shape).to(device, dtype) for _ in range(3))]


class WrongResult(Exception):
    """An op differs from its reference."""


def require_close(op: str, y: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor, tolerance: float) -> None:
    """Raise if results differ by more than a share of the largest value of `scale`."""
    error = ((y - wanted).abs().max() / scale.abs().max()).item()
    if not error <= tolerance:
        raise WrongResult(f"{op} is wrong: error {error:.3g} > {tolerance:.3g}")


def check(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Raise if Bi-WKV is wrong at this shape; above 4096 tokens the first ones are held against a shorter reference."""
    w, u, k, v, _ = inputs(shape, dtype, device)
    some = [0, shape[2] // 2, shape[2] - 1]
    y = bi_wkv(w, u, k, v)[:1, :, some].double()
    if shape[1] <= 4096:
        wanted = reference.bi_wkv(*(x[..., some].double() for x in (w, u, k[:1], v[:1])))
    else:  # the formula for one row of its matrix: the first token
        distance = torch.arange(shape[1], device=device, dtype=torch.float64)[:, None]
        exponent = torch.where(distance == 0, u[some].double(), -(distance - 1) * w[some].double())
        weights = (exponent + k[0][:, some].double()).softmax(0)
        y, wanted = y[:, :1], (weights * v[0][:, some].double()).sum(0)[None, None]
    require_close("bi_wkv", y, wanted, v, TOLERANCE[dtype])


def wkv6_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """r, k, v, w and u, the decays from near 1 to near 0."""
    _, _, k, v, r = inputs(shape, dtype, device)
    r, k, v = (each.unflatten(-1, (-1, HEAD)) for each in (r, k, v))
    w = torch.empty(r.shape).uniform_(-8, 4)
    return [r, k, v, w.to(device, dtype), torch.randn(r.shape[2:], device=device)]


def check_wkv6(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Raise if WKV6 is wrong in the first head; above 4096 tokens the first one is held against its sum."""
    y, inputs = wkv6(*(given := wkv6_inputs(shape, dtype, device)))[:1, :, :1].double(), [x.double() for x in given]
    r, k, v, w = (x[:1, :, :1] for x in inputs[:4])
    if shape[1] <= 4096:
        wanted = wkv6_reference.wkv6(r, k, v, w, inputs[4][:1])
    else:
        y, own = y[:, :1], inputs[4][:1] * k[:, :1]
        decays = (w[:, 1:].exp() - w[:, 1:].exp().cumsum(1)).exp()  # of the tokens in between
        weights = (r[:, :1] * torch.cat([own, decays * k[:, 1:]], 1)).sum(-1, keepdim=True)
        wanted = (weights * v).sum(1, keepdim=True)
    require_close("wkv6", y, wanted, wanted, WKV6_TOLERANCE[dtype])


def functions(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> dict[str, Callable[[], Any]]:
    w, u, k, v, grad = inputs(shape, dtype, device)
    grads = [grad, grad.clone(), grad.clone()]  # apart in memory, as a network's are
    _, tokens, channels = shape
    mixes = [torch.rand(channels, device=device) for _ in range(3)]
    height = next(h for h in range(int(tokens**0.5), 0, -1) if tokens % h == 0)
    grid = (height, tokens // height)
    copy = torch.empty_like(k)
    result: dict[str, Callable[[], Any]] = {
        "copy": lambda: copy.copy_(k),
        "exp": lambda: torch.exp(k),
        "bi_wkv": lambda: bi_wkv(w, u, k, v),
        "q_shift_mix": lambda: q_shift_mix(k, mixes, grid),
        "sigmoid_gate": lambda: sigmoid_gate(k, v),
        "squared_relu": lambda: squared_relu(k),
    }
    scan = wkv6_inputs(shape, dtype, device)
    result["wkv6"] = lambda: wkv6(*scan)
    if _extension.is_native(k):
        result["bi_wkv backward"] = lambda: torch.ops.vrwkv._bi_wkv_backward(grad, w, u, k, v)
        result["q_shift_mix backward"] = lambda: torch.ops.vrwkv._q_shift_mix_backward(
            grads, k, mixes, *grid, 1, 0.25, 1
        )
        result["wkv6 backward"] = lambda: torch.ops.vrwkv._wkv6_backward(grad.view_as(scan[0]), *scan)
    if tokens <= ATTENTION_UP_TO:
        heads = k.unflatten(-1, (-1, HEAD)).transpose(1, 2)
        result["attention"] = lambda: F.scaled_dot_product_attention(heads, heads, heads)
    return result


def rows_of(
    shape: tuple[int, int, int], dtype: torch.dtype, times: dict[str, float], device: str
) -> list[dict[str, Any]]:
    """Prints and returns a row for each op."""
    size = torch.Size(shape).numel() * dtype.itemsize
    rows = []
    for op, seconds in times.items():
        ratio = seconds / times["exp"]
        share = PASSES[op] * times["copy"] / (PASSES["copy"] * seconds)
        print(
            f"  {op:22} {seconds * 1e3:10.3f} ms   {ratio:6.2f} x exp   {size / seconds / 1e9:6.1f} GB/s of k   "
            f"{share:4.0%} of a copy's bandwidth"
        )
        rows.append(
            {
                "op": op,
                "shape": "x".join(map(str, shape)),
                "dtype": str(dtype).removeprefix("torch."),
                "milliseconds": f"{seconds * 1e3:.4f}",
                "times_exp": f"{ratio:.3f}",
                "share_of_copy": f"{share:.3f}",
                "nanoseconds_per_token": f"{seconds * 1e9 / (shape[0] * shape[1]):.2f}",
                **machine(device),
            }
        )
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="four shapes, half a second each")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    failures = []
    on_gpu = args.device == "cuda"
    shapes = CUDA_SHAPES if on_gpu else SHAPES
    name = "ops_short" if args.short else f"ops_{args.device}"
    for shape, dtype in shapes[:4] if args.short else shapes:
        print(f"{shape} {dtype}", flush=True)
        try:
            check(shape, dtype, args.device)
            check_wkv6(shape, dtype, args.device)
        except WrongResult as error:
            print(f"  {error}", flush=True)
            failures.append(f"{shape} {dtype}: {error}")
            continue
        timed, seconds = functions(shape, dtype, args.device), 0.5 if args.short else 8.0
        times = device_medians(timed, seconds) if on_gpu else interleaved_medians(timed, args.device, seconds)
        rows += rows_of(shape, dtype, times, args.device)
        path = write_rows(name, rows, args.output)  # now, lest a later shape takes those before with it
    if rows:
        print(path)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
