"""Peak memory of one training step in this process.

What is measured is the live memory that a step needs beyond the input, the parameters and everything else that exists
before it: activations, gradients of maps and of parameters, workspaces of the convolution.  A profiler of torch's
allocator would not do, because it sees neither the blocks of this package's own pool nor the workspaces of oneDNN.  So
the kernel is asked: the resident memory of the process (VmRSS) just before the step, and the high-water mark (VmHWM)
that the step left, after resetting it through /proc/self/clear_refs.

For that number to be live memory, freed memory must leave the process, for every contestant alike:

- The C library's mmap threshold is fixed at 64 KiB, so each larger tensor is its own mapping, gone when it is freed,
  instead of a hole in a heap that stays resident (the default threshold grows to 32 MiB as a program runs).
- Before the step: garbage collection, this package's `empty_cache()`, `malloc_trim(0)`.  Within the step the pool of
  this package behaves as usual: what it keeps after a free counts.
- Two steps run before (compilation, code pages, workspaces that are kept for good); gradients are dropped before the
  step, as ``zero_grad()`` does, so their allocation counts.

The pool rounds blocks up to 64 KiB, which counts too.  Memory that is allocated but never written does not count: eager
batch norm's backward, for one, allocates a map that it drops unused.  The kernel's counter is exact to some hundred KiB
on small machines (it is batched per core), so steps with smaller maps are not judged by it.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from layerwise_ext._ops import _C

M_MMAP_THRESHOLD = -3  # malloc.h
MMAP_THRESHOLD_BYTES = 64 << 10
WARMUP_STEPS = 2
MEASURED_STEPS = 3

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def unavailable() -> str | None:
    """Why the peak cannot be measured here, or None where it can."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return "peak memory is measured on Linux with the GNU C library only"
    try:
        _CLEAR_REFS.write_text("5")
    except OSError as error:
        return f"the high-water mark of the memory cannot be reset: {error}"
    return None


def return_freed_memory() -> None:
    """Makes malloc map each block of 64 KiB or more on its own.

    To be called before any tensor exists: a hole that one left in the heap would be filled first.
    """
    if ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) != 1:
        raise RuntimeError("mallopt refused the mmap threshold")


def peak_of_step(step: Callable[[], None], release: Callable[[], None]) -> int:
    """Bytes by which one step raises the resident memory above its level after ``release``."""
    libc = ctypes.CDLL(None)
    peaks = []
    for measured in range(-WARMUP_STEPS, MEASURED_STEPS):
        release()
        _C.empty_cache()
        gc.collect()
        libc.malloc_trim(0)
        _CLEAR_REFS.write_text("5")  # the high-water mark starts again from the resident memory
        before = _status_bytes("VmRSS")
        step()
        if measured >= 0:
            peaks.append(_status_bytes("VmHWM") - before)
    return int(statistics.median(peaks))


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024  # "VmRSS:    8728 kB"
    raise RuntimeError(f"{_STATUS} has no {field}")
