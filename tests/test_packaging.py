"""What a source distribution holds, and what is installed where nothing can be compiled."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.scripts import REPOSITORY


def test_compiled_kernels_load_on_old_machines():
    """Nothing of the C and C++ libraries is newer than what manylinux_2_28 has; nothing of torch's is brought along."""
    elf = pytest.importorskip("elftools.elf.elffile")
    libraries = list((REPOSITORY / "vrwkv").glob("_*.abi3.so"))
    if not libraries:
        pytest.skip("the kernels are not built")
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8,)}
    for path in libraries:
        with open(path, "rb") as file:
            binary = elf.ELFFile(file)
            needed = [(library.name, each.name) for library, versions in
                      binary.get_section_by_name(".gnu.version_r").iter_versions() for each in versions]  # fmt: skip
        assert needed
        for library, version in needed:
            name, _, number = version.partition("_")
            assert tuple(map(int, number.split("."))) <= newest[name], f"{path.name} needs {version} of {library}"


def test_extras_are_not_imported_by_the_core():
    extras = {"gradio", "matplotlib", "mmcv", "mmengine", "mmseg", "onnx", "onnxruntime", "pydantic", "transformers"}
    code = "import sys, timm; before = set(sys.modules); import vrwkv.layers, vrwkv.models, vrwkv.ops; " \
           "print(*(set(sys.modules) - before))"  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "vrwkv.models" in loaded
    assert not loaded & extras


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
        ({"VRWKV_CUDA": "1", "CUDA_HOME": "/nowhere"}, "nvcc (CUDA_HOME is /nowhere): install them"),
        ({"VRWKV_NATIVE": "yes"}, "VRWKV_NATIVE must be auto, 0 or 1, got 'yes'"),
    ],
)
def test_builds_that_cannot_be(checkout, environment, message):
    result = setup(checkout, "--version", **environment)
    assert result.returncode != 0
    assert message in result.stderr


def test_cuda_without_its_compiler_is_no_error(checkout, tmp_path):
    result = setup(checkout, "--version", CUDA_HOME=str(tmp_path), VRWKV_CUDA="auto")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("listed", "binaries", "ptx"),
    [
        ("52 60 61 70 72 75 80 86 87 89 90", [75, 80, 86, 89, 90], [90]),
        ("75 80 86 87 88 89 90 100 110 103 120 121", [75, 80, 86, 89, 90, 100, 110, 120], [90, 120]),
        ("80 86 87 88 89 90 100 110 103 120 121 130", [80, 86, 89, 90, 100, 110, 120, 130], [90, 130]),
    ],
    ids=["12.4", "13.0", "to come"],
)
def test_architectures_are_those_that_nvcc_knows(monkeypatch, tmp_path, listed, binaries, ptx):
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\nprintf 'compute_%s\\n' {listed}\n")
    nvcc.chmod(0o755)
    built = {}
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("setuptools.setup", lambda **arguments: built.update(arguments))
    for name in ("TORCH_CUDA_ARCH_LIST", "VRWKV_NATIVE", "VRWKV_CUDA"):
        monkeypatch.delenv(name, raising=False)
    runpy.run_path("setup.py")
    [flags] = [each.extra_compile_args["nvcc"] for each in built["ext_modules"] if each.name == "vrwkv._cuda"]
    assert [flag for flag in flags if "arch" in flag] == [
        f"-gencode=arch=compute_{number},code={kind}_{number}"
        for kind, numbers in (("sm", binaries), ("compute", ptx)) for number in numbers
    ]  # fmt: skip
    assert "-fvisibility=hidden" in flags
