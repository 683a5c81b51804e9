"""What of a trainer is saved, and how one goes on from it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from layerwise_ext import _graphs
from layerwise_ext.nn import LocalStage
from layerwise_ext.train import precision, random_state
from layerwise_ext.train.early_stopping import Watch
from layerwise_ext.train.ema import AveragedStage
from layerwise_ext.train.metrics import Record
from layerwise_ext.train.replicas import ReplicaGroup


class Resumable(ABC):
    """State of a trainer; a base of :class:`~layerwise_ext.train.Trainer`, whose attributes it reads and sets."""

    stages: list[LocalStage]
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[LRScheduler]
    device: torch.device
    generator: torch.Generator
    epoch: int
    history: list[Record]
    _averages: list[AveragedStage]
    _watches: list[Watch]
    _scalers: list[torch.amp.GradScaler]
    _saved_random_state: dict[str, Any] | None
    _loader: Any
    _replicas: ReplicaGroup

    @abstractmethod
    def _reset_capture(self) -> None:
        """To be called when the step is another one, or works on other memory, than before."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on as if :meth:`fit` had not stopped.

        Tensors, numbers, strings, lists and dictionaries only, so ``torch.load(weights_only=True)`` reads it. Holds the
        state of torch's global generators and of the loader's, not Python's or NumPy's: augmentation that draws from
        those must be seeded by the caller. The tensors are the live ones, as in any state_dict.
        """
        return {
            "trainer": type(self).__name__,
            "processes": self._replicas.size,
            "epoch": self.epoch,
            "history": copy.deepcopy(self.history),
            "stages": [stage.state_dict() for stage in self.stages],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "averages": [average.state_dict() for average in self._averages],
            "early_stopping": [watch.state_dict() for watch in self._watches],
            "scalers": precision.states(self._scalers),
            "generator": self.generator.get_state(),
            "random_state": self._random_state(),
        }

    def _random_state(self) -> dict[str, Any] | None:
        """None before the first fit: nothing has depended on the generators yet."""
        if self._saved_random_state is not None or self._loader is None:
            return self._saved_random_state
        return random_state.capture(self._loader, self.device)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict` into a trainer made with the same arguments.

        The global and the loader's generators are set when :meth:`fit` next starts. With ``process_group`` every
        process must do so. The state of another number of processes is taken, with a warning in the log: its run is
        continued, but not with the numbers that it would have had.

        Raises:
            ValueError: the state is of another trainer, or of another number of stages, optimisers or schedulers.
        """
        if state["trainer"] != type(self).__name__:
            raise ValueError(f"the state is of a {state['trainer']}; this is a {type(self).__name__}")
        self._replicas.compare(state.get("processes", 1))
        for name in ("stages", "optimizers", "schedulers"):
            found, expected = len(state[name]), len(getattr(self, name))
            if found != expected:
                raise ValueError(f"the state has {found} {name}; this trainer has {expected}")
        for option, found, own in (
            ("early_stopping", state["early_stopping"], self._watches),
            ("ema_decay", state["averages"], self._averages),
            ("autocast_dtype=torch.float16", state["scalers"], self._scalers[0].is_enabled()),
        ):
            if bool(found) != bool(own):
                has, lacks = ("the state", "this trainer") if found else ("this trainer", "the state")
                raise ValueError(f"{has} has {option}; {lacks} has not")
        for stage, stage_state in zip(self.stages, state["stages"], strict=True):
            stage.load_state_dict(stage_state)
        # Optimisers keep the tensors they are given: without the copy, two trainers would share their moments.
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            capturable = _graphs.capturable(optimizer)  # of this trainer, whatever the one before ran on
            optimizer.load_state_dict(copy.deepcopy(optimizer_state))
            _graphs.set_capturable(optimizer, capturable)
        self._reset_capture()
        for scheduler, scheduler_state in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(scheduler_state)
        for average, average_state in zip(self._averages, state["averages"], strict=True):
            average.load_state_dict(average_state)
        for watch, watch_state in zip(self._watches, state["early_stopping"], strict=True):
            watch.load_state_dict(watch_state)
        precision.load_states(self._scalers, state["scalers"])
        self.generator.set_state(state["generator"])
        self.epoch = state["epoch"]
        self.history = copy.deepcopy(state["history"])
        self._saved_random_state = state["random_state"]
