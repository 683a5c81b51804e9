"""Puts the CUDA operators in the place of the CPU's, so that every test of the operators is one of theirs.

``simt``: the CUDA code on the host (tests/simt), built here. ``cuda``: the device; arguments go there and results come
back, with the strides that they have.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layerwise_ext  # noqa: F401  # declares the operators
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = (
    "batch_norm_statistics",
    "convolution_statistics",
    "bn_act_moments",
    "conv_bn_act_moments",
    "conv_bn_act_inference",
    "bn_act_moments_backward_sums",
    "bn_act_moments_backward",
    "conv_bn_act_moments_backward",
    "conv_bn_act_moments_backward_",
    "update_running_statistics_",
    "pooled_linear_cross_entropy",
    "pooled_linear_cross_entropy_backward",
)
_libraries: dict[str, torch.library.Library] = {}  # by backend


def build(target: str = "layerwise_simt") -> Path:
    """The folder of the libraries, built if they are older than their sources. LAYERWISE_SIMT_BUILD names another."""
    if given := os.environ.get("LAYERWISE_SIMT_BUILD"):
        return Path(given)
    folder = ROOT / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of pytest's workers builds, the others wait
        if not (folder / "build.ninja").exists():
            python = f"-DPython_EXECUTABLE={sys.executable}"
            _run(["cmake", "-S", str(ROOT / "tests" / "simt"), "-B", str(folder), "-G", "Ninja", python])
        _run(["cmake", "--build", str(folder), "--target", target])
    return folder


def _run(command: list[str]) -> None:
    tools = Path(sys.executable).parent  # cmake and ninja beside the interpreter
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def installed() -> str | None:
    """The backend whose operators are in the place of the CPU's."""
    return next(iter(_libraries), None)


def install(backend: str) -> None:
    """From now on CPU tensors go through the CUDA kernels, in this process."""
    if installed():
        return
    if backend == "cuda":  # the tests compare with float64 and with themselves, bit by bit
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    if backend == "simt":
        torch.ops.load_library(str(build() / "layerwise_simt.so"))
    library = torch.library.Library("layerwise_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Overriding a previously registered kernel" is the purpose
        for name in OPERATORS:
            kernel = _on_device(name) if backend == "cuda" else getattr(torch.ops.layerwise_simt, name).default
            library.impl(name, kernel, "CPU", allow_override=True)
    _libraries[backend] = library  # it would take its kernels back when it is freed


def _copy(t: Any, device: str) -> Any:
    """With the strides of ``t``, and as far from a 16-byte boundary."""
    if not isinstance(t, Tensor):
        return t
    single = t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]  # of expanded dimensions
    span = 1 + sum((size - 1) * stride for size, stride in zip(single.shape, single.stride(), strict=True))
    offset = t.data_ptr() % 16 // t.element_size()
    copy = torch.empty(span + offset, dtype=t.dtype, device=device).as_strided(single.shape, single.stride(), offset)
    return copy.copy_(single).expand(t.shape)


def _on_device(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.layerwise_ext, name).default
    written = [i for i, argument in enumerate(operator._schema.arguments) if argument.alias_info is not None]

    def kernel(*args: Any) -> Any:
        there = [_copy(t, "cuda") for t in args]
        results = operator(*there)
        for i in written:
            args[i].copy_(there[i])
        if isinstance(results, Tensor):
            return _copy(results, "cpu")
        return None if results is None else tuple(_copy(t, "cpu") for t in results)

    return kernel
