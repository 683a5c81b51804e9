"""Greedy training: one stage after another, the earlier ones frozen."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise_ext.nn.stage import drop_channels
from layerwise_ext.train import random_state
from layerwise_ext.train.callbacks import Callback
from layerwise_ext.train.common import Trainer, length
from layerwise_ext.train.evaluation import Batches
from layerwise_ext.train.feature_cache import FeatureCache
from layerwise_ext.train.feature_file import FeatureFileError
from layerwise_ext.train.metrics import Record, StepResult

logger = logging.getLogger(__name__)


class GreedyTrainer(Trainer):
    """Stage by stage, ``epochs`` epochs each, on its own loss (Belilovsky et al. 2019, arXiv 1812.11446).

    Earlier stages are frozen: no gradient, eval mode, running statistics untouched. Their outputs are computed once per
    stage, in one pass over the loader, and kept on the device in the dtype they have; each epoch then trains on them in
    a new order, drawn from the trainer's generator, in batches of the loader's size. So for all stages but the first,
    which reads the loader in each epoch, random augmentation is drawn once per stage, and a sampler that chooses which
    images meet in a batch (:class:`~layerwise_ext.data.ClassBatchSampler`) has no part in it. Where early stopping ends
    a stage, the next one begins. What is kept is without the dropout of the stage before
    (:class:`~layerwise_ext.nn.LocalStage`), which is drawn anew in each step. With ``ema_decay`` the next stage gets
    what the averaged weights give. With ``process_group`` each process keeps the outputs of its part of the batches,
    and an order of its own.

    Args:
        stages, optimizer, ...: see :class:`Trainer`.
        cache: False runs the frozen stages anew in each step (fresh augmentation, no memory).
        cache_dir: a folder of this trainer's own, made if need be: the outputs are kept there, in a file that is mapped
            into memory, and may be larger than memory. The file is removed with the end of the stage. A run that is
            resumed uses the file that it finds, after a look at its checksum and at what it was made from (weights
            of the frozen stages, random generators, number of batches; not the data), from the end of the stage's first
            epoch on; otherwise they are computed again.
        cache_limit_bytes: where a stage's inputs would take more than this, in memory or in the file, or the loader has
            no length to tell, the frozen stages run in each step, with a warning in the log.

    Attributes:
        stage: index of the stage that is being trained; ``len(stages)`` when all are done.
        stage_epoch: finished epochs of that stage.

    Raises:
        ValueError: a head that looks at the image, behind the first stage; ``cache_dir`` that is not a folder, or with
            ``cache=False``.
    """

    def __init__(
        self,
        *args: Any,
        cache: bool = True,
        cache_dir: str | Path | None = None,
        cache_limit_bytes: int = 2 << 30,
        **kwargs: Any,
    ) -> None:
        if cache_dir is not None and not cache:
            raise ValueError(f"cache_dir is {str(cache_dir)!r} with cache=False; leave one of the two out")
        if cache_dir is not None and Path(cache_dir).exists() and not Path(cache_dir).is_dir():
            raise ValueError(f"cache_dir is {str(cache_dir)!r}, which is not a folder")
        super().__init__(*args, **kwargs)
        self.cache = cache
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.cache_limit_bytes = cache_limit_bytes
        self.stage = 0
        self.stage_epoch = 0
        self._features: FeatureCache | None = None
        self._fits = True
        # Generators as they were when the current stage's inputs were computed: a resumed run computes them again.
        self._cache_random_state: dict[str, Any] | None = None

    def fit(
        self,
        loader: Batches,
        epochs: int,
        val_loader: Batches | None = None,
        on_epoch_end: Callable[[Trainer, Record], None] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> list[Record]:
        """As :meth:`Trainer.fit`, with ``epochs`` for each stage.

        Stages that are done keep their epochs: a larger number in a later call is for those that are not. Where all are
        done nothing is trained, with a warning in the log.
        """
        if self.stage == len(self.stages) and self._logs:
            logger.warning("all %d stages are trained; nothing is left to do", len(self.stages))
        return super().fit(loader, epochs, val_loader, on_epoch_end, callbacks)

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
        if self.stage == len(self.stages):
            raise RuntimeError(f"all {len(self.stages)} stages are trained; there is none that a step could train")
        stage = self.stages[self.stage]
        x = x.detach()
        if self.stage > 0 and (dropout := self.stages[self.stage - 1].dropout) is not None:
            x = drop_channels(x, dropout.p)  # the frozen stage itself is in eval mode
        with self._autocast():
            _, loss, logits = stage(x, target)
        self._backward(loss, weight, self.stage)
        if update:
            self._update(self.stage)
        return self._result([loss], [logits], target)

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
        # A finished stage is never trained again: what its optimiser remembers, and its best epoch, only take memory.
        self.optimizers[self.stage].state.clear()
        if self._watches:
            self._watches[self.stage].forget()
        self._adopt_averages([self.stage])
        if (path := self._cache_path()) is not None:
            path.unlink(missing_ok=True)  # of this run, or of one that was killed before it could
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
        return self._features.batches(self._replicas.own_generator(self.generator)), len(self._features)

    def _frozen_outputs(self, loader: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        for x, target in self._on_device(self._replicas.share(loader)):
            with torch.no_grad(), self._autocast():
                for stage in self.stages[: self.stage]:
                    x = stage.features(x)
            yield x, target

    def _fill_cache(self, loader: Batches) -> None:
        """Compute the current stage's inputs, where they fit; a resumed run sees the same order and augmentation."""
        now = random_state.capture(loader, self.device)
        replay = self._cache_random_state
        path, key = self._cache_path(), ""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            key = self._cache_key(now if replay is None else replay, loader)
        if replay is not None:
            self._features = None if path is None else self._features_of_before(path, key)
            if self._replicas.all(self._features is not None):
                return
            random_state.restore(replay, loader, self.device)
        self._features = FeatureCache.fill(
            self._frozen_outputs(loader), length(loader), self.cache_limit_bytes, path, key
        )
        self._fits = self._replicas.all(self._features is not None)
        if not self._fits:  # here or in another process
            self._features = None
            if path is not None:
                path.unlink(missing_ok=True)
        if replay is not None or not self._fits:
            random_state.restore(now, loader, self.device)
        if self._fits and replay is None:
            self._cache_random_state = now

    def _cache_path(self) -> Path | None:
        """Of the current stage's inputs, those of this process."""
        if self.cache_dir is None:
            return None
        part = "" if self._replicas.size == 1 else f".{self._replicas.rank}of{self._replicas.size}"
        return self.cache_dir / f"stage{self.stage}{part}.features"

    def _features_of_before(self, path: Path, key: str) -> FeatureCache | None:
        try:
            return FeatureCache.open(path, key, self.device)
        except FeatureFileError as error:
            logger.warning("%s: the outputs of the frozen stages are computed again", error)
            return None

    def _cache_key(self, state: dict[str, Any], loader: Batches) -> str:
        """What the outputs of the frozen stages depend on, but for the data."""
        key = hashlib.sha256(f"{length(loader)} {self.autocast_dtype} {self.device.type}".encode())
        tensors = [t for stage in self.stages[: self.stage] for t in stage.state_dict().values()]
        for t in [*tensors, state["cpu"], *state["loader"], *([state["cuda"]] if "cuda" in state else [])]:
            key.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return key.hexdigest()

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
