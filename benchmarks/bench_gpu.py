"""The stage-local training step on a GPU, against PyTorch eager, compiled and captured, and the memory-bound kernels.

    python benchmarks/bench_gpu.py            all rows, bf16
    bash benchmarks/run_gpu.sh                builds and tests first

Times are CUDA events around each step, from an idle device, interleaved round by round in one process; channels_last,
cudnn.benchmark on. A step that is *captured* replays a CUDA graph of the same work. Peak memory is what PyTorch's
allocator hands out during a step, beyond what lives before it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import layerwise_ext as lw
import torch
import torch._dynamo
from bench_stage import DisagreementError, agreement
from harness import RESULTS, Quartiles, environment, geometric_mean, ratios, write_json
from layerwise_ext._ops import Form
from peers import COMPILE, DTYPES, EAGER, OURS, Row, TrainingStep, inputs, training_step

MAX_AUTOTUNE = f"{COMPILE}:max-autotune"
OURS_CAPTURED, EAGER_CAPTURED = f"{OURS}, captured", f"{EAGER}, captured"
OURS_GRAPH = f"{OURS}, cuda_graph"  # LocalStage(..., cuda_graph=True): replay and loss.backward()

# The rows of bench_stage.py with larger batches, and shapes of ImageNet networks.
ROWS = (
    Row(256, 64, 64, 32, 4),
    Row(256, 128, 128, 16, 2),
    Row(256, 128, 256, 32, 4),
    Row(256, 64, 128, 32, 2),
    Row(256, 64, 64, 56, 4),
    Row(1024, 16, 16, 32, 4),
    Row(1024, 32, 32, 16, 4),
    Row(256, 256, 512, 8, 2),
    Row(256, 3, 64, 32, 4),
    Row(256, 64, 128, 28, 2, 2),
    Row(256, 64, 256, 56, 4, 1, 1),
    Row(256, 128, 128, 28, 4),
    Row(256, 256, 256, 14, 2),
    Row(256, 64, 64, 32, 4, form="max"),
    Row(256, 64, 64, 32, 4, form="residual"),
    Row(256, 512, 512, 7, 1),
)

# What the package sets out to reach: printed beside the result, never asserted.
TARGETS = {EAGER: 2.0, COMPILE: 1.4, "captured": 1.2, "bandwidth": 0.8, "memory": 0.5}
ROUNDS, WARMUP = 30, 5
KERNEL_BYTES = 1 << 30  # of one map: far beyond any L2 cache


class Captured(NamedTuple):
    """A step as a CUDA graph: `run` replays it, gradients stay where they are."""

    graph: torch.cuda.CUDAGraph
    step: TrainingStep  # keeps the parameters alive that the graph works on

    def run(self) -> None:
        self.graph.replay()

    def prepare(self) -> None:
        pass


def capture(step: TrainingStep) -> Captured:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.prepare()
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    step.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    return Captured(graph, step)


def device_time(
    runs: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]], rounds: int, hide_launches: bool = False
) -> dict[str, list[float]]:
    """Seconds of each (prepare, run) in each round, from an idle device to its last kernel's end.

    That counts what the host needs to launch, as it does for who runs steps one by one; with ``hide_launches`` the
    device is kept busy until everything is launched, and the kernels alone count.
    """
    for prepare, run in runs.values():
        for _ in range(WARMUP):
            prepare()
            run()
    torch.cuda.synchronize()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, (prepare, run) in runs.items():
                prepare()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                if hide_launches:
                    torch.cuda._sleep(2_000_000)  # about a millisecond
                begin.record()
                run()
                end.record()
                events[name].append((begin, end))
            torch.cuda.synchronize()
    finally:
        gc.enable()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}


def peak_bytes(step: TrainingStep) -> int:
    step.prepare()
    step.run()
    step.prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def measure_row(row: Row, dtype: str, names: Sequence[str]) -> dict[str, Any]:
    torch._dynamo.reset()
    data = inputs(row, DTYPES[dtype], device="cuda")
    training = {
        name: training_step(OURS if name == OURS_GRAPH else name, row, DTYPES[dtype], *data)
        for name in names
        if "captured" not in name
    }
    if OURS_GRAPH in training:
        training[OURS_GRAPH].module.stage.cuda_graph = True
    difference = agreement(training[OURS], training[EAGER], row, dtype)
    # Not of those that keep their memory in graphs.
    peaks = {name: peak_bytes(step) for name, step in training.items() if name not in (MAX_AUTOTUNE, OURS_GRAPH)}
    steps: dict[str, TrainingStep | Captured] = dict(training)
    for captured, source in ((OURS_CAPTURED, OURS), (EAGER_CAPTURED, EAGER)):
        if captured in names:
            # A step of its own: its gradients live in the graph's memory.
            steps[captured] = capture(training_step(source, row, DTYPES[dtype], *data))
    times = device_time({name: (step.prepare, step.run) for name, step in steps.items()}, ROUNDS)
    return {
        "row": row._asdict(),
        "dtype": dtype,
        "difference_to_eager": difference,
        "milliseconds": {name: Quartiles.of(1e3 * t for t in seconds).as_dict() for name, seconds in times.items()},
        "ratio": {name: ratios(times[name], times[OURS]).as_dict() for name in times if name != OURS},
        "ratio_captured": {
            name: ratios(times[name], times[OURS_CAPTURED]).as_dict()
            for name in times
            if OURS_CAPTURED in times and name not in (OURS, OURS_GRAPH, OURS_CAPTURED)
        },
        "peak_bytes": peaks,
    }


def print_row(entry: dict[str, Any]) -> None:
    row = Row(**entry["row"])
    times = "  ".join(f"{name} {t['median']:.3f}" for name, t in entry["milliseconds"].items())
    peaks = entry["peak_bytes"]
    print(f"{entry['dtype']} {row!s:28} ms: {times}; memory {peaks[OURS] / peaks[EAGER]:.2f} of eager's", flush=True)


def ceilings() -> dict[str, float]:
    """Copy bandwidth in bytes per second, and bf16 matrix products in operations per second."""
    a = torch.randn(KERNEL_BYTES // 2, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    n = 8192
    x, y = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = device_time({"copy": (_nothing, lambda: b.copy_(a)), "product": (_nothing, lambda: x @ y)}, ROUNDS, True)
    return {
        "copy_bytes_per_second": 2 * KERNEL_BYTES / Quartiles.of(times["copy"]).median,
        "bf16_product_flops": 2 * n**3 / Quartiles.of(times["product"]).median,
    }


def _nothing() -> None:
    pass


def kernel_runs(dtype: torch.dtype) -> tuple[int, dict[str, tuple[float, Callable[[], Any]]]]:
    """Bytes of a map beyond the L2 cache, and for each pass how many times it moves one, and the pass."""
    operators = torch.ops.layerwise_ext
    n, c, size, bins = 256, 256, 64, 4
    z = torch.randn(n, c, size, size, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    grad_y = torch.randn_like(z)
    one, zero = torch.ones(c, device="cuda"), torch.zeros(c, device="cuda")
    p = torch.randn(n, c, bins, bins, device="cuda").contiguous(memory_format=torch.channels_last)
    form = Form(bins=[bins, bins])
    given = (one, zero, zero, one)  # weight, bias, mean, var
    normalization = (zero, one, one, zero, *form)  # mean, var, weight, bias
    gradient = (z, None, p, None, zero, zero, *normalization, 1e6, False)
    half = grad_y[..., : size // 2, : size // 2].contiguous(memory_format=torch.channels_last)
    added, pooled = form._replace(residual=grad_y), form._replace(downsample="max", window=[2, 2])
    dense_sums = (z, grad_y, None, None, zero, *normalization)
    dense_gradient = (z, grad_y, None, None, zero, zero, *normalization, 1e6, False)
    return z.numel() * z.element_size(), {
        "statistics": (1, lambda: operators.batch_norm_statistics(z)),
        "apply, m1": (2, lambda: operators.bn_act_moments(z, *given, *form, False, True)),
        "apply, m1 and m2": (2, lambda: operators.bn_act_moments(z, *given, *form, True, True)),
        "input gradient": (2, lambda: operators.bn_act_moments_backward(*gradient)),
        "dense sums": (2, lambda: operators.bn_act_moments_backward_sums(*dense_sums)),
        "input gradient, dense": (3, lambda: operators.bn_act_moments_backward(*dense_gradient)),
        "apply, residual": (3, lambda: operators.bn_act_moments(z, *given, *added, False, True)),
        "apply, max 2x2": (1.25, lambda: operators.bn_act_moments(z, *given, *pooled, False, True)),
        "input gradient, dense, residual": (
            5,
            lambda: operators.bn_act_moments_backward(*dense_gradient[:10], *added, 1e6, True),
        ),
        "input gradient, dense, max 2x2": (
            2.25,
            lambda: operators.bn_act_moments_backward(z, half, *dense_gradient[2:10], *pooled, 1e6, False),
        ),
    }


def measure_kernels(bandwidth: float) -> dict[str, Any]:
    """The share of the copy bandwidth that each pass over a map reaches, from the bytes that it must move."""
    result: dict[str, Any] = {}
    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        map_bytes, runs = kernel_runs(dtype)
        times = device_time({key: (_nothing, run) for key, (_, run) in runs.items()}, ROUNDS, True)
        for key, (maps, _) in runs.items():
            seconds = Quartiles.of(times[key]).median
            share = maps * map_bytes / seconds / bandwidth
            result[f"{key}, {name}"] = {
                "milliseconds": 1e3 * seconds,
                "bytes": maps * map_bytes,
                "share_of_copy": share,
            }
            print(f"{key}, {name}: {1e3 * seconds:.3f} ms, {share:.0%} of the copy bandwidth", flush=True)
    return result


def summarise(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for kind in ("ratio", "ratio_captured"):
        for name in dict.fromkeys(name for e in entries for name in e[kind]):
            values = [e[kind][name]["median"] for e in entries if name in e[kind]]
            summary[f"{kind}: {name}"] = {"geometric_mean": geometric_mean(values), "worst": min(values)}
    memory = [e["peak_bytes"][OURS] / e["peak_bytes"][EAGER] for e in entries]
    summary["memory"] = {"geometric_mean": geometric_mean(memory), "worst": max(memory)}
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The stage-local training step against PyTorch, on a GPU.")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--rows", nargs="+", type=Row.parse, default=ROWS)
    parser.add_argument("--no-max-autotune", dest="max_autotune", action="store_false", help="it compiles for minutes")
    parser.add_argument("--autotune", action="store_true", help="let the autotuner choose convolutions")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_stage-gpu.json")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which no further row is compiled")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this benchmark needs one")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = "fp32" not in arguments.dtypes  # else fp32 is not float32
    if arguments.autotune:
        lw.autotune.enable()
    names = [OURS, EAGER, COMPILE, OURS_GRAPH, OURS_CAPTURED, EAGER_CAPTURED]
    result = {"benchmark": "bench_gpu", **environment()}
    result["machine"]["gpu"] = torch.cuda.get_device_name()
    result["versions"]["cuda"] = torch.version.cuda
    result["targets"] = TARGETS
    result["ceilings"] = ceilings()
    print({name: f"{value:.3g}" for name, value in result["ceilings"].items()}, flush=True)
    result["kernels"] = measure_kernels(result["ceilings"]["copy_bytes_per_second"])
    result["rows"], failed = [], False
    for row, dtype in itertools.product(arguments.rows, arguments.dtypes):
        try:
            result["rows"].append(measure_row(row, dtype, names))
        except DisagreementError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        print_row(result["rows"][-1])
        result["autotuned"] = lw.autotune.choices()
        write_json(arguments.output, {**result, "summary": summarise(result["rows"])})  # what there is so far
    # Last, because it compiles for up to a minute per row: as many rows as there is time for.
    for entry in result["rows"] if arguments.max_autotune else []:
        row = Row(**entry["row"])
        if time.monotonic() - start > arguments.budget:
            print(f"{MAX_AUTOTUNE}: no time for the rows from {row} on; --budget SECONDS")
            break
        more = measure_row(row, entry["dtype"], [OURS, EAGER, MAX_AUTOTUNE])
        for field in ("milliseconds", "ratio"):
            entry[field][MAX_AUTOTUNE] = more[field][MAX_AUTOTUNE]
        print(f"{entry['dtype']} {row!s:28} {MAX_AUTOTUNE}: {entry['ratio'][MAX_AUTOTUNE]['median']:.2f}x", flush=True)
        write_json(arguments.output, {**result, "summary": summarise(result["rows"])})
    for name, value in (summarise(result["rows"]) if result["rows"] else {}).items():
        print(f"{name}: geometric mean {value['geometric_mean']:.2f}, worst {value['worst']:.2f}")
    print(f"targets: {TARGETS}\nwritten: {arguments.output}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
