"""What a source distribution holds, and what is installed where nothing can be compiled."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.scripts import REPOSITORY


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with an old binary in it, to build in."""
    path = tmp_path_factory.mktemp("checkout") / "vrwkv"
    ignored = (".venv", ".git", "data", "output", "build", "*.egg-info", "__pycache__", ".*_cache", "*.so")
    shutil.copytree(REPOSITORY, path, ignore=shutil.ignore_patterns(*ignored))
    (path / "vrwkv" / "_C.abi3.so").write_bytes(b"from another build")
    return path


def setup(checkout, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=checkout, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_source_distribution_is_whole_without_cuda(checkout):
    result = setup(checkout, "sdist", VRWKV_CUDA="0")
    assert result.returncode == 0, result.stderr
    [archive] = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    rooms = ["vrwkv", "configs", "tools", "tests", "docs", "demo", "examples", "benchmarks"]
    files = {
        str(path.relative_to(REPOSITORY)) for room in rooms for path in (REPOSITORY / room).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }  # fmt: skip
    assert {Path(name).suffix for name in files} >= {".cu", ".cuh", ".cpp", ".h", ".yaml", ".safetensors"}
    assert files | {"setup.py", "Makefile", "README.md", "LICENSE", "requirements-dev.txt"} <= packed
    assert not [name for name in packed if name.endswith(".so")]


@pytest.mark.parametrize("environment", [{"CXX": "no-such-compiler"}, {"VRWKV_NATIVE": "0"}], ids=["none", "unwanted"])
def test_wheel_without_a_compiler(checkout, tmp_path, environment):
    result = setup(checkout, "build", "-b", str(tmp_path / "build"), "bdist_wheel", "-d", str(tmp_path), **environment)
    assert result.returncode == 0, result.stderr
    assert ("pure-torch operators" in result.stderr) == ("CXX" in environment)
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "vrwkv/ops/_bi_wkv/torch_impl.py" in names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler", "VRWKV_NATIVE": "1"}, "VRWKV_NATIVE=1 needs a C++ compiler"),
        ({"VRWKV_NATIVE": "0", "VRWKV_CUDA": "1"}, "VRWKV_CUDA=1 needs the CPU kernels too"),
        ({"VRWKV_NATIVE": "yes"}, "VRWKV_NATIVE must be auto, 0 or 1, got 'yes'"),
    ],
)
def test_builds_that_cannot_be(checkout, environment, message):
    result = setup(checkout, "--version", **environment)
    assert result.returncode != 0
    assert message in result.stderr
