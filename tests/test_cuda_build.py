"""Every CUDA kernel compiles for every architecture, without warnings, spills or local memory; no GPU is needed.

Needs nvcc. The build is that of the installation where that is a strict one, as `make test` makes it, otherwise one in
a folder of its own; only what changed is compiled again.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import backends
import layerwise_ext
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [os.environ.get("CUDA_HOME", "") + "/bin", "/usr/local/cuda/bin"]  # as cmake/DetectCuda.cmake
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], *FOLDERS]))
MOST_SECONDS = 360.0
CUTLASS = importlib.util.find_spec("cutlass_library")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc (the CUDA toolkit) was not found")


def cmake(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # cmake and ninja beside the interpreter
    environment = os.environ | {"PATH": path}
    return subprocess.run(["cmake", *arguments], capture_output=True, text=True, check=False, env=environment)


def output_of(program: Path) -> str:
    result = subprocess.run([program], capture_output=True, text=True)
    return result.stdout + result.stderr


def strict_folder() -> Path:
    """The build folder of an editable installation if it is strict; a configured one of this test otherwise."""
    for cache in (ROOT / "build").glob(f"cp{sys.version_info.major}{sys.version_info.minor}-*/CMakeCache.txt"):
        if "LAYERWISE_STRICT:BOOL=ON" in cache.read_text() and "cuda_kernels" in build_of(cache.parent):
            return cache.parent
    folder = ROOT / "build" / "cuda"
    options = ["-DLAYERWISE_CUDA=ON", "-DLAYERWISE_STRICT=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    options.append("-DLAYERWISE_CUTLASS=OFF")  # a test of its own
    configured = cmake("-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options)
    assert configured.returncode == 0, configured.stdout + configured.stderr
    return folder


def build_of(folder: Path) -> str:
    return (folder / "build.ninja").read_text()


@needs_nvcc
def test_every_kernel_compiles_without_spills() -> None:
    folder = strict_folder()
    start = time.monotonic()
    built = cmake("--build", str(folder), "--target", "cuda_kernels", "cuda_operators")
    assert built.returncode == 0, built.stdout[-6000:] + built.stderr
    assert time.monotonic() - start < MOST_SECONDS
    commands = build_of(folder)
    for flag in ("code=[sm_80]", "code=[sm_90a]", "code=[compute_90]", "--warn-on-spills", "-Werror=all-warnings"):
        assert flag in commands


@needs_nvcc
def test_the_compiler_fails_on_local_memory(tmp_path: Path) -> None:
    """The flags do what they are there for: an array that is indexed at run time lives in local memory."""
    source = tmp_path / "planted.cu"
    source.write_text(
        "__global__ void planted(float* x, int i) {\n"
        "  float a[64];\n"
        "  for (int k = 0; k < 64; ++k) a[k] = x[k] * x[k + 64];\n"
        "  for (int k = 0; k < 64; ++k) x[k] = a[(k * i) % 64];\n"
        "}\n"
    )
    flags = ["-arch=sm_80", "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage,-Werror"]
    result = subprocess.run(
        [str(NVCC), *flags, "-c", str(source), "-o", str(tmp_path / "planted.o")], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "Local memory used" in result.stdout + result.stderr


@needs_nvcc
def test_kernels_are_in_the_build_whatever_torch_has() -> None:
    """They register under CUDA and wait for a torch with a device; importing needs neither."""
    if layerwise_ext._ops._C.build_info()["CUDA kernels"].startswith("not in, because LAYERWISE_CUDA=OFF"):
        pytest.skip("built with LAYERWISE_CUDA=OFF")
    for name in backends.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"layerwise_ext::{name}", "CUDA"), name


@needs_nvcc
@pytest.mark.skipif(CUTLASS is None, reason="the package nvidia-cutlass is not installed")
def test_the_convolutions_of_cutlass_compile_without_spills_and_import(tmp_path: Path) -> None:
    """A whole build with them: it says what they can do, and is imported, without a device."""
    folder = ROOT / "build" / "cutlass"
    options = ["-DLAYERWISE_CUDA=ON", "-DLAYERWISE_CUTLASS=ON", "-DCMAKE_CUDA_ARCHITECTURES=90a-real"]
    options += ["-DLAYERWISE_STRICT=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    configured = cmake("-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options)
    assert configured.returncode == 0, configured.stdout + configured.stderr
    built = cmake("--build", str(folder))
    assert built.returncode == 0, built.stdout[-6000:] + built.stderr

    objects = sorted(folder.glob("CMakeFiles/cutlass_kernels.dir/csrc/cuda/cutlass/*.o"))
    compile_with = [NVCC, "-std=c++20", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*compile_with, ROOT / "tests/fused_plans.cpp", *objects, "-o", tmp_path / "plans"], check=True)
    assert output_of(tmp_path / "plans") == "6 kernels correct\n"

    source = Path(CUTLASS.submodule_search_locations[0]) / "source"
    compile_with += ["-arch=sm_90a", "--expt-relaxed-constexpr"]
    compile_with += ["-isystem", source / "include", "-isystem", source / "tools/util/include"]
    subprocess.run([*compile_with, ROOT / "tests/pixel_sums.cu", "-o", tmp_path / "pixel_sums"], check=True)
    assert output_of(tmp_path / "pixel_sums") == "correct\n"

    package = shutil.copytree(ROOT / "python" / "layerwise_ext", tmp_path / "layerwise_ext")
    for library in package.glob("_C.*.so"):  # of an editable installation
        library.unlink()
    (library,) = folder.glob("_C.*.so")
    shutil.copy(library, package)
    path = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])  # -S: before an editable installation
    code = "import layerwise_ext; print(layerwise_ext._ops._C.build_info()['CUTLASS'])"
    imported = subprocess.run(
        [sys.executable, "-S", "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.endswith("convolutions for sm_90a\n")
