"""What can be done with stages without training them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from layerwise_ext.nn import LocalStage
from layerwise_ext.train.metrics import Metrics, StepResult, step_result

Batches = Iterable[tuple[Tensor, Tensor]]


class Evaluator(ABC):
    """Runs stages in eval mode; the base of :class:`~layerwise_ext.train.Trainer`, whose attributes it reads."""

    stages: list[LocalStage]
    device: torch.device
    autocast_dtype: torch.dtype | None
    channels_last: bool

    @abstractmethod
    def _reported(self) -> list[int]:
        """Indices of the stages whose heads are evaluated, ascending."""

    def evaluate(self, loader: Batches) -> dict[str, Any]:
        """Loss and accuracy in eval mode, without touching parameters or statistics.

        Returns:
            ``stages`` (indices of the heads that were evaluated), ``loss`` and ``accuracy`` (one float per such stage;
            the mean over samples; an accuracy is NaN where the head has no classifier), ``final`` (accuracy of the
            last of them) and ``samples``.
        """
        reported = self._reported()
        metrics = Metrics(len(reported), self.device)
        with self._eval_mode(), torch.inference_mode():
            for images, target in self._on_device(loader):
                metrics.update(self._score(images, target, reported), len(target))
        if metrics.samples == 0:
            raise RuntimeError("loader gave no batches; there is nothing to evaluate")
        accuracy = metrics.accuracy()
        return {
            "stages": reported,
            "loss": metrics.loss(),
            "accuracy": accuracy,
            "final": accuracy[-1],
            "samples": metrics.samples,
        }

    def _score(self, x: Tensor, target: Tensor, reported: list[int]) -> StepResult:
        losses, logits, images = [], [], x
        with self._autocast():
            for index, stage in enumerate(self.stages[: reported[-1] + 1]):
                if index in reported:
                    output = stage(x, target, images)
                    losses.append(output.loss)
                    logits.append(output.logits)
                    x = output.features
                else:
                    x = stage.features(x)
        return step_result(losses, logits, target)

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        training = [(module, module.training) for stage in self.stages for module in stage.modules()]
        for stage in self.stages:
            stage.eval()
        try:
            yield
        finally:
            for module, flag in training:
                module.training = flag

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _on_device(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"the loader gave a {type(batch).__name__}; each batch must be a pair (images, target)")
            images, target = batch
            yield self._images_on_device(images), target.to(self.device, non_blocking=True)

    def _images_on_device(self, images: Tensor) -> Tensor:
        if self.channels_last and images.dim() == 4:
            return images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return images.to(self.device, non_blocking=True)
