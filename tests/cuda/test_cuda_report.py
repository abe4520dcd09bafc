"""What the kernels take of a multiprocessor, by the compiler's own count."""

import pytest
import torch
from support import wkv6_cases
from support.bi_wkv_cases import make_case
from support.emulation import OPS
from support.scripts import load_script


@pytest.fixture(scope="module")
def tool():
    return load_script("tools/cuda_report.py")


@pytest.fixture(scope="module")
def kernels(tool):
    nvcc = tool.find_nvcc()
    if nvcc is None:
        pytest.skip("the report needs nvcc")
    return tool.report(nvcc, ("8.0", "9.0"))


def test_every_kernel_is_reported_for_every_architecture(tool, kernels):
    names = {kernel.name for kernel in kernels}
    assert {"forward_kernel<half>", "mix_backward_kernel<bfloat16,4,3>", "gradients_kernel<double>"} <= names
    assert len(kernels) == 2 * len(names)
    assert all(name in tool.table(kernels) for name in names)


def test_no_kernel_spills(kernels):
    assert [(kernel.name, kernel.arch) for kernel in kernels if kernel.spill_bytes] == []


def test_the_newest_architecture_does_not_spill(tool):
    # 12.0 takes more of them than 9.0 for the same source; Q-Shift's gradient for four mixes is at the limit.
    nvcc = tool.find_nvcc()
    if nvcc is None:
        pytest.skip("the report needs nvcc")
    found = tool.compile_kernels(nvcc, OPS / "_q_shift" / "q_shift_cuda_bwd.cu", "12.0")
    assert [kernel.name for kernel in found if kernel.spill_bytes] == []
    assert "mix_backward_kernel<bfloat16,4,4>" in {kernel.name for kernel in found}


def test_a_quarter_of_the_warps_are_resident(kernels):
    assert [(kernel.name, kernel.arch) for kernel in kernels if kernel.occupancy < 0.25] == []


def test_occupancy_counts_each_limit(tool):
    def occupancy(registers=32, threads=256, shared_bytes=0):
        return tool.Kernel("k", "8.0", registers, 0, 0, threads, shared_bytes).occupancy

    assert occupancy() == 1.0
    assert occupancy(registers=128) == 0.25
    assert occupancy(shared_bytes=48 * 1024) == 3 * 8 / 64
    assert occupancy(threads=32) == 0.5  # 32 blocks of one warp


@pytest.mark.parametrize(
    "dtype, name", [(torch.float32, "float"), (torch.bfloat16, "bfloat16"), (torch.float64, "double")]
)
def test_shared_memory_of_the_largest_launch(tool, emulated, dtype, name):
    grad, *inputs = make_case(1, 257, 16).to(dtype)
    emulated.configure()
    emulated.bi_wkv(*inputs)
    # The tokens are shared out evenly over tiles: one segment fewer than the most is what two tiles may take.
    limit = tool.largest_shared_bytes(f"forward_kernel<{name}>")
    assert 0.5 * limit < emulated.largest_shared_bytes() <= limit
    emulated.configure()
    emulated._bi_wkv_backward(grad, *inputs)
    limit = tool.largest_shared_bytes(f"backward_kernel<{name}>")
    assert 0.5 * limit < emulated.largest_shared_bytes() <= limit


@pytest.mark.parametrize(
    "dtype, name", [(torch.float32, "float"), (torch.bfloat16, "bfloat16"), (torch.float64, "double")]
)
def test_shared_memory_of_wkv6(tool, emulated, dtype, name):
    grad, *inputs = wkv6_cases.make_case(2, 65, 2, 16).to(dtype)
    forward = [tool.largest_shared_bytes(f"{kernel}<{name}>") for kernel in ("chunk_states_kernel", "outputs_kernel")]
    emulated.configure()
    emulated.wkv6(*inputs)
    assert emulated.largest_shared_bytes() == max(forward)
    emulated._wkv6_backward(grad, *inputs)  # runs the kernels of the forward too
    backward = tool.largest_shared_bytes(f"gradients_kernel<{name}>")
    assert emulated.largest_shared_bytes() == max(*forward, backward)
    emulated.configure()
    emulated.wkv6(*(x[:, :30] if x.dim() == 4 else x for x in inputs))  # one chunk has no states
    assert emulated.largest_shared_bytes() == forward[1]
