"""The count of a kernel's instructions, on one whose counts are known."""

import re
import subprocess

import pytest
from support.emulation import OPS
from support.scripts import load_script

KERNEL = """
__device__ __forceinline__ float squared(float x, int times) {
#pragma unroll 1
  for (int i = 0; i < times; ++i) {  // count: rounds
    x *= x;
  }
  return x;
}

__global__ void known(const float* a, float* y, int n, int some, int more) {
  float sum = 0;
  if (n > 1000000) {  // count: 0
    for (int i = 0; i < n; ++i) y[i] = a[i] + a[i + 1];
    return;
  }
#pragma unroll 4
  for (int i = 0; i < n; ++i) {  // count: n, unrolled 4
    sum = fmaf(sum, sum, a[i]);
  }
  // with: rounds = 3
  sum = squared(sum, some);
  __syncthreads();
  // with: rounds = 5, others = 1
  sum = squared(sum, more);
  if (threadIdx.x == 0) {  // count: 1 / 8
    y[0] = sum;
  }
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(sum));
  y[threadIdx.x + 1] = root;
}
"""


@pytest.fixture(scope="module")
def roofline():
    return load_script("tools/cuda_roofline.py")


@pytest.fixture(scope="module")
def known(roofline, tmp_path_factory):
    report = load_script("tools/cuda_report.py")
    nvcc = report.find_nvcc()
    nvdisasm = nvcc and report.find_nvdisasm(nvcc)
    if not nvdisasm:
        pytest.skip("the count needs nvcc and nvdisasm")
    directory = tmp_path_factory.mktemp("roofline")
    source, cubin = directory / "known.cu", directory / "known.cubin"
    source.write_text(KERNEL)
    subprocess.run([nvcc, "-lineinfo", "-arch=sm_90", "-cubin", str(source), "-o", str(cubin)], check=True)
    [function] = roofline.disassemble(nvdisasm, cubin).values()
    return function


@pytest.mark.parametrize("n", [4, 400])
def test_loops_and_branches_count_as_often_as_they_run(roofline, known, n):
    counted = roofline.count(known, {"n": n})
    assert (counted["FFMA"], counted["LDG"], counted["MUFU"], counted["BAR"]) == (n, n, 1, 1)
    assert counted["STG"] == 1 + 1 / 8
    assert counted["FMUL"] == 3 + 5  # a loop that two calls run differently often
    assert counted["FADD"] == 0  # of the branch that does not run
    # A round of four has its loads and sums, and what steps and compares.
    per_round = sum(roofline.count(known, {"n": n + 4}).values()) - sum(counted.values()) - 8
    assert 2 <= per_round <= 8


def test_what_lies_behind_a_kernel_does_not_count(roofline):
    listing = """
.text.known:
        /*0000*/                   MOV R1, R2 ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   SHFL.BFLY P1, R3, R2, R4, R5 ;
.L_x_1:
        /*0030*/                   EXIT ;
.L_x_2:
        /*0040*/                   MOV R4, 0x10 ;
        /*0050*/                   WARPSYNC.COLLECTIVE R6, `(.L_x_3) ;
        /*0060*/                   SHFL.BFLY P1, R3, R2, R4, R5 ;
        /*0070*/                   BRA `(.L_x_1) ;
"""
    function = roofline.parse(listing)["known"]
    assert [instruction.opcode for instruction in function.instructions] == ["MOV", "EXIT", "SHFL.BFLY", "EXIT"]
    assert function.loops == []


def test_a_block_ends_with_its_brace_or_where_its_alternative_begins(roofline, tmp_path):
    source = tmp_path / "blocks.cu"
    source.write_text("if (a) {  // count: 0\n  x;\n} else {  // count: 2 / n\n  if (b) {\n    y;\n  }\n}\nz;\n")
    found = [(region.first, region.last, region.times) for region in roofline.regions(str(source))]
    assert found == [(1, 3, "0"), (3, 7, "2 / n")]


def test_calls_are_cut_as_the_host_functions_cut_them(roofline):
    forward, backward = roofline.bi_wkv_calls((1, 65536, 192), "float")
    assert [launch.blocks for launch in forward.launches] == [256 * 12, 2 * 96, 256 * 12]
    assert forward.merges == 8 and len(backward.launches) == 6
    one_tile, _ = roofline.bi_wkv_calls((128, 196, 192), "bfloat16")
    assert [(launch.blocks, launch.threads) for launch in one_tile.launches] == [(128 * 12, 13 * 16)]
    forward, backward = roofline.wkv6_calls((1, 4096, 192), "float")
    assert [launch.blocks for launch in forward.launches] == [2 * 64 * 3, 96, 64 * 3]
    assert forward.waits == 7 and backward.waits == 14 and len(backward.launches) == 7
    for call in roofline.q_shift_calls((1, 4096, 192), "float"):
        assert call.launches[0].blocks >= 132, call.op


def test_every_kernel_is_in_the_table(roofline):
    sources = [path.read_text() for pattern in ("*/*.cu", "*/*.cuh") for path in OPS.glob(pattern)]
    kernels = {name for source in sources for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", source)}
    makers = (roofline.bi_wkv_calls, roofline.wkv6_calls, roofline.q_shift_calls, roofline.gating_calls)
    calls = [call for make in makers for shape in roofline.SHAPES for call in make(shape, "float")]
    counted = {launch.kernel.partition("<")[0] for call in calls for launch in call.launches}
    assert kernels - counted == {"add_chunks_kernel"}  # beyond 256 tiles, 65536 tokens
