"""Batches for forward-forward training: images with their labels written into them, and with wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from layerwise_ext.nn import write_labels
from layerwise_ext.train.evaluation import Batches


class LabelledPairs:
    """A loader around another one, whose batches hold each image twice: with its own label in it, and with a wrong one.

    What :class:`~layerwise_ext.nn.GoodnessHead` is trained on (Hinton 2022, arXiv 2212.13345): batches
    ``(images [2B, C, H, W], kinds [2B])``, kinds int64, 1 and 0 in turn, of batches ``(images [B, C, H, W], labels
    [B])``: behind each image with its own label is the one with a wrong label, so that parts of a batch, such as those
    of several processes, have both kinds. Labels are written by :func:`~layerwise_ext.nn.write_labels`; wrong ones are
    drawn with equal probabilities, anew in each epoch. To :meth:`Trainer.evaluate` goes the loader itself.

    Args:
        loader: any iterable of batches with labels.
        num_classes: labels are 0 to ``num_classes - 1``.
        seed: of the wrong labels.

    Raises:
        ValueError: ``num_classes`` below 2; (when iterated) images with fewer elements than classes.
    """

    def __init__(self, loader: Batches, num_classes: int, *, seed: int = 0) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; allowed: 2 or more")
        self.loader = loader
        self.num_classes = num_classes
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        loader: Any = self.loader
        return len(loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            steps = torch.randint(1, self.num_classes, labels.shape, generator=self.generator)
            wrong = (labels + steps.to(labels.device)) % self.num_classes
            pairs = [write_labels(images, each, self.num_classes) for each in (labels, wrong)]
            kinds = [torch.ones_like(labels), torch.zeros_like(labels)]
            yield torch.stack(pairs, 1).flatten(0, 1), torch.stack(kinds, 1).flatten()
