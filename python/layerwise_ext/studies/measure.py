"""Time and peak memory of a training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from layerwise_ext import train

WARMUP_ROUNDS = 2


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


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}
