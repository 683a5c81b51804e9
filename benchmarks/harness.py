"""What every benchmark here shares: interleaved timing, its statistics, the description of the machine, JSON files.

Times are compared only within one process and one round: a round runs every variant once, in an order that is shuffled
with a fixed seed, so that a change of the machine's speed (other tenants, clock frequency) falls on all variants alike.
A ratio is the median of the ratios of the rounds, not the ratio of two medians that may come from different moments.
"""

from __future__ import annotations

import datetime
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


class Sampling(NamedTuple):
    """At least ``min_rounds``, then on until ``seconds`` have passed, but no more than ``max_rounds``."""

    warmup: int
    min_rounds: int
    max_rounds: int
    seconds: float
    seed: int = 0


class Quartiles(NamedTuple):
    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quartiles:
        values = list(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "q1": self.lower, "q3": self.upper}


class Timed(Protocol):
    """One contestant: ``run`` is timed, ``prepare`` comes before it, outside of its time."""

    @property
    def run(self) -> Callable[[], None]: ...

    @property
    def prepare(self) -> Callable[[], None]: ...


def interleave(steps: Mapping[str, Timed], sampling: Sampling) -> dict[str, list[float]]:
    """Seconds of each step in each round; entry i of every list comes from round i.

    Garbage collection is off while the rounds run.
    """
    for _ in range(sampling.warmup):
        for step in steps.values():
            step.prepare()
            step.run()
    order = list(steps)
    shuffler = random.Random(sampling.seed)
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(sampling.max_rounds):
            if done >= sampling.min_rounds and time.perf_counter() - start >= sampling.seconds:
                break
            shuffler.shuffle(order)
            for name in order:
                steps[name].prepare()
                began = time.perf_counter()
                steps[name].run()
                times[name].append(time.perf_counter() - began)
    finally:
        if collecting:
            gc.enable()
    return times


def ratios(numerator: list[float], denominator: list[float]) -> Quartiles:
    """Quartiles of the ratios of two variants, round by round."""
    return Quartiles.of(a / b for a, b in zip(numerator, denominator, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(math.log(value) for value in values) / len(values))


# -- Where and what was measured ---------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Machine, versions, commit and date, to be called before anything is written into the repository."""
    return {
        "machine": _machine(),
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": None if memory is None else round(memory, 1),
        "system": f"{platform.system()} {platform.release()}",
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str | None]:
    compiler = _output(["g++", "--version"])
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": compiler.splitlines()[0] if compiler else None,  # the one that torch.compile finds
    }


def _commit() -> dict[str, Any]:
    """Commit of the working tree, and whether anything but earlier results differs from it."""
    head = _output(["git", "rev-parse", "HEAD"])
    changes = _output(["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"])
    return {"hash": head, "dirty": None if head is None or changes is None else bool(changes)}


def _output(command: list[str]) -> str | None:
    """What the command prints, or None where it is not installed or fails (no repository, no commit yet)."""
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Atomic: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(temporary, 0o644)  # mkstemp's file is for the owner only
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
