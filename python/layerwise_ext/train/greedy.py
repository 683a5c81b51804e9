"""Greedy training: one stage after another, the earlier ones frozen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from layerwise_ext.train import random_state
from layerwise_ext.train.common import Trainer, length
from layerwise_ext.train.evaluation import Batches
from layerwise_ext.train.feature_cache import FeatureCache
from layerwise_ext.train.metrics import StepResult, step_result


class GreedyTrainer(Trainer):
    """Stage by stage, ``epochs`` epochs each, on its own loss (Belilovsky et al. 2019, arXiv 1812.11446).

    Earlier stages are frozen: no gradient, eval mode, running statistics untouched. Their outputs are computed once per
    stage, in one pass over the loader, and kept on the device in the dtype they have; each epoch then trains on them in
    a new order, drawn from the trainer's generator, in batches of the loader's size. Random augmentation is therefore
    drawn once per stage, for all stages but the first, which reads the loader in each epoch. Where early stopping ends
    a stage, the next one begins. With ``ema_decay`` the next stage gets what the averaged weights give.

    Args:
        stages, optimizer, ...: see :class:`Trainer`.
        cache: False runs the frozen stages anew in each step (fresh augmentation, no memory).
        cache_limit_bytes: where a stage's inputs would take more than this, or the loader has no length to tell, the
            frozen stages run in each step, with a warning in the log.

    Attributes:
        stage: index of the stage that is being trained; ``len(stages)`` when all are done.
        stage_epoch: finished epochs of that stage.

    Raises:
        ValueError: a head that looks at the image, behind the first stage.
    """

    def __init__(self, *args: Any, cache: bool = True, cache_limit_bytes: int = 2 << 30, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache = cache
        self.cache_limit_bytes = cache_limit_bytes
        self.stage = 0
        self.stage_epoch = 0
        self._features: FeatureCache | None = None
        self._fits = True
        # Generators as they were when the current stage's inputs were computed: a resumed run computes them again.
        self._cache_random_state: dict[str, Any] | None = None

    def _check_stages(self) -> None:
        super()._check_stages()
        for index, stage in enumerate(self.stages):
            if index > 0 and stage.head.needs_image:
                raise ValueError(
                    f"stages[{index}] has a {type(stage.head).__name__}, which looks at the image, but only outputs of "
                    "frozen stages are kept; use a LocalTrainer, or another head behind the first stage"
                )

    def _step(self, x: Tensor, target: Tensor, weight: float = 1.0, update: bool = True) -> StepResult:
        """One step of the current stage on its inputs ``x``."""
        stage = self.stages[self.stage]
        with self._autocast():
            _, loss, logits = stage(x.detach(), target)
        self._backward(loss, weight)
        if update:
            self._update(self.stage)
        return step_result([loss], [logits], target)

    def _parameter_groups(self) -> list[list[nn.Parameter]]:
        return [list(stage.parameters()) for stage in self.stages]

    def _reported(self) -> list[int]:
        return list(range(min(self.stage + 1, len(self.stages))))

    def _trained(self) -> list[int]:
        return [self.stage]

    def _active_groups(self) -> list[int]:
        return [self.stage]

    def _stages_of(self, group: int) -> list[int]:
        return [group]

    def _set_training(self) -> None:
        for index, stage in enumerate(self.stages):
            stage.train(index == self.stage)

    def _next_epoch(self, epochs: int) -> bool:
        while self.stage < len(self.stages) and (self.stage_epoch >= epochs or self._has_stopped(self.stage)):
            self._next_stage()
        return self.stage < len(self.stages)

    def _count_epoch(self) -> None:
        super()._count_epoch()
        self.stage_epoch += 1

    def _next_stage(self) -> None:
        # A finished stage is never trained again: what its optimiser remembers would only take memory.
        self.optimizers[self.stage].state.clear()
        self._adopt_averages([self.stage])
        self.stage += 1
        self.stage_epoch = 0
        self._features = None
        self._fits = True
        self._cache_random_state = None
        self._reset_capture()

    def _epoch_batches(self, loader: Batches) -> tuple[Batches, int | None]:
        if self.stage == 0:
            return super()._epoch_batches(loader)
        if self.cache and self._fits and self._features is None:
            self._fill_cache(loader)
        if self._features is None:
            return self._frozen_outputs(loader), length(loader)
        return self._features.batches(self.generator), len(self._features)

    def _frozen_outputs(self, loader: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        for x, target in self._on_device(loader):
            with torch.no_grad(), self._autocast():
                for stage in self.stages[: self.stage]:
                    x = stage.features(x)
            yield x, target

    def _fill_cache(self, loader: Batches) -> None:
        """Compute the current stage's inputs, where they fit; a resumed run sees the same order and augmentation."""
        now = random_state.capture(loader, self.device)
        replay = self._cache_random_state
        if replay is not None:
            random_state.restore(replay, loader, self.device)
        self._features = FeatureCache.fill(self._frozen_outputs(loader), length(loader), self.cache_limit_bytes)
        self._fits = self._features is not None
        if replay is not None or not self._fits:
            random_state.restore(now, loader, self.device)
        if self._fits and replay is None:
            self._cache_random_state = now

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "stage": self.stage,
            "stage_epoch": self.stage_epoch,
            "cache_random_state": self._cache_random_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.stage = state["stage"]
        self.stage_epoch = state["stage_epoch"]
        self._cache_random_state = state["cache_random_state"]
        self._features = None
        self._fits = True
