"""What can be done with stages without training them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from layerwise_ext.nn import GoodnessHead, HeadOutput, LocalStage, label_goodness
from layerwise_ext.nn.goodness import label_classes
from layerwise_ext.train.metrics import Metrics, step_result

Batches = Iterable[tuple[Tensor, Tensor]]


class Evaluator(ABC):
    """Runs stages in eval mode; the base of :class:`~layerwise_ext.train.Trainer`, whose attributes it reads."""

    stages: list[LocalStage]
    device: torch.device
    autocast_dtype: torch.dtype | None
    channels_last: bool

    @property
    @abstractmethod
    def ema_stages(self) -> list[LocalStage]:
        """The stages that are run."""

    @abstractmethod
    def _reported(self) -> list[int]:
        """Indices of the stages whose heads are evaluated, ascending."""

    def evaluate(self, loader: Batches, *, ensemble: bool = False) -> dict[str, Any]:
        """Loss and accuracy in eval mode, without touching parameters or statistics.

        Args:
            loader: batches ``(images, target)``.
            ensemble: whether to report the accuracy of all heads together, too: see :meth:`predict`.

        Returns:
            ``stages`` (indices of the heads that were evaluated), ``loss`` and ``accuracy`` (one float per such stage;
            the mean over samples; an accuracy is NaN where the head has no classifier), ``final`` (accuracy of the
            last of them), ``samples`` and, when asked for, ``ensemble``.
        """
        reported = self._reported()
        metrics, together = Metrics(len(reported), self.device), Metrics(1, self.device)
        with self._eval_mode(), torch.inference_mode():
            for images, target in self._on_device(loader):
                outputs = self._outputs(images, reported, target)
                logits = [output.logits for output in outputs]
                losses = [cast(Tensor, output.loss) for output in outputs]
                metrics.update(step_result(losses, logits, target), len(target))
                if ensemble:
                    together.update(step_result(losses[-1:], [_ensemble(reported, logits)], target), len(target))
        if metrics.samples == 0:
            raise RuntimeError("loader gave no batches; there is nothing to evaluate")
        accuracy = metrics.accuracy()
        scores = {
            "stages": reported,
            "loss": metrics.loss(),
            "accuracy": accuracy,
            "final": accuracy[-1],
            "samples": metrics.samples,
        }
        return {**scores, "ensemble": together.accuracy()[0]} if ensemble else scores

    def predict(
        self,
        data: Tensor | Iterable[Tensor | tuple[Tensor, Tensor]],
        *,
        probabilities: bool = False,
        ensemble: bool = False,
    ) -> Tensor:
        """What the network says about images, in eval mode, without touching parameters or statistics.

        Args:
            data: images ``[N, C, H, W]``, or batches of them, with or without targets.
            probabilities: whether to return probabilities instead of logits.
            ensemble: average the probabilities of all heads that :meth:`evaluate` reports and that classify, with the
                weight ``2^n`` for stage n (Belilovsky et al. 2019, arXiv 1812.11446); the logits are their logarithm.

        Returns:
            ``[N, num_classes]``, on the trainer's device, of the last head; in greedy training of the stage that is
            being trained or was trained last.

        Raises:
            ValueError: the head has no classifier.
            RuntimeError: no batches.
        """
        reported = self._reported() if ensemble else self._reported()[-1:]
        logits = []
        with self._eval_mode(), torch.no_grad():
            for batch in [data] if isinstance(data, Tensor) else data:
                images = self._images_on_device(batch if isinstance(batch, Tensor) else batch[0])
                outputs = [output.logits for output in self._outputs(images, reported)]
                logits.append(_ensemble(reported, outputs))
        if not logits:
            raise RuntimeError("data gave no batches; there is nothing to predict")
        return torch.cat(logits).softmax(1) if probabilities else torch.cat(logits)

    def _outputs(self, x: Tensor, reported: list[int], target: Tensor | None = None) -> list[HeadOutput]:
        """Of each of these stages."""
        stages = self.ema_stages[: reported[-1] + 1]
        if label_classes(stages) is not None:
            return self._outputs_by_label(stages, x, reported, target)
        outputs, images = [], x
        with self._autocast():
            for index, stage in enumerate(stages):
                if index in reported:
                    x, loss, logits = stage(x, target, images)
                    outputs.append(HeadOutput(logits, loss))
                else:
                    x = stage.features(x)
        return outputs

    def _outputs_by_label(
        self, stages: list[LocalStage], images: Tensor, reported: list[int], target: Tensor | None
    ) -> list[HeadOutput]:
        """Of forward-forward: the logits of a stage are the goodness of each label, with that of the stages before."""
        with self._autocast():
            found = label_goodness(stages, images)
        outputs, logits = {}, torch.zeros_like(found[0])
        for index in self._reported():  # those in front of the reported ones have their part, too
            head = cast(GoodnessHead, stages[index].head)
            logits = logits + found[index]
            loss = None if target is None else head.label_loss(found[index], target)
            outputs[index] = HeadOutput(logits, loss)
        return [outputs[index] for index in reported]

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        stages = self.ema_stages
        training = [(module, module.training) for stage in stages for module in stage.modules()]
        for stage in stages:
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


def _ensemble(stages: list[int], logits: list[Tensor | None]) -> Tensor:
    """The logarithm of the mean of the heads' probabilities ``[N, num_classes]``, weighted with 2^n; the logits of the
    only one."""
    classifying = [(n, t) for n, t in zip(stages, logits, strict=True) if t is not None]
    if not classifying:
        raise ValueError(f"stages[{stages[-1]}] predicts nothing: its head has no classifier")
    if len(stages) == 1:
        return classifying[0][1]
    last = classifying[-1][0]
    weights = [2.0 ** (n - last) for n, _ in classifying]
    terms = [t.log_softmax(1) + math.log(w / sum(weights)) for w, (_, t) in zip(weights, classifying, strict=True)]
    return torch.stack(terms).logsumexp(0)
