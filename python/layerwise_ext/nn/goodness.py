"""The goodness of forward-forward training as a local loss (Hinton 2022, arXiv 2212.13345)."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise_ext.nn.heads import HeadOutput, LocalHead, check_target, cross_entropy
from layerwise_ext.nn.moments import PooledMoments


class GoodnessHead(LocalHead):
    """Tells real data from negative data by the mean square of the activation.

    ``goodness = mean of y*y`` over all elements of a sample, from the second moments, and the probability that the
    sample is real is ``sigmoid(goodness - threshold)``. A batch holds both kinds, and its target says which is which: 1
    for positive (real) samples, 0 for negative ones, -100 for those that the loss leaves out. The loss is the logistic
    one, as the cross-entropy of two logits, ``[0, goodness - threshold]``, so that the accuracy which a trainer reports
    is the share of samples whose kind was recognised.

    What a negative sample is, is up to the caller: in the paper an image with a wrong label written into its first
    pixels. To classify an image, write each label into it in turn and take the one with the largest :meth:`goodness`,
    summed over the stages. A stage must not read the goodness of the one before off the length of its input: let its
    body begin with a normalisation of each sample, such as
    ``torch.nn.RMSNorm((C, H, W), elementwise_affine=False)``.

    Args:
        threshold: the goodness of a sample that may be either.

    Shapes:
        moments of ``[N, C, H, W]``; target ``[N]``, int64: 0, 1, or -100.

    Raises:
        ValueError: a target of another shape or (on the CPU; a device-side assertion on CUDA) out of range.
        TypeError: a target that is not int64.
    """

    bins = (1, 1)

    def __init__(self, threshold: float = 1.0) -> None:
        super().__init__()
        self.threshold = threshold

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

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"
