"""When to stop training a stage: its own loss or accuracy on validation data improves no more."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

METRICS = ("val_loss", "val_accuracy")


@dataclass(frozen=True)
class EarlyStopping:
    """Stop what does not improve on the ``val_loader`` of ``fit``, each optimiser's stages for themselves.

    The metric is that of the network's output in joint training, of the current stage in greedy training, of each stage
    (or of the last one of each block) in local training. A value that is not finite is no improvement.

    Args:
        patience: stop after so many epochs in a row without an improvement.
        min_delta: what counts as one: more than this better than the best value so far.
        metric: ``'val_loss'`` (smaller is better) or ``'val_accuracy'`` (larger is better).
        restore_best: put parameters and buffers, when training is stopped, back to what they were when the metric was
            best. Where it comes to its last epoch they stay as they are.

    Raises:
        ValueError: an argument out of range.
    """

    patience: int
    min_delta: float = 0.0
    metric: str = "val_loss"
    restore_best: bool = True

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}; allowed: 1 or more epochs")
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"min_delta is {self.min_delta}; allowed: 0 or more")
        if self.metric not in METRICS:
            raise ValueError(f"metric is {self.metric!r}; allowed: {', '.join(map(repr, METRICS))}")


class Watch:
    """What one optimiser's stages have reached.

    Attributes:
        stopped: whether their training has ended.
        best: value of the metric, None before the first finite one; ``best_epoch`` when it was.
    """

    def __init__(self, settings: EarlyStopping) -> None:
        self.settings = settings
        self.stopped = False
        self.best: float | None = None
        self.best_epoch = 0
        self._epochs_without = 0
        self._best_state: list[dict[str, Any]] = []

    def update(self, value: float, epoch: int, modules: Sequence[nn.Module]) -> None:
        """Judge an epoch; may put ``modules`` back to the best one."""
        if self._is_better(value):
            self.best, self.best_epoch, self._epochs_without = value, epoch, 0
            if self.settings.restore_best:
                self._best_state = copy.deepcopy([module.state_dict() for module in modules])
            return
        self._epochs_without += 1
        if self._epochs_without < self.settings.patience:
            return
        self.stopped = True
        for module, state in zip(modules, self._best_state, strict=False):  # none where nothing was ever finite
            module.load_state_dict(state)
        self.forget()

    def forget(self) -> None:
        """What it keeps to go back to, where training has ended."""
        self._best_state = []

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self.settings.metric == "val_loss" else value - self.best
        return gain > self.settings.min_delta

    def state_dict(self) -> dict[str, Any]:
        return {
            "stopped": self.stopped,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "epochs_without": self._epochs_without,
            "best_state": self._best_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stopped = state["stopped"]
        self.best = state["best"]
        self.best_epoch = state["best_epoch"]
        self._epochs_without = state["epochs_without"]
        self._best_state = copy.deepcopy(state["best_state"])
