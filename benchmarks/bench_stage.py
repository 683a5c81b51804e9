"""Times the stage-local training step of this package against PyTorch, eager and compiled, on the CPU.

    python benchmarks/bench_stage.py            all rows, fp32 and bf16, time and peak memory
    python benchmarks/bench_stage.py --quick    under 40 s

What a step is: peers.py.  How it is timed: harness.py.  How its memory is measured: peak_memory.py.  How to read the
result and how the README's table comes from it: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peak_memory
import torch
import torch._dynamo
from harness import (
    RESULTS,
    Quartiles,
    Sampling,
    environment,
    geometric_mean,
    interleave,
    ratios,
    write_json,
)
from layerwise_ext import _memory
from peers import (
    COMPILE,
    CONTIGUOUS,
    CONVOLUTION,
    DTYPES,
    EAGER,
    OURS,
    ROWS,
    STEPS,
    Row,
    Step,
    TrainingStep,
    convolution_step,
    eager_stage,
    inputs,
    training_step,
)

PEERS = (EAGER, CONTIGUOUS, COMPILE)

FULL = Sampling(warmup=3, min_rounds=15, max_rounds=100, seconds=10.0)
QUICK = Sampling(warmup=2, min_rounds=5, max_rounds=30, seconds=0.8)
QUICK_ROWS = (Row(128, 16, 16, 32, 4), Row(64, 128, 128, 16, 2, form="max"))
QUICK_MEMORY = (OURS, EAGER)
QUICK_SECONDS = 38.0
# What a quick run must have left to start these; the first compilation also starts the compiler's own machinery.
FIRST_COMPILE_SECONDS, COMPILE_SECONDS, MEMORY_SECONDS = 18.0, 8.0, 3.0
RESERVED_SECONDS = 14.0  # and what compilation leaves for the rest

# What the package sets out to reach; printed beside the result, never asserted: speed depends on the machine.
TARGETS: dict[str, Any] = {
    "ratio": {"fp32": {EAGER: 1.8, COMPILE: 2.0}, "bf16": {EAGER: 1.95, COMPILE: 2.0}},  # mean of peer's time / ours
    "worst_ratio": 1.08,  # of any row, at least
    "over_convolution": {"fp32": 1.12, "bf16": 1.18},  # geometric mean, at most
    "memory": {EAGER: 0.6},  # geometric mean of our peak / peer's, at most
}

# Largest relative difference to eager PyTorch in the norm of each gradient.  A pre-activation within rounding of zero
# may fall on the other side of the ReLU, which alone moves a gradient by about one over the square root of its terms.
TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2}


class DisagreementError(RuntimeError):
    """The variants do not compute the same step, so their times must not be compared."""


def agreement(ours: TrainingStep, eager: TrainingStep, row: Row, dtype: str) -> float:
    """Runs one step of each; the largest relative difference of loss, gradients and running statistics."""
    for step in (ours, eager):
        step.prepare()
    pairs = [("loss", ours.loss(), eager.loss())]
    for (name, parameter), mine in zip(eager.module.named_parameters(), ours.module.parameters(), strict=True):
        if mine.grad is None or parameter.grad is None:
            raise DisagreementError(f"{dtype} {row}: no gradient for {name}")
        pairs.append((f"gradient of {name}", mine.grad, parameter.grad))
    for (name, buffer), own in zip(eager.module.named_buffers(), ours.module.buffers(), strict=True):
        pairs.append((name, own, buffer))
    worst = 0.0
    for name, value, expected in pairs:
        if value.shape != expected.shape:
            raise DisagreementError(f"{dtype} {row}: {name} is {value.shape}, in PyTorch {expected.shape}")
        scale = expected.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
        difference = ((value.double() - expected.double()).norm() / scale).item()
        agrees = difference <= TOLERANCE[dtype] or _is_no_worse(name, value, expected, row, dtype)
        if not agrees:  # also for NaN
            raise DisagreementError(
                f"{dtype} {row}: {name} differs from eager PyTorch by {difference:.2g} relative to its norm, "
                f"allowed is {TOLERANCE[dtype]:.2g}; nothing was timed"
            )
        worst = max(worst, difference)
    return worst


def _is_no_worse(name: str, value: torch.Tensor, expected: torch.Tensor, row: Row, dtype: str) -> bool:
    """Whether a gradient is no further from float64 than eager PyTorch's, whose roundings flip more signs."""
    stage = eager_stage(row).double()
    x, target = inputs(row, DTYPES[dtype])
    stage(x.double(), target)[1].backward()
    exact = {f"gradient of {key}": parameter.grad for key, parameter in stage.named_parameters()}.get(name)
    if exact is None:
        return False
    errors = [(gradient.double() - exact).norm().item() for gradient in (value, expected)]
    return errors[0] <= errors[1]


