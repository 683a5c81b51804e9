"""Local losses of features and labels, in plain PyTorch; users find them in :mod:`layerwise_ext.functional`."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity_matching_loss(features: Tensor, target: Tensor, *, num_classes: int) -> Tensor:
    """Similarity matching, the local loss 'sim' of Nokland & Eidnes 2019, arXiv 1901.06656.

    The mean over all pairs of samples of ``(s_ij - t_ij)^2``: ``s_ij`` is the cosine between the features of two
    samples, each less its own mean (1e-8 is added to its norm), and ``t_ij`` that of their one-hot labels: 1 within a
    class, ``-1 / (num_classes - 1)`` between classes. Of the ``N x N`` and the ``D x D`` matrix of products the smaller
    one is formed, so that a large batch needs no more memory than a few times its features. The paper's clamp of
    ``s_ij`` to [-1, 1] acts on rounding alone; here the products are float64, and it is left out.

    Args:
        features: ``[N, D]``, of a floating-point dtype. A sample whose features are all equal has no direction: its
            cosines and its gradient are 0.
        target: ``[N]``, int64 in ``[0, num_classes)``, or -100 for a sample that is left out, with all its pairs.
        num_classes: number of classes, at least 2.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features), under autocast too. NaN, without a gradient,
        where all samples are left out, as ``cross_entropy`` has it.

    Raises:
        ValueError: wrong shape, ``num_classes`` below 2, a target out of range (on CUDA a device-side assertion).
        TypeError: features that are not floating-point, a target that is not int64.
    """
    _check_labelled("features", features, target)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    with torch.autocast(features.device.type, enabled=False):
        counted = (target != -100).double()[:, None]
        x = features.double()
        x = _directions(x - x.mean(1, keepdim=True), 1e-8) * counted  # [N, D]
        # [N, num_classes]: corners of a simplex about 0, so that label @ label.T is t_ij.
        label = (_one_hot(target, num_classes) - counted / num_classes) * (num_classes / (num_classes - 1)) ** 0.5
        if x.size(0) <= x.size(1):
            total = _sum_of_squares(x @ x.T - label @ label.T)
        else:  # the same, multiplied out
            products = x.T @ x, label.T @ x, label.T @ label
            within, across, labels = map(_sum_of_squares, products)
            total = within - 2 * across + labels
        loss = _mean(total, counted.sum().square())
    return loss.to(torch.promote_types(features.dtype, torch.float32))


def _check_labelled(name: str, features: Tensor, target: Tensor) -> None:
    if features.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions [N, D], got shape {list(features.shape)}")
    if not features.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {features.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if target.shape != features.shape[:1]:
        raise ValueError(f"target must have shape [{features.size(0)}], got {list(target.shape)}")


def _directions(x: Tensor, eps: float) -> Tensor:
    """Rows of ``x [N, D]`` over their norms + ``eps``; the gradient of a row of zeros is 0."""
    square = x.square().sum(1, keepdim=True)
    has_direction = square > 0
    return x * (has_direction / (torch.where(has_direction, square, 1).sqrt() + eps))


def _one_hot(target: Tensor, num_classes: int) -> Tensor:
    """``[N, num_classes]`` in float64, a row of zeros for -100; does not wait for the device."""
    counted = target != -100
    zeros = torch.zeros(target.size(0), num_classes, dtype=torch.float64, device=target.device)
    try:
        return zeros.scatter(1, torch.where(counted, target, 0)[:, None], counted.double()[:, None])
    except RuntimeError as error:
        raise ValueError(f"target is out of range: {error}; allowed: 0 to {num_classes - 1}, or -100") from error


def _sum_of_squares(t: Tensor) -> Tensor:
    return t.square().sum()


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``; NaN where there is nothing to count, and no gradient comes from that."""
    return torch.where(count > 0, total / count.clamp(min=1), float("nan"))


def supervised_contrastive_loss(features: Tensor, target: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, the form called 'out').

    For a sample i with partners P(i), the others of its class, and with the cosines s_ij of the features of two
    samples, it is the mean over P(i) of ``-log(exp(s_ip / temperature) / sum over j != i of exp(s_ij / temperature))``;
    then the mean over the samples that have a partner, 0 where there are none. Takes a few matrices of ``N x N``.

    Args:
        features: ``[N, D]``, of a floating-point dtype. A sample of zeros has cosines and gradient 0.
        target: ``[N]``, int64 class indices, or -100 for a sample that is left out, as if it were not in the batch.
        temperature: positive.

    Returns:
        The loss, a scalar in float32 (float64 for float64 features), under autocast too.

    Raises:
        ValueError: wrong shape, ``temperature`` not positive.
        TypeError: features that are not floating-point, a target that is not int64.
    """
    _check_labelled("features", features, target)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    with torch.autocast(features.device.type, enabled=False):
        x = _directions(features.to(torch.promote_types(features.dtype, torch.float32)), 1e-12)
        counted = target != -100
        itself = torch.eye(target.size(0), dtype=torch.bool, device=target.device)
        others = counted & ~itself  # [N, N]: row i may be compared with column j
        partners = (target[:, None] == target) & others
        # Not -inf: a row may have no others, and the softmax of nothing would be NaN.
        cosines = torch.where(others, x @ x.T / temperature, torch.finfo(x.dtype).min)
        terms = torch.where(partners, cosines.log_softmax(1), 0).sum(1)
        number = partners.sum(1)
        return -(terms / number.clamp(min=1)).sum() / (number > 0).sum().clamp(min=1)
