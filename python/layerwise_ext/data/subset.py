"""A few labelled images of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise_ext.data.files import Split


def count_by_class(labels: Tensor) -> Tensor:
    """Images of each class, ``[classes]``.

    Raises:
        ValueError: there are none, or some without a label.
    """
    if len(labels) == 0 or int(labels.min()) < 0:
        raise ValueError("labels is empty or has -1, images without a label; every image needs one here")
    return torch.bincount(labels)


def shuffled_by_class(labels: Tensor, generator: torch.Generator | None) -> Tensor:
    """Indices ``[N]``: those of class 0 first, then those of class 1, ..., in random order within each."""
    order = torch.randperm(len(labels), generator=generator)
    return order[labels[order].argsort(stable=True)]


def subset(split: Split, *, per_class: int, seed: int = 0) -> Split:
    """As many images of each class, drawn at random, in the order they have in ``split``.

    The same seed gives the same images; with more ``per_class``, the same ones and others.

    Raises:
        ValueError: ``per_class`` below 1, a class with fewer images, or images without a label.
    """
    if per_class < 1:
        raise ValueError(f"per_class is {per_class}; allowed: 1 or more")
    labels = split.labels.cpu()  # where the order is drawn
    counts = count_by_class(labels)
    for label, count in enumerate(counts.tolist()):
        if 0 < count < per_class:
            raise ValueError(f"per_class is {per_class}, but class {label} has {count} images")
    order = shuffled_by_class(labels, torch.Generator().manual_seed(seed))
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)  # within its class
    chosen = order[rank < per_class].sort().values
    return Split(*(part[chosen.to(part.device)] for part in split))
