"""What was built and what runs here: the text of ``layerwise-ext info``."""

from __future__ import annotations

import os
import platform

import torch

from layerwise_ext._ops import _C


def collect() -> dict[str, str]:
    """Names and values in the order in which they are shown."""
    built = _C.build_info()
    chosen = (
        "LAYERWISE_CPU_CAPABILITY" if "LAYERWISE_CPU_CAPABILITY" in os.environ else "the best that this machine runs"
    )
    return {
        "layerwise_ext": built["version"],
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (built with {built['torch at build']}, runs with {built['torch needed']})",
        "compiler": f"{built['compiler']}, {built['build type']}",
        "flags": built["flags"],
        "sanitizers": built["sanitizers"],
        "CPU kernels": f"built: {built['CPU kernels']}; in use: {_C.cpu_capability()} ({chosen})",
        "CPU threads": str(torch.get_num_threads()),
        "activation cache": f"at most {_C.cache_limit() / 2**20:.0f} MiB, now {_C.cached_bytes() / 2**20:.0f} MiB",
        "CUDA kernels": built["CUDA kernels"],
        "CUTLASS": built["CUTLASS"],
        "CUDA in torch": torch.version.cuda or "no",
    }


def report() -> str:
    """The same as aligned lines."""
    facts = collect()
    width = max(map(len, facts)) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in facts.items())
