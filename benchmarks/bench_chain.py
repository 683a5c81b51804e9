"""Times joint training of whole networks as a FusedChain against PyTorch: eager, compiled, with checkpoints.

    python benchmarks/bench_chain.py            all networks, fp32 and bf16, time and peak memory
    python benchmarks/bench_chain.py --quick    narrow networks, few rounds

What the networks and their steps are: chain_peers.py.  How it is timed: harness.py, each network and dtype in a fresh
process (but with --quick), for memory that a larger network left speeds up the next one.  Memory is measured for each
contestant in a fresh process (peak_memory.py; on a GPU from PyTorch's allocator), after all times, for it does not need
a quiet machine, and twice:

- ``activation_bytes``: the peak of a step beyond what lives before it, input and parameters, where each parameter
  gradient is dropped when autograd delivers it.  What is left are maps, workspaces, and one layer's gradients.
- ``peak_bytes``: the same with the gradients kept, as an optimizer finds them.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import layerwise_ext as lw
import peak_memory
import torch
import torch._dynamo
from chain_peers import CASES, CHAINS, CHECKPOINTS, STEPS, Case, inputs, outcome, reference_step, training_step
from harness import RESULTS, Quartiles, Sampling, environment, geometric_mean, interleave, ratios, write_json
from layerwise_ext import _C, _memory
from peers import COMPILE, DTYPES, EAGER, OURS, TrainingStep

PEERS = tuple(name for name in STEPS if name != OURS)
FULL = Sampling(warmup=1, min_rounds=9, max_rounds=30, seconds=45.0)
QUICK = Sampling(warmup=1, min_rounds=3, max_rounds=5, seconds=1.0)
QUICK_CASES = (Case("vgg16", 16, 16), Case("resnet18", 16, 16))
GPU_ROUNDS = 20

# What the package sets out to reach; printed beside the result, never asserted: speed depends on the machine.
# Shares of a peer's memory: the fastest chain within it is to take less time than the peer.
TARGETS = {EAGER: 0.55, **dict.fromkeys(CHECKPOINTS, 1.0)}

# A contestant's distance to float64, in the norm of all gradients together, may be this many times that of eager
# PyTorch in the same dtype, plus a little for a chance difference of small errors.
TIMES_EAGER, AND_MORE = 2.0, 1e-6


class DisagreementError(RuntimeError):
    """The contestants do not compute the same step, so their times must not be compared."""


def errors(steps: dict[str, TrainingStep], expected: Sequence[torch.Tensor]) -> dict[str, float]:
    """Distance of loss and gradients to those of float64, relative to their norm.

    Raises:
        DisagreementError: one is much further from them than eager PyTorch.
    """

    def distance(values: Sequence[torch.Tensor]) -> float:
        squares = [((a - b).square().sum(), b.square().sum()) for a, b in zip(values, expected, strict=True)]
        difference, norm = (torch.stack(parts).sum() for parts in zip(*squares, strict=True))
        return (difference / norm).sqrt().item()

    found = {name: distance(outcome(step)) for name, step in steps.items()}
    limit = TIMES_EAGER * found[EAGER] + AND_MORE
    for name, error in found.items():
        if not error <= limit:  # also for NaN
            raise DisagreementError(
                f"loss and gradients of {name} differ from float64 by {error:.2g}, allowed is {limit:.2g}, "
                f"{TIMES_EAGER:g} times eager PyTorch; nothing was timed"
            )
    return found


def measure_time(case: Case, dtype: str, names: Sequence[str], sampling: Sampling, device: str) -> dict[str, Any]:
    """One entry of "rows" in the result file; times in milliseconds, of each round, too; ratios are peer's time / ours.

    Raises:
        DisagreementError: a contestant computes something else; nothing was timed.
    """
    torch._dynamo.reset()
    data = inputs(case, device)
    expected = reference_step(case, *data)
    steps = {name: training_step(name, case, DTYPES[dtype], *data) for name in names}
    try:
        found = errors(steps, expected)
    except DisagreementError as error:
        raise DisagreementError(f"{dtype} {case}: {error}") from None
    if device == "cuda":
        from bench_gpu import device_time

        times = device_time({name: (step.prepare, step.run) for name, step in steps.items()}, GPU_ROUNDS)
    else:
        times = interleave(steps, sampling)
    return {
        "case": case._asdict(),
        "dtype": dtype,
        "error": found,
        "rounds": len(times[OURS]),
        "milliseconds": {name: Quartiles.of(1e3 * t for t in seconds).as_dict() for name, seconds in times.items()},
        "ratio": {name: ratios(times[name], times[OURS]).as_dict() for name in names if name != OURS},
        "times": {name: [round(1e3 * t, 3) for t in seconds] for name, seconds in times.items()},
        "activation_bytes": {},
        "peak_bytes": {},
    }


def time_in_fresh_process(case: Case, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """
    Raises:
        RuntimeError: what the process says in its last lines, such as a DisagreementError.
    """
    compile_too = [] if arguments.compile else ["--no-compile"]
    return peak_memory.json_of(__file__, ["--time-of", *compile_too, *_options_of(case, dtype, arguments)])


def _options_of(case: Case, dtype: str, arguments: argparse.Namespace) -> list[str]:
    options = ["--cases", ",".join(map(str, case)), "--dtypes", dtype, "--threads", str(arguments.threads)]
    if arguments.cache_limit is not None:
        options += ["--cache-limit", str(arguments.cache_limit)]
    return [*options, "--device", arguments.device]


# -- Memory ------------------------------------------------------------------------------------------------------------


def memory_in_fresh_process(name: str, case: Case, dtype: str, arguments: argparse.Namespace) -> dict[str, int]:
    return peak_memory.json_of(__file__, ["--memory-of", name, *_options_of(case, dtype, arguments)])


def print_memory_of(name: str, case: Case, dtype: str, device: str) -> None:
    """What the fresh process does."""
    if device == "cpu":
        _memory.return_freed_memory()
    step = training_step(name, case, DTYPES[dtype], *inputs(case, device))
    peak_of_step = _gpu_peak_of_step if device == "cuda" else _memory.peak_of_step
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in step.module.parameters()]
    activation_bytes = peak_of_step(step.run, step.prepare)
    for hook in hooks:
        hook.remove()
    peak_bytes = peak_of_step(step.run, step.prepare)
    print(json.dumps({"activation_bytes": activation_bytes, "peak_bytes": peak_bytes}))


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _gpu_peak_of_step(step: Any, release: Any) -> int:
    for _ in range(_memory.WARMUP_STEPS):
        release()
        step()
    release()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def memory_ratio(entry: dict[str, Any], peer: str, kind: str = "activation_bytes") -> float | None:
    """Ours / the peer's, or None where one was not measured."""
    peaks = entry[kind]
    return float(peaks[OURS] / peaks[peer]) if {OURS, peer} <= peaks.keys() else None


