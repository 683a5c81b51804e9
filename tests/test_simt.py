"""The simulator that runs the CUDA kernels without a GPU catches what a GPU would not forgive."""

from __future__ import annotations

import os
import subprocess

import backends
import pytest

SANITIZED = "LAYERWISE_SIMT_BUILD" in os.environ  # tests/sanitize.sh

# A bug of tests/simt/planted.cpp, and how it shows.
BUGS = {
    "missing barrier": "wrong result",  # nan, or what another thread wrote too early
    "different barriers": "threads wait at different barriers",
    "mask names a lane that exited": "the mask names a lane that has exited",
    "mask names a lane that is elsewhere": "lanes of its mask that do not come",
    "lane is not in the mask": "a lane is not in the mask of its own warp collective",
    "edge of shared memory": "a shared array was written out of its bounds",
}


def planted(bug: str) -> subprocess.CompletedProcess[str]:
    program = backends.build("planted") / "planted"
    return subprocess.run([program, bug], capture_output=True, text=True, check=False)


def test_the_correct_kernel_passes() -> None:
    result = planted("none")
    assert result.returncode == 0 and result.stdout == "correct\n", result.stdout + result.stderr


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str) -> None:
    result = planted(bug)
    assert result.returncode != 0
    assert BUGS[bug] in result.stdout, result.stdout + result.stderr


@pytest.mark.skipif(not SANITIZED, reason="needs AddressSanitizer: tests/sanitize.sh")
def test_the_sanitizer_sees_the_kernels() -> None:
    result = planted("edge of global memory")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr and "planted.cpp" in result.stderr


def test_statistics_from_the_sums_of_tiles() -> None:
    result = subprocess.run([backends.build("tile_sums") / "tile_sums"], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout == "correct\n", result.stdout + result.stderr
