"""``pytest --backend=simt`` (or ``cuda``) runs the operators' CUDA code in place of the CPU kernels: backends.py."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Graphs that another build of the package left on disk call its operators as they were then.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import backends
import pytest
from fuse_cases import Counter
from layerwise_ext import _C, functional

# The programs may not be there, beside the tests.
collect_ignore_glob = [] if importlib.util.find_spec("bench_stage") else ["test_benchmark*"]
AVX512 = [name for name in _C.cpu_capabilities() if name.startswith("avx512")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=("cpu", "simt", "cuda"), default="cpu", help="whose kernels are tested")


def pytest_configure(config: pytest.Config) -> None:
    if "LAYERWISE_SANITIZED" in os.environ and _C.build_info()["sanitizers"] != "ON":  # also in each worker
        raise pytest.UsageError(f"{_C.__file__} was built without sanitizers")
    config.addinivalue_line("markers", "cpu_kernels: only the CPU's kernels have it; left out with other backends")
    backend = config.getoption("--backend")
    if backend != "cpu":
        backends.install(backend)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--backend") == "cpu":
        return
    left_out = [item for item in items if item.get_closest_marker("cpu_kernels") is not None]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def restored_capability() -> Iterator[None]:
    before = _C.cpu_capability()
    yield
    _C.set_cpu_capability(before)


@pytest.fixture(params=AVX512)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine that has convolutions of this package's own."""
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter = Counter(functional.conv_bn_act)
    monkeypatch.setattr(functional, "conv_bn_act", counter)
    return counter
