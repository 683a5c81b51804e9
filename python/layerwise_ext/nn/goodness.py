"""The goodness of forward-forward training as a local loss (Hinton 2022, arXiv 2212.13345)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise_ext.nn.heads import HeadOutput, LocalHead, check_target, cross_entropy
from layerwise_ext.nn.moments import PooledMoments

if TYPE_CHECKING:
    from layerwise_ext.nn.stage import LocalStage


class GoodnessHead(LocalHead):
    """Tells real data from negative data by the mean square of the activation.

    ``goodness = mean of y*y`` over all elements of a sample, from the second moments, and the probability that the
    sample is real is ``sigmoid(goodness - threshold)``. A batch holds both kinds, and its target says which is which: 1
    for positive (real) samples, 0 for negative ones, -100 for those that the loss leaves out. The loss is the logistic
    one, as the cross-entropy of two logits, ``[0, goodness - threshold]``, so that the accuracy which a trainer reports
    is the share of samples whose kind was recognised.

    What a negative sample is, is up to the caller: in the paper an image with a wrong label written into its first
    pixels (:func:`write_labels`, :class:`~layerwise_ext.train.LabelledPairs`). To classify an image, write each label
    into it in turn and take the one with the largest :meth:`goodness`, summed over the stages (:func:`label_goodness`).
    A stage must not read the goodness of the one before off the length of its input: let its body begin with a
    normalisation of each sample, such as ``torch.nn.RMSNorm((C, H, W), elementwise_affine=False)``.

    Args:
        threshold: the goodness of a sample that may be either.
        num_classes: of the labels that are written into images. With it a trainer evaluates and predicts classes, of
            images without a label in them; without it, kinds.

    Shapes:
        moments of ``[N, C, H, W]``; target ``[N]``, int64: 0, 1, or -100.

    Raises:
        ValueError: ``num_classes`` below 2; a target of another shape or (on the CPU; a device-side assertion on CUDA)
            out of range.
        TypeError: a target that is not int64.
    """

    bins = (1, 1)

    def __init__(self, threshold: float = 1.0, *, num_classes: int | None = None) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; allowed: 2 or more, None")
        self.threshold = threshold
        self.num_classes = num_classes

    def goodness(self, moments: PooledMoments) -> Tensor:
        """``[N]``, the mean of y*y over each sample."""
        return moments.second_moment.mean((1, 2, 3))

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        goodness = self.goodness(moments)
        logits = torch.stack([torch.zeros_like(goodness), goodness - self.threshold], 1)
        if target is None:
            return HeadOutput(logits, None)
        check_target(target, goodness)
        with torch.autocast(logits.device.type, enabled=False):
            return HeadOutput(logits, cross_entropy(logits, target))

    def label_loss(self, goodness: Tensor, labels: Tensor) -> Tensor:
        """The loss of images ``[N]`` with their own labels and with every wrong one, each half of it.

        Args:
            goodness: ``[N, num_classes]``, with each label.
            labels: int64 ``[N]``, the right ones; -100 for an image that is left out.
        """
        counted = labels != -100
        excess, labels = (goodness - self.threshold)[counted], labels[counted]
        right = excess.gather(1, labels[:, None])[:, 0]
        wrong = (F.softplus(excess).sum(1) - F.softplus(right)) / (excess.shape[1] - 1)
        return (F.softplus(-right) + wrong).mean() / 2

    def extra_repr(self) -> str:
        classes = "" if self.num_classes is None else f", num_classes={self.num_classes}"
        return f"threshold={self.threshold}{classes}"


def write_labels(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Copies of images with their labels in them: the first elements are 1 for the label and 0 for the others.

    Args:
        images: ``[N, C, H, W]``, floating; the elements are those of the first rows of the first channel.
        labels: int64 ``[N]``.
        num_classes: how many elements there are to be.

    Raises:
        ValueError: images of fewer elements.
    """
    if images[0].numel() < num_classes:
        raise ValueError(f"num_classes is {num_classes}; images {list(images.shape[1:])} have fewer elements")
    rows = images.flatten(1).clone()
    rows[:, :num_classes] = F.one_hot(labels, num_classes).to(rows)
    return rows.view(images.shape).contiguous(memory_format=_layout(images))


def label_goodness(stages: Iterable[LocalStage], images: Tensor) -> list[Tensor]:
    """Of each stage its goodness ``[N, num_classes]`` for images with each label in them.

    The sum over the stages is largest for the label that the network gives the image. It runs once for each label.

    Args:
        stages: in a row, each with a :class:`GoodnessHead` of so many classes.
        images: ``[N, C, H, W]``, without labels.

    Raises:
        ValueError: a stage with another head; images of fewer elements than classes.
    """
    stages = list(stages)
    num_classes = label_classes(stages)
    if num_classes is None:
        raise ValueError("stages have no GoodnessHead with num_classes; there are no labels to write into images")
    by_label: list[list[Tensor]] = []
    for label in range(num_classes):
        x = write_labels(images, torch.full((len(images),), label, device=images.device), num_classes)
        by_label.append([])
        for stage in stages:
            x, moments = stage.moments(x, detach=not torch.is_grad_enabled())
            by_label[-1].append(cast(GoodnessHead, stage.head).goodness(moments))
    return [torch.stack(goodness, 1) for goodness in zip(*by_label, strict=True)]


def label_classes(stages: Iterable[LocalStage]) -> int | None:
    """Of the labels that are written into the images of a network; None where its heads look for none.

    Raises:
        ValueError: heads of which some look for labels, others for none or for other ones.
    """
    found = [stage.head.num_classes if isinstance(stage.head, GoodnessHead) else None for stage in stages]
    if any(classes != found[-1] for classes in found):
        raise ValueError(f"the heads look for labels of {found} classes; allowed: the same in all stages, or none")
    return found[-1]


def _layout(images: Tensor) -> torch.memory_format:
    is_last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format
