"""Optimisers and schedules of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]
T = TypeVar("T")
Made = TypeVar("Made")


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The paper's optimiser (arXiv 1901.06656): Adam at 5e-4."""
    return torch.optim.Adam(parameters, lr=5e-4)


def check(name: str, kind: str, factory: Any) -> None:
    """``factory`` makes a ``kind``.

    Raises:
        TypeError: it is neither a function nor a sequence of functions.
    """
    is_sequence = isinstance(factory, Sequence)
    for index, each in enumerate(factory if is_sequence else [factory]):
        if not callable(each):
            raise TypeError(
                f"{name}{f'[{index}]' if is_sequence else ''} is {type(each).__name__}; allowed: a function that makes "
                f"{kind}, or a sequence of such functions"
            )


def make(name: str, factory: Callable[[T], Made] | Sequence[Callable[[T], Made]], arguments: Sequence[T]) -> list[Made]:
    """``factory`` of each argument, or each of a sequence of factories of its own.

    Raises:
        ValueError: another number of factories than of arguments.
    """
    if not isinstance(factory, Sequence):
        return [factory(argument) for argument in arguments]
    if len(factory) != len(arguments):
        raise ValueError(f"{name} is a sequence of {len(factory)}; this trainer has {len(arguments)} optimisers")
    return [each(argument) for each, argument in zip(factory, arguments, strict=True)]
