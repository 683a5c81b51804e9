"""Times local training of VGG8b in several processes against the same in one process.

    python benchmarks/bench_decoupled.py            2 workers, batch 64, fp32 and bf16
    python benchmarks/bench_decoupled.py --quick    a narrow network and few rounds: shows that it runs

Contestants, all from the same parameters on the same batches, optimizer (Adam) included: a LocalTrainer with one
thread, one with as many threads as there are workers, and a DecoupledTrainer, synchronous and asynchronous, with one
thread per worker.  A round trains each of them for some epochs in turn; the first of them, in which processes start, is
left out.  The stages are cut as the trainer does it by itself, or by --partition; how well that balances the workers is
told by a measurement of each stage before.

Nothing is written unless the synchronous run and the one with one thread end with the same losses, parameters and
states of the optimizers, bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import layerwise_ext as lw
import torch
from harness import RESULTS, Quartiles, environment, ratios, write_json
from layerwise_ext import _C
from layerwise_ext.models.split import balanced
from layerwise_ext.train import DecoupledTrainer, LocalTrainer, Trainer
from networks import Case
from peers import DTYPES
from torch import Tensor
from torch.utils._pytree import tree_flatten

ONE = "LocalTrainer, 1 thread"
SYNCHRONOUS = "DecoupledTrainer"
ASYNCHRONOUS = "DecoupledTrainer, asynchronous"


class Sampling(NamedTuple):
    rounds: int
    epochs: int  # of a round that are timed
    steps: int  # of an epoch


FULL, QUICK = Sampling(5, 1, 40), Sampling(2, 1, 4)
QUICK_CASE = Case(8, 0.125)


class DisagreementError(RuntimeError):
    """The contestants do not compute the same, so their times must not be compared."""


class Repeated:
    """An epoch of ``steps`` times the batch of a case; reading it takes no time."""

    def __init__(self, case: Case, steps: int) -> None:
        self.batch = case.data("cpu")
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self.batch, self.steps)


def stage_seconds(case: Case, dtype: torch.dtype, kind: str, repeats: int) -> list[float]:
    """Of a local step of each stage, with one thread."""
    torch.set_num_threads(1)
    images, target = case.data("cpu")
    times: list[list[float]] = []
    x = images
    for stage in case.fused(kind):
        trainer = LocalTrainer([stage], autocast_dtype=_autocast(dtype), progress=False)
        times.append([])
        for _ in range(1 + repeats):
            start = time.perf_counter()
            trainer.step(x, target)
            times[-1].append(time.perf_counter() - start)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            x = stage.features(x)
    return [statistics.median(values[1:]) for values in times]


def best_partition(seconds: Sequence[float], workers: int) -> tuple[int, ...]:
    """Numbers of stages with which the slowest worker takes least."""
    return tuple(b - a for a, b in itertools.pairwise([*balanced(seconds, workers), len(seconds)]))


def speed_at_best(seconds: Sequence[float], partition: Sequence[int]) -> float:
    """Over one process, if the slowest worker set the pace and nothing else took time."""
    ends = list(itertools.accumulate(partition, initial=0))
    return sum(seconds) / max(sum(seconds[a:b]) for a, b in itertools.pairwise(ends))


def _autocast(dtype: torch.dtype) -> torch.dtype | None:
    return None if dtype == torch.float32 else dtype


def contestants(
    case: Case, dtype: torch.dtype, kind: str, workers: int, partition: Sequence[int] | None
) -> dict[str, tuple[int, Trainer]]:
    """Name -> threads of this process, trainer."""
    options: dict[str, Any] = {"autocast_dtype": _autocast(dtype), "progress": False, "seed": 0}
    cut = {"workers": workers} if partition is None else {"partition": partition}
    decoupled = {**cut, "threads": 1, **options}
    return {
        ONE: (1, LocalTrainer(case.fused(kind), **options)),
        f"LocalTrainer, {workers} threads": (workers, LocalTrainer(case.fused(kind), **options)),
        SYNCHRONOUS: (1, DecoupledTrainer(case.fused(kind), **decoupled)),
        ASYNCHRONOUS: (1, DecoupledTrainer(case.fused(kind), asynchronous=True, **decoupled)),
    }


def check_equal(one: Trainer, other: Trainer, dtype: str) -> None:
    """After as many epochs: every loss, parameter, running statistic and state of an optimizer, bit for bit.

    Raises:
        DisagreementError: something differs.
    """
    for record, expected in zip(other.history, one.history, strict=True):
        if record["train_loss"] != expected["train_loss"]:
            raise DisagreementError(
                f"{dtype}: losses of epoch {record['epoch']} are {record['train_loss']} with {SYNCHRONOUS}, "
                f"{expected['train_loss']} with {ONE}"
            )
    state, expected_state = other.state_dict(), one.state_dict()
    for name in ("stages", "optimizers"):
        leaves, expected_leaves = (tree_flatten(each[name])[0] for each in (state, expected_state))
        for leaf, expected_leaf in zip(leaves, expected_leaves, strict=True):
            is_same = torch.equal(leaf, expected_leaf) if isinstance(leaf, Tensor) else leaf == expected_leaf
            if not is_same:
                raise DisagreementError(f"{dtype}: {name} of {SYNCHRONOUS} differ from those of {ONE}")


def measure(
    case: Case, dtype: str, kind: str, workers: int, partition: Sequence[int] | None, sampling: Sampling
) -> dict[str, Any]:
    """One entry of "cases" in the result file."""
    seconds = stage_seconds(case, DTYPES[dtype], kind, max(2, sampling.steps // 4))
    trainers = contestants(case, DTYPES[dtype], kind, workers, partition)
    loader = Repeated(case, sampling.steps)
    times: dict[str, list[float]] = {name: [] for name in trainers}
    order, shuffler = list(trainers), random.Random(0)
    for _ in range(sampling.rounds):
        shuffler.shuffle(order)
        for name in order:
            threads, trainer = trainers[name]
            torch.set_num_threads(threads)
            trainer.fit(loader, trainer.epoch + 1 + sampling.epochs)
            epochs = [record["seconds"] for record in trainer.history[-sampling.epochs :]]
            times[name].append(statistics.median(epochs) / sampling.steps)
    (_, one), (_, synchronous) = trainers[ONE], trainers[SYNCHRONOUS]
    check_equal(one, synchronous, dtype)
    assert isinstance(synchronous, DecoupledTrainer)
    used, by_times = synchronous.layout.partition, best_partition(seconds, workers)
    return {
        "case": case._asdict(),
        "dtype": dtype,
        "kind": kind,
        "partition": list(used),
        "partition_by_times": list(by_times),
        "stage_milliseconds": [1e3 * value for value in seconds],
        "speed_at_best": speed_at_best(seconds, used),
        "speed_at_best_by_times": speed_at_best(seconds, by_times),
        "rounds": sampling.rounds,
        "equal_steps": one.epoch * sampling.steps,
        "steps_per_second": {name: Quartiles.of(1 / t for t in values).as_dict() for name, values in times.items()},
        "speed": {name: ratios(times[ONE], values).as_dict() for name, values in times.items()},
    }


def print_entry(entry: dict[str, Any]) -> None:
    case = Case(**entry["case"])
    print(f"\n{entry['dtype']}, {entry['kind']}, batch {case.batch}, width {case.width:g}: stages {entry['partition']}")
    print(f"{'':32}{'steps/s':>10}{'speed':>8}   (at best {entry['speed_at_best']:.2f})")
    for name, rate in entry["steps_per_second"].items():
        print(f"{name:32}{rate['median']:10.2f}{entry['speed'][name]['median']:8.2f}")
    print(f"equal, bit for bit, after {entry['equal_steps']} steps: {ONE} and {SYNCHRONOUS}")
    sys.stdout.flush()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Local training of VGG8b in several processes against one.")
    parser.add_argument("--quick", action="store_true", help="a narrow network, a small batch, few rounds")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head", choices=("pred", "predsim"), default="predsim")
    parser.add_argument("--batch", type=int, help="default: 64")
    parser.add_argument("--width", type=float, help="factor of all widths, default 1")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--partition", type=int, nargs="+", help="stages of each worker; default: the trainer decides")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    arguments = parser.parse_args(argv)
    if arguments.workers < 2 or (arguments.batch or 1) < 1 or (arguments.width or 1) <= 0:
        parser.error("--batch and --width must be positive, --workers at least 2")
    if arguments.partition is not None and len(arguments.partition) != arguments.workers:
        parser.error(f"--partition has {len(arguments.partition)} numbers, --workers is {arguments.workers}")
    default = QUICK_CASE if arguments.quick else Case(64)
    arguments.case = Case(arguments.batch or default.batch, arguments.width or default.width)
    usual = {"dtypes": list(DTYPES), "head": "predsim", "batch": None, "width": None, "workers": 2, "partition": None}
    arguments.complete = not arguments.quick and all(getattr(arguments, name) == usual[name] for name in usual)
    if arguments.output is None:
        arguments.output = RESULTS / f"bench_decoupled-cpu{'' if arguments.complete else '-partial'}.json"
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    sampling = QUICK if arguments.quick else FULL
    result = {"benchmark": "bench_decoupled", **environment()}
    result["machine"]["layerwise_cpu_capability"] = _C.cpu_capability()
    result["versions"]["layerwise_ext"] = lw.__version__
    result["settings"] = {
        "complete": arguments.complete,
        "quick": arguments.quick,
        "workers": arguments.workers,
        "threads_per_worker": 1,
        "sampling": sampling._asdict(),
    }
    result["cases"] = []
    for dtype in arguments.dtypes:
        try:
            entry = measure(arguments.case, dtype, arguments.head, arguments.workers, arguments.partition, sampling)
        except DisagreementError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        result["cases"].append(entry)
        print_entry(entry)
    write_json(arguments.output, result)
    print(f"\nwritten: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