def ratio_within(entry: dict[str, Any], peer: str) -> float | None:
    """The peer's time / that of the fastest chain that keeps within a share (TARGETS) of the peer's activation memory.

    As always the median of the ratios of the rounds. 0 where no chain does, None where memory was not measured.
    """
    bytes_of, times = entry["activation_bytes"], entry["times"]
    if not {peer, *CHAINS} <= bytes_of.keys():
        return None
    within = [name for name in CHAINS if bytes_of[name] <= TARGETS[peer] * bytes_of[peer]]
    return max((ratios(times[peer], times[name]).median for name in within), default=0.0)


# -- Output ------------------------------------------------------------------------------------------------------------


def summarise(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per dtype and peer: geometric mean over the cases and the worst one, of time and of activation memory."""
    summary: dict[str, Any] = {}
    for dtype, peer in itertools.product(dict.fromkeys(e["dtype"] for e in entries), PEERS):
        chosen = [e for e in entries if e["dtype"] == dtype and peer in e["ratio"]]
        speed = [e["ratio"][peer]["median"] for e in chosen]
        memory = [ratio for ratio in (memory_ratio(e, peer) for e in chosen) if ratio is not None]
        parts: dict[str, Any] = summary.setdefault(dtype, {"ratio": {}, "memory": {}})
        if speed:
            parts["ratio"][peer] = {"geometric_mean": geometric_mean(speed), "worst": min(speed)}
        if memory:
            parts["memory"][peer] = {"geometric_mean": geometric_mean(memory), "worst": max(memory)}
        within = [r for r in (ratio_within(e, peer) for e in chosen) if r is not None] if peer in TARGETS else []
        if within:
            parts.setdefault("ratio_within", {})[peer] = {"share": TARGETS[peer], "worst": min(within)}
    return summary


def print_times(entry: dict[str, Any]) -> None:
    print(f"\n{entry['dtype']} {Case(**entry['case'])}, {entry['rounds']} rounds")
    print(f"{'':20}{'ms':>10}{'':6}{'/ ours':>8}{'error':>10}")
    for name, t in entry["milliseconds"].items():
        text = f"{name:20}{t['median']:10.1f} ±{(t['q3'] - t['q1']) / 2 / t['median']:4.0%}"
        text += f"{entry['ratio'][name]['median']:7.2f}x" if name != OURS else f"{'':8}"
        print(f"{text}{entry['error'][name]:10.1e}", flush=True)


def print_memory(entry: dict[str, Any]) -> None:
    print(f"\n{entry['dtype']} {Case(**entry['case'])}")
    print(f"{'':20}{'activations MiB':>16}{'ours /':>8}{'/ eager':>8}{'with gradients':>16}")
    for name, activations in entry["activation_bytes"].items():
        ratio = "" if name == OURS else f"{memory_ratio(entry, name):.2f}"
        text = f"{name:20}{activations / 2**20:16.1f}{ratio:>8}{activations / entry['activation_bytes'][EAGER]:8.2f}"
        print(f"{text}{entry['peak_bytes'][name] / 2**20:16.1f}", flush=True)


def print_summary(summary: dict[str, Any]) -> None:
    print("\nGeometric means over the cases; peer's time / ours, our activation memory / peer's")
    for dtype, parts in summary.items():
        for name, speed in parts["ratio"].items():
            text = f"{dtype}  {name:20}{speed['geometric_mean']:6.2f}x, worst {speed['worst']:.2f}x"
            if name in parts["memory"]:
                memory = parts["memory"][name]
                text += f"; memory {memory['geometric_mean']:.2f}, worst {memory['worst']:.2f}"
            within = parts.get("ratio_within", {}).get(name)
            if within is not None:
                met = "met" if within["worst"] > 1 else "not met"
                text += f"; within {within['share']:g} of its memory {within['worst']:.2f}x or more (target 1x: {met})"
            print(text)


# -- The run -----------------------------------------------------------------------------------------------------------


def describe(arguments: argparse.Namespace, sampling: Sampling) -> dict[str, Any]:
    """Head of the result file: machine, versions, commit, date, settings."""
    head = {"benchmark": "bench_chain", **environment()}
    head["machine"]["layerwise_cpu_capability"] = _C.cpu_capability()
    head["versions"]["layerwise_ext"] = lw.__version__
    if arguments.device == "cuda":
        head["machine"]["gpu"] = torch.cuda.get_device_name()
        head["versions"]["cuda"] = torch.version.cuda
    head["settings"] = {
        "complete": arguments.complete,
        "quick": arguments.quick,
        "device": arguments.device,
        "cache_limit": lw.cache_limit(),
        "sampling": sampling._asdict(),
        "targets": TARGETS,
        "tolerance": {"times_eager": TIMES_EAGER, "and_more": AND_MORE},
    }
    return head


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def case(text: str) -> Case:
        try:
            return Case.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser = argparse.ArgumentParser(
        description="Joint training of networks as a FusedChain against PyTorch.",
        epilog="A run with all cases, dtypes and parts writes results/bench_chain-DEVICE.json, any other one a file "
        "that ends in -partial.json, which git ignores, unless --output says otherwise.",
    )
    parser.add_argument("--quick", action="store_true", help="two narrow networks, few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--cases", nargs="+", type=case, metavar="NETWORK,BATCH[,WIDTH]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--cache-limit", type=int, metavar="MIB", help="of this package's pool, instead of its default")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peak memory")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--memory-of", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--time-of", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    whole = arguments.cases is None and arguments.dtypes == list(DTYPES) and arguments.memory and arguments.compile
    arguments.complete = whole and not arguments.quick and arguments.cache_limit is None
    arguments.cases = arguments.cases or (QUICK_CASES if arguments.quick else CASES)
    if arguments.output is None:
        suffix = "" if arguments.complete else "-partial"
        arguments.output = RESULTS / f"bench_chain-{arguments.device}{suffix}.json"
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.cache_limit is not None:
        lw.set_cache_limit(arguments.cache_limit << 20)
    if arguments.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # else fp32 is not float32
    if arguments.memory_of:
        print_memory_of(arguments.memory_of, arguments.cases[0], arguments.dtypes[0], arguments.device)
        return 0
    sampling = QUICK if arguments.quick else FULL
    names = [name for name in STEPS if name != COMPILE or arguments.compile]
    if arguments.time_of:
        print(json.dumps(measure_time(arguments.cases[0], arguments.dtypes[0], names, sampling, arguments.device)))
        return 0
    result = describe(arguments, sampling)
    result["rows"] = []
    reason = _memory.unavailable() if arguments.device == "cpu" else None
    if not arguments.memory:
        reason = "left out (--no-memory)"
    for case, dtype in itertools.product(arguments.cases, arguments.dtypes):
        try:
            if arguments.quick:
                entry = measure_time(case, dtype, names, sampling, arguments.device)
            else:
                entry = time_in_fresh_process(case, dtype, arguments)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        result["rows"].append(entry)
        print_times(entry)
    if reason is not None:
        print(f"\nno peak memory: {reason}")
    for entry in result["rows"] if reason is None else []:
        for name in names:
            case, dtype = Case(**entry["case"]), entry["dtype"]
            for kind, value in memory_in_fresh_process(name, case, dtype, arguments).items():
                entry[kind][name] = value
        print_memory(entry)
    result["summary"] = summarise(result["rows"])
    print_summary(result["summary"])
    write_json(arguments.output, result)
    print(f"\nwritten: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
