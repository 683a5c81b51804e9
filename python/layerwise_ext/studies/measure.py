"""Time and peak memory of a training step."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from layerwise_ext import _memory, train

if TYPE_CHECKING:
    from layerwise_ext.studies.study import Cell, Study, Task

WARMUP_ROUNDS = 2
ROUNDS, QUICK_ROUNDS = 15, 3


class Step(Protocol):
    """One training step of everything that a cell trains, on a batch that it holds."""

    def __call__(self) -> None: ...

    def clear(self) -> None:
        """Drop the gradients, as before the first step."""


class TrainerStep:
    """One step of all stages: for greedy, each stage in turn on what the frozen ones before it give.

    Args:
        trainer: on the device of the batch; its stages are put into training mode.
        images, target: the batch, ``[N, C, H, W]`` and ``[N]``.
    """

    def __init__(self, trainer: train.Trainer, images: Tensor, target: Tensor) -> None:
        self.trainer = trainer
        self.images, self.target = images, target
        for stage in trainer.stages:
            stage.train()

    def __call__(self) -> None:
        if not isinstance(self.trainer, train.GreedyTrainer):
            self.trainer.step(self.images, self.target)
            return
        x = self.images
        for index, stage in enumerate(self.trainer.stages):
            self.trainer.stage = index
            self.trainer.step(x, self.target)
            with torch.no_grad():
                x = stage.features(x)

    def clear(self) -> None:
        for stage in self.trainer.stages:
            stage.zero_grad(set_to_none=True)


def interleaved_times(
    steps: Mapping[str, Callable[[], None]],
    rounds: int,
    *,
    synchronize: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each step in each round, in which all of them take their turn.

    A machine that is slower for a while slows all of them. Rounds for warming up come first and are not counted.

    Args:
        steps: by name.
        rounds: that are counted, 1 or more.
        synchronize: waits for the device; None on the CPU.
        clock: in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(-WARMUP_ROUNDS, rounds):
        for name, step in steps.items():
            start = clock()
            step()
            if synchronize is not None:
                synchronize()
            if round_ >= 0:
                times[name].append((clock() - start) * 1e3)
    return times


def peak_in_fresh_process(module: str, *arguments: str) -> float:
    """MiB that ``python -m module arguments`` prints on its last line.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def steps(study: Study, task: Task, cells: Sequence[Cell], *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Time and peak memory of the steps of the cells that have one.

    Returns:
        ``cells``: :attr:`Results.measured`; ``note``: why the memory was not measured, or None.
    """
    made = {cell.name: step for cell in cells if (step := study.step(task, cell)) is not None}
    if not made:
        return {"cells": {}, "note": None}
    say(f"measuring a step of {len(made)} cells")
    is_cuda = task.device.type == "cuda"
    synchronize = partial(torch.cuda.synchronize, task.device) if is_cuda else None
    times = interleaved_times(made, QUICK_ROUNDS if task.quick else ROUNDS, synchronize=synchronize)
    measured: dict[str, dict[str, Any]] = {
        name: {"step_ms": statistics.median(values), "rounds_ms": values} for name, values in times.items()
    }
    note = None if is_cuda else _memory.unavailable()
    if note is None:
        for name in list(made)[:1] if task.quick else made:
            if is_cuda:
                measured[name]["peak_mib"] = _peak_on_device(made[name], task.device)
            else:
                (cell,) = (cell for cell in cells if cell.name == name)
                measured[name]["peak_mib"] = _peak_in_fresh_process(study, task, cell)
    return {"cells": measured, "note": note}


def _peak_in_fresh_process(study: Study, task: Task, cell: Cell) -> float:
    facts = {
        "study": study.name,
        "cell": cell.name,
        "data": task.name,
        "shape": [study.step_batch(task), *task.image_shape],
        "num_classes": task.num_classes,
        "threads": task.threads,
        "quick": task.quick,
    }
    return peak_in_fresh_process("layerwise_ext.studies.peak", json.dumps(facts))


def _peak_on_device(step: Step, device: torch.device) -> float:
    """Of torch's allocator, the median of three steps."""
    peaks = []
    for _ in range(_memory.MEASURED_STEPS):
        step.clear()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    return statistics.median(peaks) / 2**20