def measure_time(row: Row, dtype: str, names: Sequence[str], sampling: Sampling) -> dict[str, Any]:
    """One entry of "rows" in the result file; times in milliseconds, ratios are peer's time / ours."""
    torch._dynamo.reset()  # each shape is compiled on its own, as a network with fixed shapes is
    data = inputs(row, DTYPES[dtype])
    training = {name: training_step(name, row, DTYPES[dtype], *data) for name in names}
    difference = agreement(training[OURS], training[EAGER], row, dtype)
    steps: dict[str, Step] = {**training, CONVOLUTION: convolution_step(row, DTYPES[dtype], data[0])}
    times = interleave(steps, sampling)
    return {
        "row": row._asdict(),
        "dtype": dtype,
        "difference_to_eager": difference,
        "rounds": len(times[OURS]),
        "milliseconds": {name: Quartiles.of(1e3 * t for t in seconds).as_dict() for name, seconds in times.items()},
        "ratio": {name: ratios(times[name], times[OURS]).as_dict() for name in names if name in PEERS},
        "over_convolution": {name: ratios(times[name], times[CONVOLUTION]).as_dict() for name in names},
        "peak_bytes": {},
        "least_bytes": row.least_bytes(DTYPES[dtype]),
    }


def summarise(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per dtype: geometric means over rows and the worst row, for each peer that was measured."""
    summary: dict[str, Any] = {}
    for dtype in dict.fromkeys(entry["dtype"] for entry in entries):
        chosen = [entry for entry in entries if entry["dtype"] == dtype]
        summary[dtype] = {"ratio": {}, "over_convolution": {}, "memory": {}}
        for name in STEPS:
            over = [e["over_convolution"][name]["median"] for e in chosen if name in e["over_convolution"]]
            if over:
                summary[dtype]["over_convolution"][name] = geometric_mean(over)
        for name in PEERS:
            speed = [(e["ratio"][name]["median"], str(Row(**e["row"]))) for e in chosen if name in e["ratio"]]
            if speed:
                summary[dtype]["ratio"][name] = _worst_and_mean(speed, min)
            measured = ((memory_ratio(e, name), str(Row(**e["row"]))) for e in chosen)
            memory = [(ratio, row) for ratio, row in measured if ratio is not None]
            if memory:
                summary[dtype]["memory"][name] = _worst_and_mean(memory, max)
    return summary


def memory_ratio(entry: dict[str, Any], peer: str) -> float | None:
    """Our peak / the peer's, or None where one was not measured or the maps are too small for the kernel's counter."""
    peaks = entry["peak_bytes"]
    if not {OURS, peer} <= peaks.keys() or entry["least_bytes"] < peak_memory.MEASURABLE_BYTES:
        return None
    return float(peaks[OURS] / peaks[peer])


def _worst_and_mean(values: list[tuple[float, str]], worst_of: Callable[..., tuple[float, str]]) -> dict[str, Any]:
    worst, row = worst_of(values)
    return {
        "geometric_mean": geometric_mean(value for value, _ in values),
        "worst": worst,
        "worst_row": row,
        "rows": len(values),
    }


# -- Output ------------------------------------------------------------------------------------------------------------

SHORT = {OURS: "ours", EAGER: "eager cl", CONTIGUOUS: "eager nchw", COMPILE: "compile", CONVOLUTION: "conv only"}


def print_times(entry: dict[str, Any]) -> None:
    def time_of(name: str) -> str:
        if name not in entry["milliseconds"]:
            return f"{'-':>14}"
        t = entry["milliseconds"][name]
        return f"{t['median']:8.2f} ±{(t['q3'] - t['q1']) / 2 / t['median']:4.0%}"

    def ratio_to(name: str) -> str:
        return f"{entry['ratio'][name]['median']:.2f}x".rjust(11) if name in entry["ratio"] else f"{'-':>11}"

    times = "".join(map(time_of, (*STEPS, CONVOLUTION)))
    over = f"{entry['over_convolution'][OURS]['median']:.2f}"
    row = Row(**entry["row"])
    print(f"{entry['dtype']:5}{row!s:24}{row.cells:3}{times}{''.join(map(ratio_to, PEERS))}{over:>10}", flush=True)


def print_times_header() -> None:
    print("\nTime of a step in ms, median and half the interquartile range; peer's time / ours; ours / conv only")
    times = "".join(f"{SHORT[name]:>14}" for name in (*STEPS, CONVOLUTION))
    print(f"{'':5}{'row':24}{'':3}{times}{''.join(f'{SHORT[name]:>11}' for name in PEERS)}{'/conv':>10}")


def print_memory(entry: dict[str, Any]) -> None:
    peaks = entry["peak_bytes"]
    shown = "".join(f"{peaks[n] / 2**20:12.1f}" if n in peaks else f"{'-':>12}" for n in STEPS)
    least = f"{entry['least_bytes'] / 2**20:12.1f}"
    ratio = memory_ratio(entry, EAGER)
    row = Row(**entry["row"])
    shown += least + ("-" if ratio is None else f"{ratio:.2f}").rjust(12)
    print(f"{entry['dtype']:5}{row!s:24}{row.cells:3}{shown}", flush=True)


def print_memory_header() -> None:
    print("\nPeak memory of a step beyond input and parameters, MiB; z + y is what no implementation can go below")
    print(f"{'':5}{'row':24}{'':3}{''.join(f'{SHORT[n]:>12}' for n in STEPS)}{'z + y':>12}{'ours/eager':>12}")


def print_summary(summary: dict[str, Any]) -> None:
    print("\nGeometric means over the rows")

    def verdict(met: bool, goal: str) -> str:
        return f"(target {goal}: {'met' if met else 'not met'})"

    for dtype, parts in summary.items():
        for name, result in parts["ratio"].items():
            mean, worst, goal = result["geometric_mean"], result["worst"], TARGETS["ratio"][dtype].get(name)
            text = f"{dtype}  {mean:.2f}x as fast as {SHORT[name]}, {result['rows']} rows"
            if goal is not None:
                text += " " + verdict(mean >= goal, f"{goal}x")
            text += f"; worst {worst:.2f}x in {result['worst_row']} "
            print(text + verdict(worst >= TARGETS["worst_ratio"], f"{TARGETS['worst_ratio']}x"))
        over = ", ".join(f"{SHORT[name]} {value:.2f}" for name, value in parts["over_convolution"].items())
        ours, most = parts["over_convolution"][OURS], TARGETS["over_convolution"][dtype]
        print(f"{dtype}  time / convolution only: {over} {verdict(ours <= most, f'at most {most}')}")
        for name, result in parts["memory"].items():
            mean, goal = result["geometric_mean"], TARGETS["memory"].get(name)
            text = f"{dtype}  {mean:.2f} of the peak memory of {SHORT[name]}"
            print(text if goal is None else f"{text} {verdict(mean <= goal, str(goal))}")


# -- The run -----------------------------------------------------------------------------------------------------------


class Budget:
    """Seconds that a run may take; without a limit everything fits."""

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.start = time.perf_counter()

    def fits(self, seconds: float) -> bool:
        return self.limit is None or time.perf_counter() - self.start + seconds <= self.limit


def time_rows(arguments: argparse.Namespace, sampling: Sampling, budget: Budget) -> list[dict[str, Any]]:
    print_times_header()
    entries = []
    needed = FIRST_COMPILE_SECONDS
    for row in arguments.rows:
        for dtype in arguments.dtypes:
            compiled = arguments.compile and budget.fits(needed + RESERVED_SECONDS)
            names = [name for name in STEPS if name != COMPILE or compiled]
            entries.append(measure_time(row, dtype, names, sampling))
            print_times(entries[-1])
            needed = COMPILE_SECONDS if compiled else needed
    return entries


def measure_memory(entries: Sequence[dict[str, Any]], names: Sequence[str], threads: int, budget: Budget) -> None:
    """Fills in "peak_bytes", each value from a process of its own."""
    print_memory_header()
    for entry in entries:
        if not budget.fits(MEMORY_SECONDS * len(names)):
            print("no time left for further rows in a quick run")
            return
        for name in names:
            peak = peak_memory.in_fresh_process(name, Row(**entry["row"]), entry["dtype"], threads)
            entry["peak_bytes"][name] = peak
        print_memory(entry)


def describe(arguments: argparse.Namespace, sampling: Sampling) -> dict[str, Any]:
    """Head of the result file: machine, versions, commit, date, settings."""
    import layerwise_ext as lw
    from layerwise_ext import _C

    head = {"benchmark": "bench_stage", **environment()}
    head["machine"]["layerwise_cpu_capability"] = _C.cpu_capability()
    head["versions"]["layerwise_ext"] = lw.__version__
    head["settings"] = {
        "complete": arguments.complete,
        "quick": arguments.quick,
        "sampling": sampling._asdict(),
        "targets": TARGETS,
        "tolerance": TOLERANCE,
    }
    return head


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def row(text: str) -> Row:
        try:
            return Row.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser = argparse.ArgumentParser(
        description="The stage-local training step of this package against PyTorch, on the CPU.",
        epilog="A run with all rows, dtypes and parts writes results/bench_stage-cpu.json, any other one a file that "
        "ends in -partial.json, which git ignores, unless --output says otherwise.",
    )
    parser.add_argument("--quick", action="store_true", help="two rows, few rounds, compile where it fits: under 40 s")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rows", nargs="+", type=row, metavar="N,C_in,C_out,size,cells[,stride[,kernel]][,form]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peak memory")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    arguments = parser.parse_args(argv)
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    whole = arguments.rows is None and arguments.dtypes == list(DTYPES) and arguments.memory and arguments.compile
    arguments.complete = whole and not arguments.quick
    arguments.rows = arguments.rows or (QUICK_ROWS if arguments.quick else ROWS)
    if arguments.output is None:
        arguments.output = RESULTS / f"bench_stage-cpu{'' if arguments.complete else '-partial'}.json"
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    budget = Budget(QUICK_SECONDS if arguments.quick else None)
    sampling = QUICK if arguments.quick else FULL
    torch.set_num_threads(arguments.threads)
    result = describe(arguments, sampling)
    machine, versions = result["machine"], result["versions"]
    print(
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores; torch {versions['torch']} "
        f"({machine['torch_cpu_capability']}), layerwise_ext {versions['layerwise_ext']} "
        f"({machine['layerwise_cpu_capability']})"
    )
    try:
        result["rows"] = time_rows(arguments, sampling, budget)
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    reason = _memory.unavailable() if arguments.memory else "left out (--no-memory)"
    if reason is None:
        measure_memory(result["rows"], QUICK_MEMORY if arguments.quick else STEPS, arguments.threads, budget)
    else:
        print(f"\nno peak memory: {reason}")
    result["summary"] = summarise(result["rows"])
    print_summary(result["summary"])
    write_json(arguments.output, result)
    print(f"\nwritten: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
