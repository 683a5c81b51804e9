"""Loss and accuracy of each stage, kept on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise_ext.train.replicas import ReplicaGroup

# One epoch: "epoch" (from 1), "stages" (indices of those that were trained), "train_loss" and "train_accuracy" (lists
# of floats, of these stages), with a val_loader also "val_loss" and "val_accuracy" (of these stages, too, but in greedy
# training of each one up to the one that was trained), and "seconds" (training only).
Record = dict[str, Any]


class StepResult(NamedTuple):
    """Of each trained stage, ``loss [S]`` and the number of ``correct [S]`` predictions (NaN where the head has no
    classifier); the number of samples that have a label, a target other than -100, ``labelled []``; tensors, not read
    back."""

    loss: Tensor
    correct: Tensor
    labelled: Tensor


class Metrics:
    """Loss and accuracy per stage over an epoch, accumulated on the device and read once.

    A loss of labels is NaN for a batch that has none, as in ``cross_entropy``: such a batch has no part in the mean.
    """

    def __init__(self, stages: int, device: torch.device) -> None:
        self._loss = torch.zeros(stages, dtype=torch.float64, device=device)
        self._counted = torch.zeros(stages, dtype=torch.float64, device=device)
        self._correct = torch.zeros(stages, dtype=torch.float64, device=device)
        self._labelled = torch.zeros((), dtype=torch.float64, device=device)
        self.samples = 0

    def update(self, result: StepResult, samples: int) -> None:
        has_loss = (result.labelled > 0) | ~result.loss.isnan()
        self._loss.add_(torch.where(has_loss, result.loss, 0.0), alpha=samples)
        self._counted.add_(has_loss, alpha=samples)
        self._correct.add_(result.correct)
        self._labelled.add_(result.labelled)
        self.samples += samples

    def add_up(self, replicas: ReplicaGroup) -> None:
        """Over all replicas."""
        if replicas.size > 1:
            samples = self._loss.new_tensor([self.samples])
            own = (self._loss, self._counted, self._correct, self._labelled[None], samples)
            parts = replicas.add_up(torch.cat(own)).split([len(t) for t in own])
            self._loss, self._counted, self._correct, labelled, samples = parts
            self._labelled, self.samples = labelled[0], int(samples)

    def loss(self) -> list[float]:
        """Mean per sample of each stage."""
        return (self._loss / self._counted).tolist()

    def accuracy(self) -> list[float]:
        """Between 0 and 1, of each stage, over the samples with a label; NaN where the head has no classifier."""
        return (self._correct / self._labelled).tolist()


def step_result(losses: list[Tensor], logits: list[Tensor | None], target: Tensor) -> StepResult:
    """Metrics of one batch from the loss and the logits ``[N, num_classes]`` of each stage; ``target [N]``."""
    with torch.no_grad():
        # A stage without logits predicts nothing: its row is not a number of samples.
        hits = [None if t is None else t.argmax(dim=1).eq(target) for t in logits]
        missing = torch.full_like(target, float("nan"), dtype=torch.float64)
        correct = torch.stack([missing if t is None else t.double() for t in hits]).sum(dim=1)
        return StepResult(torch.stack(losses).detach(), correct, (target != -100).sum())


def collapses(accuracies: Sequence[float], classes: int) -> bool:
    """Whether the last of a stage's accuracies, epoch for epoch, is the first one of a collapse.

    A stage has collapsed that has lost more than half of what its best accuracy so far was above chance (1/classes),
    where that was clearly above: three times chance, or half of the way from chance to 1.
    """
    chance = 1 / classes

    def has_collapsed(epoch: int) -> bool:
        best = max(accuracies[:epoch], default=chance)
        is_clear = best >= min(3 * chance, (1 + chance) / 2)
        return is_clear and accuracies[epoch] - chance < (best - chance) / 2

    last = len(accuracies) - 1
    return has_collapsed(last) and not has_collapsed(last - 1)


def summary(record: Record) -> str:
    """One line about the last stage of a record."""
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
    parts = [f"{name} {record[name][-1]:.4f}" for name in names if name in record]
    return ", ".join([*parts, f"{record['seconds']:.1f} s"])
