"""The emulation catches what it is there to catch: in small kernels, and in the package's own once they are broken."""

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import wkv6_cases
from support.bi_wkv_cases import make_case
from support.emulation import HERE, OPS, Emulated, link
from support.tolerances import BACKWARD, FORWARD, assert_close

from vrwkv.ops._gating import torch_impl
from vrwkv.ops._q_shift import reference

THREADS = 96
MISTAKES = {
    "shuffle_of_half_a_warp": "reached by part of the lanes",
    "different_barriers": "wait at different barriers",
    "barrier_without_all": "threads have left the kernel while others wait",
    "unwritten_shared": "read of unwritten shared memory",
    "race": "shared memory",  # read before or after the other thread writes
    "overwrite_after_read": "race in shared memory",
    "shared_out_of_bounds": "shared access at byte 384 of 384",
    "read_out_of_bounds": "global access at element 96 of 96",
    "write_out_of_bounds": "global access at element -1 of 96",
    "misaligned_vector": "global access not aligned",
}


@pytest.fixture(scope="module")
def self_test(tmp_path_factory):
    library = tmp_path_factory.mktemp("self_test") / "self_test.so"
    link(library, "vrwkv_self_test", HERE / "self_test.cu")
    function = ctypes.CDLL(str(library)).self_test
    function.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
    function.restype = ctypes.c_char_p

    def call(name: str, x: torch.Tensor | None = None) -> tuple[str, torch.Tensor]:
        x = torch.arange(1.0, THREADS + 1) if x is None else x
        out = torch.zeros(THREADS)
        error = function(name.encode(), x.data_ptr(), out.data_ptr(), THREADS)
        return (error or b"").decode(), out

    return call


def test_a_right_kernel_runs(self_test):
    error, out = self_test("block_sum")
    assert error == "" and out[0] == THREADS * (THREADS + 1) / 2


def test_the_tensor_core_multiplies(self_test):
    error, out = self_test("tensor_core")
    places = torch.arange(16 * 8).view(16, 8) % THREADS
    a, b = places + 1.0, places[:8] * 5 % THREADS + 1.0  # whole numbers, which TF32 holds
    assert error == "" and torch.equal(out, (a @ b).flatten()[:THREADS])


