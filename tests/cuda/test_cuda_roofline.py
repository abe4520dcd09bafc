"""The count of a kernel's instructions, on one whose counts are known."""

import subprocess

import pytest
from support.scripts import load_script

KERNEL = """
__global__ void known(const float* a, float* y, int n) {
  float sum = 0;
  if (n > 1000000) {  // count: 0
    for (int i = 0; i < n; ++i) y[i] = a[i] + a[i + 1];
    return;
  }
#pragma unroll 4
  for (int i = 0; i < n; ++i) {  // count: n, unrolled 4
    sum = fmaf(sum, sum, a[i]);
  }
  __syncthreads();
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
    assert counted["FADD"] == 0  # of the branch that does not run
    # A round of four has its loads and sums, and what steps and compares.
    per_round = sum(roofline.count(known, {"n": n + 4}).values()) - sum(counted.values()) - 8
    assert 2 <= per_round <= 8


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
    for call in roofline.q_shift_calls((1, 4096, 192), "float"):
        assert call.launches[0].blocks >= 132, call.op
