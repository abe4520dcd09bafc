"""What a user meets who has no compiler, or asks for the pure-torch path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vrwkv
from vrwkv.ops import _extension

USE = """
import torch
from vrwkv.ops import bi_wkv, q_shift, _extension
y = bi_wkv(torch.zeros(3), torch.zeros(3), torch.zeros(1, 4, 3), torch.ones(1, 4, 3))
assert torch.equal(y, torch.ones(1, 4, 3))
assert q_shift(torch.ones(1, 4, 3), (2, 2)).shape == (1, 4, 3)
print(sorted(_extension.NATIVE_DEVICES))
"""


def run(script, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )


def test_backend_torch_needs_no_binary_and_says_nothing(tmp_path):
    result = run(USE, tmp_path, VRWKV_BACKEND="torch", PYTHONPATH=str(Path(vrwkv.__file__).parent.parent))
    assert result.returncode == 0 and result.stdout.strip() == "[]"
    assert "pure-torch" not in result.stderr


def test_a_missing_binary_is_named_once(tmp_path):
    shutil.copytree(
        Path(vrwkv.__file__).parent, tmp_path / "vrwkv", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    result = run(USE, tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
    assert result.stderr.count("pip install .") == 1


@pytest.mark.skipif("cpu" not in _extension.NATIVE_DEVICES, reason="the compiled ops are not built")
def test_cuda_kernels_that_cannot_be_loaded_leave_the_others(tmp_path):
    """As where they need the runtime of another major version of CUDA than torch brings."""
    shutil.copytree(Path(vrwkv.__file__).parent, tmp_path / "vrwkv", ignore=shutil.ignore_patterns("_cuda*"))
    (tmp_path / "vrwkv" / "_cuda.abi3.so").write_bytes(b"no library")
    result = run(f"import torch; torch.version.cuda = '13.0'\n{USE}", tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['cpu', 'meta']"
    assert result.stderr.count("cannot be loaded beside torch") == 1
    assert "for CUDA 13.0" in result.stderr


def test_an_unknown_backend_is_an_error(tmp_path):
    result = run("import vrwkv", tmp_path, VRWKV_BACKEND="cuda", PYTHONPATH=str(Path(vrwkv.__file__).parent.parent))
    assert result.returncode != 0
    assert "VRWKV_BACKEND must be one of auto, torch, got 'cuda'" in result.stderr


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="counts imports on Linux")
def test_import_is_light(tmp_path):
    script = "import sys, timm; before = set(sys.modules); import vrwkv; print(*sorted(set(sys.modules) - before))"
    result = run(script, tmp_path, PYTHONPATH=str(Path(vrwkv.__file__).parent.parent), PYTHONDONTWRITEBYTECODE="1")
    assert result.returncode == 0, result.stderr
    added = result.stdout.split()
    # Time is no subject of a test; what costs it is: heavy packages must not come in with ours.
    heavy = {"matplotlib", "sklearn", "mmseg", "mmengine", "mmcv", "onnx", "onnxscript", "pandas", "scipy", "triton"}
    assert not heavy & {name.split(".")[0] for name in added}
    assert not list(tmp_path.iterdir())
