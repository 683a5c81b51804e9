"""The build's messages, what was built, and where it can be imported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import layerwise_ext
import pytest
import torch
from layerwise_ext import _info
from layerwise_ext._ops import _C

SOURCE = Path(__file__).parent.parent
TOOLS = {
    name: shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") for name in ("cmake", "ninja")
}

needs_build_tools = pytest.mark.skipif(
    None in TOOLS.values() or shutil.which("c++") is None,
    reason="cmake, ninja and a C++ compiler are needed to configure",
)


def configure(
    build: Path, *options: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs CMake's configuration step alone. Newlines in its output are folded, for CMake wraps its messages."""
    command = [TOOLS["cmake"], "-S", SOURCE, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={TOOLS['ninja']}"]
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDAHOSTCXX", "CUDA_HOME")}
    result = subprocess.run(
        [*command, f"-DPython_EXECUTABLE={python}", *options], env=kept | environment, capture_output=True, text=True
    )
    result.stdout = re.sub(r"\s+", " ", result.stdout + result.stderr)
    return result


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


# -- Messages of the build ---------------------------------------------------------------------------------------------


@needs_build_tools
def test_without_torch_the_remedy_is_no_build_isolation(tmp_path):
    venv.create(tmp_path / "bare", symlinks=True)
    result = configure(tmp_path / "build", python=str(tmp_path / "bare/bin/python"), PYTHONPATH="")
    assert result.returncode != 0
    assert "torch was not found" in result.stdout
    assert "pip install --no-build-isolation ." in result.stdout


@needs_build_tools
@pytest.mark.parametrize(
    ("version", "messages"),
    [
        ("2.10.1+cu128", ["torch 2.10.1+cu128 is too old", "needs torch >= 2.11", "pip install 'torch>=2.11'"]),
        ("2.11.0", ["the torch installation in", "is incomplete. Install it again"]),
    ],
)
def test_unusable_torch_is_named(tmp_path, version, messages):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    result = configure(tmp_path / "build", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert all(message in result.stdout for message in messages), result.stdout


def folders_with_nvcc() -> list[str]:
    folders = [*os.environ["PATH"].split(":"), "/usr/local/cuda/bin", "/usr/local/bin", "/usr/bin"]
    return [folder for folder in folders if Path(folder, "nvcc").exists()]


@needs_build_tools
def test_cuda_on_without_nvcc_fails(tmp_path):
    hidden = f"-DCMAKE_IGNORE_PATH={';'.join(folders_with_nvcc())}"
    result = configure(tmp_path, "-DLAYERWISE_CUDA=ON", hidden)
    assert result.returncode != 0
    assert "nvcc was not found" in result.stdout
    assert "set CUDACXX to nvcc, or build with LAYERWISE_CUDA=OFF" in result.stdout


@needs_build_tools
def test_cuda_on_with_an_unsuitable_host_compiler_fails(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    result = configure(tmp_path / "build", "-DLAYERWISE_CUDA=ON", CUDACXX=str(nvcc))
    assert result.returncode != 0
    assert re.search("does not accept the host compiler .*CUDAHOSTCXX", result.stdout)


@needs_build_tools
def test_cuda_auto_without_nvcc_builds_for_the_cpu(tmp_path):
    result = configure(tmp_path, "-DCMAKE_IGNORE_PATH=" + ";".join(folders_with_nvcc()))
    assert result.returncode == 0, result.stdout
    info = (tmp_path / "build_info.h").read_text()
    assert 'kCuda = "not in, because nvcc was not found"' in info
    assert 'kCutlass = "not in, because there are no CUDA kernels in the build"' in info


@needs_build_tools
def test_cuda_takes_three_values(tmp_path):
    result = configure(tmp_path, "-DLAYERWISE_CUDA=maybe")
    assert result.returncode != 0
    assert "LAYERWISE_CUDA must be AUTO, ON or OFF, got 'maybe'" in result.stdout


@needs_build_tools
def test_cutlass_takes_three_values(tmp_path):
    result = configure(tmp_path, "-DLAYERWISE_CUDA=OFF", "-DLAYERWISE_CUTLASS=maybe")
    assert result.returncode != 0
    assert "LAYERWISE_CUTLASS must be AUTO, ON or OFF, got 'maybe'" in result.stdout


@needs_build_tools
def test_cutlass_on_without_cuda_fails(tmp_path):
    result = configure(tmp_path, "-DLAYERWISE_CUDA=OFF", "-DLAYERWISE_CUTLASS=ON")
    assert result.returncode != 0
    assert "there are no CUDA kernels in the build. Build with LAYERWISE_CUDA=ON" in result.stdout


@needs_build_tools
@pytest.mark.skipif(not folders_with_nvcc(), reason="nvcc (the CUDA toolkit) was not found")
@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        ("90a-real", "nvidia-cutlass was not found by .*pip install --no-deps nvidia-cutlass"),
        ("80-real;90-virtual", "sm_90a, which is not among the architectures .*Add 90a-real"),
    ],
)
def test_cutlass_on_that_cannot_be_met_fails(tmp_path, architectures, message):
    (tmp_path / "cutlass_library").mkdir()  # found before an installed one, and without headers
    (tmp_path / "cutlass_library/__init__.py").touch()
    options = ["-DLAYERWISE_CUDA=ON", "-DLAYERWISE_CUTLASS=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
    result = configure(tmp_path / "build", *options, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert re.search(message, result.stdout), result.stdout


# -- What was built ----------------------------------------------------------------------------------------------------


def test_versions_agree():
    assert _C.build_info()["version"] == layerwise_ext.__version__


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is needed to list symbols")
def test_library_uses_only_the_stable_abi():
    """C++ symbols of torch change from release to release; one of them would tie the build to one torch."""
    symbols = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--format=posix", _C.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split()[0] for line in symbols.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert [name for name in names if re.match(r"_ZN?K?(2at|3c10|5torch|6caffe2)", name)] == []


def test_info_says_what_was_built_and_why_cuda_is_or_is_not_in():
    layerwise_ext.empty_cache()  # the report says how much is in it
    facts = _info.collect()
    assert facts["layerwise_ext"] == layerwise_ext.__version__
    assert facts["torch"].startswith(torch.__version__)
    assert "portable" in facts["CPU kernels"]
    assert re.match("nvcc [0-9.]+ for [0-9]|not in, because ", facts["CUDA kernels"])
    assert re.match("[0-9.]+, convolutions for sm_90a|not in, because ", facts["CUTLASS"])
    result = subprocess.run([sys.executable, "-m", "layerwise_ext", "info"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == _info.report()


# -- Choice of the instruction set -------------------------------------------------------------------------------------


def test_cpu_capability_can_be_switched():
    names, chosen = _C.cpu_capabilities(), _C.cpu_capability()
    assert names[-1] == "portable"
    try:
        for name in names:
            _C.set_cpu_capability(name)
            assert _C.cpu_capability() == name
        with pytest.raises(ValueError, match=r"'avx1024' is not available; this build and machine have: .*portable"):
            _C.set_cpu_capability("avx1024")
    finally:
        _C.set_cpu_capability(chosen)


def test_cpu_capability_from_the_environment():
    show = "from layerwise_ext._ops import _C; print(_C.cpu_capability())"
    assert run_python(show, LAYERWISE_CPU_CAPABILITY="portable").stdout.strip() == "portable"
    wrong = run_python(show, LAYERWISE_CPU_CAPABILITY="avx1024")
    assert wrong.returncode != 0
    assert "'avx1024' is not available" in wrong.stderr


# -- Import ------------------------------------------------------------------------------------------------------------


def test_import_needs_no_tools():
    """Neither a compiler nor nvcc nor anything else on PATH."""
    result = run_python(
        "import layerwise_ext as lw; print(lw.__version__)", PATH="/nonexistent", CUDA_VISIBLE_DEVICES=""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == layerwise_ext.__version__


def test_import_needs_only_what_is_required():
    """Packages that extras bring are imported where they are used."""
    required = re.search(r"^dependencies = .*$", (SOURCE / "pyproject.toml").read_text(), re.MULTILINE)[0]
    packages = ("PIL", "matplotlib", "scipy", "sklearn", "tensorboard", "torchvision", "tqdm")
    others = [name for name in packages if f'"{name}"' not in required]
    result = run_python(f"import sys; sys.modules |= dict.fromkeys({others}); import layerwise_ext")
    assert result.returncode == 0, result.stderr
