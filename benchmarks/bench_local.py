"""Times a whole training step of VGG8b, stage-local in this package against joint training in plain PyTorch.

    python benchmarks/bench_local.py                  batch 64 on the CPU, fp32 and bf16, time and peak memory
    python benchmarks/bench_local.py --device cuda    batches 64 and 512 on a GPU
    python benchmarks/bench_local.py --quick          a narrow network and few rounds: shows that it runs

What a step is: networks.py.  How it is timed: harness.py, on a GPU bench_gpu.py.  How its memory is measured:
layerwise_ext/_memory.py, on a GPU by the allocator.  How to read the result: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_gpu
import layerwise_ext as lw
import torch
import torch._dynamo
from harness import RESULTS, Quartiles, Sampling, environment, interleave, ratios, write_json
from layerwise_ext import _C, _memory
from networks import JOINT, JOINT_COMPILE, JOINTS, KINDS, OURS, PLAIN, STEPS, Case, training_step
from peers import DTYPES, TrainingStep

FULL = Sampling(warmup=2, min_rounds=11, max_rounds=50, seconds=120.0)
QUICK = Sampling(warmup=1, min_rounds=3, max_rounds=10, seconds=2.0)
QUICK_CASE = Case(batch=8, width=0.125)
BATCHES = {"cpu": (64,), "cuda": (64, 512)}

# What the package sets out to reach with local predsim from moments: time as a share of a joint step's, peak memory as
# a share of the peak of either.  Printed beside the result, never asserted: speed depends on the machine.
MEASURED = OURS["predsim"]
TARGETS: dict[str, Any] = {
    "time": {"fp32": {JOINT: 0.5, JOINT_COMPILE: 0.6}, "bf16": {JOINT: 0.6, JOINT_COMPILE: 0.6}},
    "memory": 0.5,
}

# Largest relative difference between this package and plain PyTorch in any stage's loss and, in norm, in its gradients.
# The outputs of a stage differ by rounding and are the inputs of the next one; a pre-activation within rounding of zero
# may fall on the other side of the ReLU.  In bf16 plain PyTorch also rounds what the head computes.
TOLERANCE = {"fp32": {"loss": 1e-4, "gradient": 2e-2}, "bf16": {"loss": 3e-2, "gradient": 0.3}}


class DisagreementError(RuntimeError):
    """The contestants do not compute the same losses, so their times must not be compared."""


def agreement(ours: TrainingStep, plain: TrainingStep, kind: str, dtype: str) -> dict[str, float]:
    """Runs one local step of each: largest relative differences over the stages, ``loss`` and ``gradient``."""
    for step in (ours, plain):
        step.prepare()
    losses, expected = ours.loss().double(), plain.loss().double()
    found = {"loss": [((losses - expected) / expected).abs().max().item()], "gradient": []}
    for stage, peer in zip(ours.module, plain.module, strict=True):
        mine, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]).double() for m in (stage, peer))
        found["gradient"].append(((mine - theirs).norm() / theirs.norm()).item())
    return _checked({name: max(values) for name, values in found.items()}, f"local {kind}", dtype)


def joint_agreement(joint: TrainingStep, pred: TrainingStep, dtype: str) -> dict[str, float]:
    """The joint loss is that of the last stage of local training: forward passes do not know how they are trained."""
    difference = (joint.loss()[-1].double() / pred.loss()[-1].double() - 1).abs().item()
    return _checked({"loss": difference}, "joint training", dtype)


def _checked(differences: dict[str, float], what: str, dtype: str) -> dict[str, float]:
    for name, value in differences.items():
        if not value <= TOLERANCE[dtype][name]:  # also for NaN
            raise DisagreementError(
                f"{dtype}: the {name} of {what} differs from plain PyTorch by {value:.2g}, allowed is "
                f"{TOLERANCE[dtype][name]:.2g}; nothing was timed"
            )
    return differences


def measure(case: Case, dtype: str, names: Sequence[str], sampling: Sampling, device: str) -> dict[str, Any]:
    """One entry of "cases" in the result file; times in milliseconds."""
    torch._dynamo.reset()
    steps = {name: training_step(name, case, DTYPES[dtype], device) for name in names}
    differences = {kind: agreement(steps[OURS[kind]], steps[PLAIN[kind]], kind, dtype) for kind in KINDS}
    for name in JOINTS:
        if name in steps:
            differences[name] = joint_agreement(steps[name], steps[OURS["pred"]], dtype)
    peaks = {}
    if device == "cuda":
        peaks = {name: bench_gpu.peak_bytes(step) for name, step in steps.items()}
        runs = {name: (step.prepare, step.run) for name, step in steps.items()}
        times = bench_gpu.device_time(runs, bench_gpu.ROUNDS)
    else:
        times = interleave(steps, sampling)
    return {
        "case": case._asdict(),
        "dtype": dtype,
        "differences": differences,
        "rounds": len(times[JOINT]),
        "milliseconds": {name: Quartiles.of(1e3 * t for t in seconds).as_dict() for name, seconds in times.items()},
        "share_of_time": {
            joint: {name: ratios(times[name], times[joint]).as_dict() for name in times}
            for joint in JOINTS
            if joint in times
        },
        "peak_bytes": peaks,
    }


def peak_in_fresh_process(name: str, case: Case, dtype: str, threads: int) -> int:
    options = ["--batch", str(case.batch), "--width", str(case.width), "--dtypes", dtype, "--threads", str(threads)]
    command = [sys.executable, __file__, "--peak-of", name, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {name} ({dtype}, {case}) failed:\n{done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def print_peak(name: str, case: Case, dtype: str) -> None:
    _memory.return_freed_memory()
    step = training_step(name, case, DTYPES[dtype])
    print(json.dumps({"peak_bytes": _memory.peak_of_step(step.run, step.prepare)}))


def share_of_memory(entry: dict[str, Any], name: str) -> float | None:
    """Peak as a share of the lowest peak of joint training."""
    peaks = entry["peak_bytes"]
    joints = [peaks[joint] for joint in JOINTS if joint in peaks]
    return peaks[name] / min(joints) if joints and name in peaks else None


# -- Output ------------------------------------------------------------------------------------------------------------


def print_entry(entry: dict[str, Any]) -> None:
    case, shares = Case(**entry["case"]), entry["share_of_time"]
    print(f"\n{entry['dtype']}, batch {case.batch}, width {case.width:g}: {entry['rounds']} rounds")
    print(f"{'':45}{'ms':>10}{'':6}{'/ joint':>9}{'/ compile':>11}{'peak MiB':>10}{'/ joint':>9}")
    for name, time in entry["milliseconds"].items():
        spread = (time["q3"] - time["q1"]) / 2 / time["median"]
        line = f"{name:45}{time['median']:10.1f} ±{spread:4.0%}"
        for joint, width in ((JOINT, 9), (JOINT_COMPILE, 11)):
            line += f"{shares[joint][name]['median']:{width}.2f}" if joint in shares else f"{'-':>{width}}"
        memory = share_of_memory(entry, name)
        if memory is not None:
            line += f"{entry['peak_bytes'][name] / 2**20:10.1f}{memory:9.2f}"
        print(line)
    for joint, goal in TARGETS["time"][entry["dtype"]].items():
        if joint in shares:
            share = shares[joint][MEASURED]["median"]
            print(f"{MEASURED}: {share:.2f} of the time of {joint} ({_verdict(share, goal)})")
    memory = share_of_memory(entry, MEASURED)
    if memory is not None:
        print(f"{MEASURED}: {memory:.2f} of the peak memory of joint training ({_verdict(memory, TARGETS['memory'])})")
    sys.stdout.flush()


def _verdict(value: float, goal: float) -> str:
    return f"target {goal}: {'met' if value <= goal else 'not met'}"


# -- The run -----------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A training step of VGG8b, stage-local against joint.")
    parser.add_argument("--quick", action="store_true", help="a narrow network, a small batch, few rounds")
    parser.add_argument("--device", choices=BATCHES, default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, nargs="+", help="default: 64, on a GPU 64 and 512")
    parser.add_argument("--width", type=float, help="factor of all widths, default 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peak memory")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--peak-of", choices=STEPS, help=argparse.SUPPRESS)  # the process of one measurement
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    if min([arguments.threads, *(arguments.batch or [1])]) < 1 or (arguments.width or 1) <= 0:
        parser.error("--threads, --batch and --width must be positive")
    whole = arguments.batch is None and arguments.width is None and arguments.dtypes == list(DTYPES)
    arguments.complete = whole and arguments.memory and arguments.compile and not arguments.quick
    default = QUICK_CASE if arguments.quick else Case(64)
    batches = arguments.batch or ([default.batch] if arguments.quick else BATCHES[arguments.device])
    arguments.cases = [Case(batch, arguments.width or default.width) for batch in batches]
    if arguments.output is None:
        name = {"cpu": "cpu", "cuda": "gpu"}[arguments.device] + ("" if arguments.complete else "-partial")
        arguments.output = RESULTS / f"bench_local-{name}.json"
    return arguments


def describe(arguments: argparse.Namespace, sampling: Sampling) -> dict[str, Any]:
    """Head of the result file: machine, versions, commit, date, settings."""
    head = {"benchmark": "bench_local", **environment()}
    head["machine"]["layerwise_cpu_capability"] = _C.cpu_capability()
    head["versions"]["layerwise_ext"] = lw.__version__
    if arguments.device == "cuda":
        head["machine"]["gpu"] = torch.cuda.get_device_name()
        head["versions"]["cuda"] = torch.version.cuda
    head["settings"] = {
        "complete": arguments.complete,
        "quick": arguments.quick,
        "device": arguments.device,
        "sampling": sampling._asdict() if arguments.device == "cpu" else {"rounds": bench_gpu.ROUNDS},
        "targets": TARGETS,
        "tolerance": TOLERANCE,
    }
    return head


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of is not None:
        print_peak(arguments.peak_of, arguments.cases[0], arguments.dtypes[0])
        return 0
    if arguments.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # else fp32 is not float32
    sampling = QUICK if arguments.quick else FULL
    result = describe(arguments, sampling)
    names = [name for name in STEPS if arguments.compile or name != JOINT_COMPILE]
    reason = _memory.unavailable() if arguments.memory else "left out (--no-memory)"
    result["cases"] = []
    for case, dtype in itertools.product(arguments.cases, arguments.dtypes):
        try:
            entry = measure(case, dtype, names, sampling, arguments.device)
        except DisagreementError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        if arguments.device == "cpu" and reason is None:
            entry["peak_bytes"] = {name: peak_in_fresh_process(name, case, dtype, arguments.threads) for name in names}
        result["cases"].append(entry)
        print_entry(entry)
    if arguments.device == "cpu" and reason is not None:
        print(f"\nno peak memory: {reason}")
    write_json(arguments.output, result)
    print(f"\nwritten: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
