"""Each memory-bound pass on the CPU: the bytes that it must move, its time, its share of the bandwidth of a copy.

    python benchmarks/roofline.py [--quick]

Bytes are those of the maps that a pass reads and writes once each, moments and coefficients left out; max and average
pooling write a quarter.  The ceiling is `torch.Tensor.copy_` of a map of the same size, which moves two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import layerwise_ext as lw
import torch
from harness import RESULTS, Quartiles, Sampling, environment, interleave, write_json
from layerwise_ext import _C
from layerwise_ext._ops import Form
from peers import DTYPES, Step

FULL = Sampling(warmup=3, min_rounds=20, max_rounds=100, seconds=10.0)
QUICK = Sampling(warmup=1, min_rounds=3, max_rounds=3, seconds=1.0)
SHAPE, QUICK_SHAPE, BINS = (64, 64, 64, 64), (4, 64, 16, 16), [4, 4]


def passes(shape: Sequence[int], dtype: torch.dtype) -> dict[str, tuple[float, Callable[[], Any]]]:
    """Maps that a pass moves, and the pass."""
    operators = torch.ops.layerwise_ext
    n, c, h, w = shape
    z, g, residual = (torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(3))
    half = g[..., : h // 2, : w // 2].contiguous(memory_format=torch.channels_last)
    p = torch.randn(n, c, *BINS).contiguous(memory_format=torch.channels_last)
    one, zero = torch.ones(c), torch.zeros(c)
    sums = torch.zeros(2 * p.numel())
    target = torch.empty_like(z)
    normal = (zero, one, one, zero)  # mean, var, weight, bias
    plain, added = Form(bins=BINS), Form(bins=BINS, residual=residual)
    pooled, gelu = Form(bins=BINS, downsample="max", window=[2, 2]), Form(bins=BINS, activation="gelu")

    def apply(form: Form) -> Callable[[], Any]:
        return lambda: operators.bn_act_moments(z, one, zero, zero, one, *form, False, True)

    def sums_of(form: Form, grad: torch.Tensor) -> Callable[[], Any]:
        return lambda: operators.bn_act_moments_backward_sums(z, grad, None, None, sums, *normal, *form)

    def gradient(form: Form, grad: torch.Tensor | None, needs_residual: bool = False) -> Callable[[], Any]:
        moment = p if grad is None else None
        return lambda: operators.bn_act_moments_backward(
            z, grad, moment, None, zero, zero, *normal, *form, 1e6, needs_residual
        )

    return {
        "copy": (2, lambda: target.copy_(z)),
        "statistics": (1, lambda: operators.batch_norm_statistics(z)),
        "apply": (2, apply(plain)),
        "apply, residual": (3, apply(added)),
        "apply, max 2x2": (1.25, apply(pooled)),
        "apply, GELU": (2, apply(gelu)),
        "dense sums": (2, sums_of(plain, g)),
        "dense sums, max 2x2": (1.25, sums_of(pooled, half)),
        "input gradient": (2, gradient(plain, None)),
        "input gradient, max 2x2": (2, gradient(pooled, None)),
        "input gradient, dense": (3, gradient(plain, g)),
        "input gradient, dense, residual": (5, gradient(added, g, True)),
        "input gradient, dense, max 2x2": (2.25, gradient(pooled, half)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Bandwidth of each memory-bound pass on the CPU.")
    parser.add_argument("--quick", action="store_true", help="small maps, few rounds")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    arguments = parser.parse_args(argv)
    output = arguments.output or RESULTS / f"roofline-cpu{'-partial' if arguments.quick else ''}.json"
    shape = QUICK_SHAPE if arguments.quick else SHAPE
    result: dict[str, Any] = {"benchmark": "roofline", **environment(), "shape": shape, "passes": []}
    result["machine"]["layerwise_cpu_capability"] = _C.cpu_capability()
    result["versions"]["layerwise_ext"] = lw.__version__
    for name, dtype in DTYPES.items():
        runs = passes(shape, dtype)
        map_bytes = torch.Size(shape).numel() * dtype.itemsize
        steps = {key: Step(run, lambda: None) for key, (_, run) in runs.items()}
        times = interleave(steps, QUICK if arguments.quick else FULL)
        speeds = {key: runs[key][0] * map_bytes / Quartiles.of(seconds).median for key, seconds in times.items()}
        for key, seconds in times.items():
            milliseconds = Quartiles.of(1e3 * t for t in seconds).as_dict()
            share = speeds[key] / speeds["copy"]
            entry = {"pass": key, "dtype": name, "maps": runs[key][0], "milliseconds": milliseconds}
            result["passes"].append({**entry, "bytes_per_second": speeds[key], "share_of_copy": share})
            print(
                f"{name} {key:34} {milliseconds['median']:7.2f} ms {speeds[key] / 1e9:6.1f} GB/s {share:5.0%} of a copy"
            )
    write_json(output, result)
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
