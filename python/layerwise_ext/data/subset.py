"""A few labelled images of each class, or a share of each."""

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
    order, rank, counts = _ranked(split.labels, seed)
    for label, count in enumerate(counts.tolist()):
        if 0 < count < per_class:
            raise ValueError(f"per_class is {per_class}, but class {label} has {count} images")
    return _chosen(split, order[rank < per_class])


def hold_out(split: Split, fraction: float, *, seed: int = 0) -> tuple[Split, Split]:
    """What is left of the images, and the share of each class that is taken out, to choose by and not to train on.

    Drawn at random, both in the order they have in ``split``; the same seed gives the same images. At least one image
    of each class is left.

    Args:
        split: images and labels.
        fraction: of each class, rounded to whole images.
        seed: of the draw.

    Raises:
        ValueError: ``fraction`` out of range, or so small that it takes no image; images without a label.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; allowed: above 0 and below 1")
    order, rank, counts = _ranked(split.labels, seed)
    shares = (counts * fraction).round().long().clamp(max=counts - 1)
    is_out = rank < shares.clamp(min=0).repeat_interleave(counts)
    if not bool(is_out.any()):
        raise ValueError(f"fraction is {fraction}, less than half an image of each class; allowed: larger ones")
    return _chosen(split, order[~is_out]), _chosen(split, order[is_out])


def _ranked(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`shuffled_by_class`, the place of each within its class, and the images of each class."""
    labels = labels.cpu()  # where the order is drawn
    counts = count_by_class(labels)
    order = shuffled_by_class(labels, torch.Generator().manual_seed(seed))
    return order, torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts), counts


def _chosen(split: Split, indices: Tensor) -> Split:
    indices = indices.sort().values
    return Split(*(part[indices.to(part.device)] for part in split))