@pytest.mark.parametrize(
    "name, function, error",
    [("approximate_exp2", torch.exp2, 2**-22), ("approximate_reciprocal", torch.reciprocal, 2**-23)],
)
def test_approximate_instructions_are_as_inexact_as_their_manual_grants(self_test, name, function, error):
    x = torch.linspace(-9.7, 9.5, THREADS)
    _, out = self_test(name, x)
    relative = (out.double() / function(x.double()) - 1).abs()
    assert relative.max() <= error and relative.mean() > error / 4
    assert torch.equal(self_test(name, x)[1], out)
    special = torch.tensor([0.0, -0.0, 1e-40, float("inf"), -float("inf"), float("nan"), 3e38, -3e38]).repeat(12)
    flushed = torch.where(special.abs() < 2**-126, 0 * special, special)
    wanted = function(flushed)  # neither function has a result there that an error would change
    wanted = torch.where(wanted.abs() < 2**-126, 0 * wanted, wanted)
    assert torch.equal(self_test(name, special)[1].nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(self_test, name):
    error, _ = self_test(name)
    assert MISTAKES[name] in error


BI_WKV = "_bi_wkv/bi_wkv_cuda"
BI_WKV_BACKWARD = "_bi_wkv/bi_wkv_cuda_bwd.cu"
BI_WKV_FAST = "_bi_wkv/bi_wkv_fast.cuh"
BI_WKV_SUMS = "_bi_wkv/bi_wkv_sums.cuh"
TILE = "_bi_wkv/bi_wkv_tile.cuh"
Q_SHIFT = "_q_shift/q_shift_cuda"
Q_SHIFT_BACKWARD = "_q_shift/q_shift_cuda_bwd.cu"
GATING = "_gating/gating_cuda"
WKV6 = "_wkv6/wkv6_cuda"
WKV6_CHUNK = "_wkv6/wkv6_cuda_chunk.cuh"
DTYPES = "common/dtypes.h"
REDUCE_ROWS = "common/reduce_rows.cuh"
# name: (kernels that are built, file, text, its replacement, part of the error or "" where results are wrong)
FAULTS = {
    "dropped_barrier_after_the_maxima": (
        BI_WKV, BI_WKV_SUMS, "loaded, channel);\n    __syncthreads();\n", "loaded, channel);\n", "shared"),
    "dropped_barrier_between_the_sums": (
        BI_WKV, BI_WKV_BACKWARD, "    __syncthreads();\n    if (fast) {\n      gradients.find_ab",
        "    if (fast) {\n      gradients.find_ab", "shared"),
    "dropped_barrier_before_the_shares": (
        BI_WKV, BI_WKV_BACKWARD, "    __syncthreads();\n    memory.tokens.write", "    memory.tokens.write", "race"),
    "dropped_barrier_of_the_scan": (
        BI_WKV, BI_WKV_SUMS, "      __syncthreads();\n    }\n    ScaledSum<acc_t> entering",
        "    }\n    ScaledSum<acc_t> entering", "shared"),
    "segment_ends_one_step_early": (
        BI_WKV, BI_WKV_FAST, "power = memory.powers[Block<scalar_t>::kLength];",
        "power = memory.powers[Block<scalar_t>::kLength - 1];", ""),
    "entering_sums_decay_the_wrong_way": (
        BI_WKV, BI_WKV_FAST, "advanced(powers[kLength - 1 - i], each[i])", "advanced(powers[i], each[i])", ""),
    "steep_segment_ends_one_step_late": (
        BI_WKV, TILE, "sum.gap += (segment - 1 - other) *", "sum.gap += 1 + (segment - 1 - other) *", ""),
    "unguarded_tail_of_channels": (
        BI_WKV, TILE, "exists(tile) ? tile.tokens - index * B::kLength : 0", "tile.tokens - index * B::kLength",
        "global access"),
    "dropped_barrier_of_the_mixes": (
        Q_SHIFT, Q_SHIFT_BACKWARD, "      __syncthreads();  // before the sums of the next mix\n", "", "race"),
    "unguarded_edge_of_the_grid": (
        Q_SHIFT, f"{Q_SHIFT}.cuh", "column >= 0 && column < grid.width", "column >= 0", "global access"),
    "dropped_barrier_of_the_sums_over_rows": (
        Q_SHIFT, REDUCE_ROWS, "+ threadIdx.x] = total;\n    __syncthreads();\n", "+ threadIdx.x] = total;\n", "shared"),
    "unguarded_tail_of_elements": (GATING, f"{GATING}.cu", "i < vectors;", "i <= vectors;", "global access"),
    "gate_of_the_wrong_sign": (GATING, f"{GATING}.cu", "x < 0 ? e : acc_t(1)", "x < 0 ? acc_t(1) : e", ""),
    "dropped_barrier_between_levels": (
        WKV6, f"{WKV6}_fwd.cu", "    add_weights(left, right, columns, half, gathered);\n    __syncthreads();",
        "    add_weights(left, right, columns, half, gathered);", "race"),
    "dropped_barrier_between_the_products": (
        WKV6, f"{WKV6}_bwd.cu",
        "      __syncthreads();\n      store_products<scalar_t>(of_r", "      store_products<scalar_t>(of_r", "race"),
    "tokens_meet_more_than_once": (WKV6, WKV6_CHUNK, "& ~(half - 1)) == half", "& half) == half", ""),
    "own_decay_is_counted": (
        WKV6, WKV6_CHUNK, "      sum += logs[i];\n    }\n    sum = outside;",
        "      sum += logs[i];\n      factors[i] = sum;\n    }\n    sum = outside;", ""),
    "unguarded_columns": (
        WKV6, WKV6_CHUNK, "return token < tokens && column < size;", "return token < tokens;", "global access"),
    "swapped_registers_of_the_tensor_core": (
        WKV6, "common/cuda_matmul.cuh", "to_tf32(b(k + j, column)), to_tf32(b(k + j + 4, column))",
        "to_tf32(b(k + j + 4, column)), to_tf32(b(k + j, column))", ""),
}  # fmt: skip
SCALARS = {BI_WKV: "float", Q_SHIFT: "float", GATING: "float", WKV6: "c10::Half"}
ALL_DTYPES = """  if (dtype == ScalarType::Float) return function(float());
  if (dtype == ScalarType::Double) return function(double());
  if (dtype == ScalarType::Half) return function(c10::Half());
  return function(c10::BFloat16());
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[str, Emulated]:
    """A library for each fault: a copy of the sources with one text replaced, one dtype only."""
    directory = tmp_path_factory.mktemp("faults")

    def build_one(name: str) -> Emulated:
        kernels, file, text, replacement, _ = FAULTS[name]
        root = directory / name
        shutil.copytree(OPS, root, ignore=shutil.ignore_patterns("*.py", "__pycache__", "*_cpu*"))
        one_dtype = f"  return function({SCALARS[kernels]}());\n"
        for path, old, new in ((file, text, replacement), (DTYPES, ALL_DTYPES, one_dtype)):
            source = (root / path).read_text()
            assert old in source, f"{path} has changed: adapt the fault {name}"
            (root / path).write_text(source.replace(old, new))
        library = root / "broken.so"
        source, *others = sorted(root.glob(f"{kernels}*.cu"))
        included = [f"-include{path}" for path in (HERE / "emulate.cpp", *others)]
        link(library, f"vrwkv_{name}", source, root, "-O0", *included)
        return Emulated(library, f"vrwkv_{name}")

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAULTS, pool.map(build_one, FAULTS), strict=True))


def run_bi_wkv(ops: Emulated) -> None:
    for case in (make_case(3, 49, 33), make_case(1, 40, 17, "decay"), make_case(1, 700, 3)):
        grad, *inputs = case.to(torch.float32)
        assert_close(ops.bi_wkv(*inputs), case.y, FORWARD, torch.float32, scale=case.scales[0])
        gradients = ops._bi_wkv_backward(grad, *inputs)
        for actual, wanted, scale in zip(gradients, case.gradients, case.scales[1:], strict=True):
            assert_close(actual, wanted, BACKWARD, torch.float32, scale=scale)


def run_q_shift(ops: Emulated) -> None:
    x, mixes = torch.randn(2, 15, 33), [torch.rand(33), torch.rand(33)]
    grads = [torch.randn(2, 15, 33) for _ in mixes]
    inputs = [tensor.double().requires_grad_() for tensor in (x, *mixes)]
    wanted = reference.q_shift_mix(inputs[0], inputs[1:], 3, 5, 1, 0.25)
    gradients = torch.autograd.grad(wanted, inputs, [grad.double() for grad in grads])
    actual = ops.q_shift_mix(x, mixes, 3, 5, 1, 0.25, 1)
    grad_x, grad_mixes = ops._q_shift_mix_backward(grads, x, mixes, 3, 5, 1, 0.25, 1)
    for a, b in zip((*actual, grad_x, *grad_mixes), (*wanted, *gradients), strict=True):
        assert_close(a, b, BACKWARD, torch.float32)


def run_gating(ops: Emulated) -> None:
    grad, r, y = torch.randn(3, 231)
    inputs = [x.double().requires_grad_() for x in (r, y)]
    wanted = torch_impl.sigmoid_gate(*inputs)
    gradients = torch.autograd.grad(wanted, inputs, grad.double())
    actual = (ops.sigmoid_gate(r, y), *ops._sigmoid_gate_backward(grad, r, y))
    for a, b in zip(actual, (wanted, *gradients), strict=True):
        assert_close(a, b, BACKWARD, torch.float32)


def run_wkv6(ops: Emulated) -> None:
    case = wkv6_cases.make_case(1, 70, 1, 12)
    grad, *inputs = case.to(torch.float16)
    assert_close(ops.wkv6(*inputs), case.y, FORWARD, torch.float16)
    for actual, wanted in zip(ops._wkv6_backward(grad, *inputs), case.gradients, strict=True):
        assert_close(actual, wanted, BACKWARD, torch.float16)


def test_every_op_has_a_kernel_or_torch_ops_for_cuda(emulated):
    # Python registers torch ops where there are no kernels.
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vrwkv::")]
    kernels = [name.replace("vrwkv::", "vrwkv_emulated::") for name in ops]
    assert "vrwkv::wkv6" in ops and "vrwkv::norm_gate" in ops
    assert [op for op, kernel in zip(ops, kernels, strict=True) if not has(op, "CUDA") and not has(kernel, "CPU")] == []


RUN = {BI_WKV: run_bi_wkv, Q_SHIFT: run_q_shift, GATING: run_gating, WKV6: run_wkv6}


def test_the_unbroken_kernels_pass(emulated):
    for run in RUN.values():
        run(emulated)


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_caught(broken, name):
    kernels, _, _, _, words = FAULTS[name]
    with pytest.raises(RuntimeError if words else AssertionError) as caught:
        RUN[kernels](broken[name])
    assert words in str(caught.value)
