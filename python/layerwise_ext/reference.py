"""The operators in plain PyTorch: the specification that the kernels are held to.

Every function is differentiable by autograd, in any floating dtype; statistics and sums are float32 (float64 for
float64 maps). One stage:

    z    = conv(x, w) + b                               [N, C, H, W]
    xhat = (z - mu) * rstd,  rstd = 1 / sqrt(var + eps)    per channel; var is biased
    u    = gamma * xhat + beta (+ residual)
    y    = act(u), for the piecewise linear ones s * u: s = 1 where u > 0, else the negative slope
    y    = max, mean or rearrangement of each window of it, with downsampling
    m1   = sum of y over a pooling cell,  m2 = sum of y*y   [N, C, bins_h, bins_w]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import ActivationMoments, Downsample, Pair, _downsampling, _pair


def cell_bounds(size: int, bins: int) -> list[tuple[int, int]]:
    """``[begin, end)`` of each cell of adaptive average pooling in one dimension; neighbours may share an element."""
    return [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]


def cell_sums(t: Tensor, bins: Sequence[int]) -> Tensor:
    """Sum of ``t [N, C, H, W]`` over each cell, ``[N, C, bins_h, bins_w]``."""
    rows, columns = (cell_bounds(size, count) for size, count in zip(t.shape[2:], bins, strict=True))
    return torch.stack(
        [
            torch.stack([t[..., top:bottom, left:right].sum((2, 3)) for left, right in columns], -1)
            for top, bottom in rows
        ],
        -2,
    )


def expand_cells(p: Tensor, size: Sequence[int]) -> Tensor:
    """Adjoint of :func:`cell_sums`: each element gets the sum of ``p`` over the cells that cover it."""
    out = p.new_zeros(*p.shape[:2], *size)
    rows, columns = (cell_bounds(extent, count) for extent, count in zip(size, p.shape[2:], strict=True))
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            out[..., top:bottom, left:right] += p[..., i : i + 1, j : j + 1]
    return out


def batch_statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel."""
    mean = z.mean((0, 2, 3))
    return mean, (z - mean[:, None, None]).square().mean((0, 2, 3))


def pooled_linear_cross_entropy(
    m1: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    size: Sequence[int],
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See :func:`layerwise_ext.functional.pooled_linear_cross_entropy`."""
    rows, columns = (
        m1.new_tensor([end - begin for begin, end in cell_bounds(extent, count)])
        for extent, count in zip(size, m1.shape[2:], strict=True)
    )
    logits = F.linear((m1 / (rows[:, None] * columns)).flatten(1), weight, bias)
    log_p = logits.log_softmax(1)
    wanted = torch.full_like(log_p, label_smoothing / logits.shape[1])
    counted = target != -100
    wanted.scatter_add_(1, target.clamp(min=0)[:, None], torch.full_like(log_p[:, :1], 1 - label_smoothing))
    losses = -(wanted * log_p).sum(1)
    return torch.where(counted, losses, 0).sum() / counted.sum(), logits


def slope(u: Tensor, activation: str, negative_slope: float) -> Tensor:
    """``s`` with ``y = s * u``."""
    below = {"relu": 0.0, "leaky_relu": negative_slope, "identity": 1.0}[activation]
    return torch.where(u > 0, torch.ones_like(u), torch.full_like(u, below))


def random_slopes(size: Sequence[int], seed: int, lower: float, upper: float) -> Tensor:
    """The slopes of 'rrelu' for a map ``[N, C, H, W]``, float64: a hash of the seed and the number of the element."""

    def mix(x: Tensor) -> Tensor:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    index = torch.arange(math.prod(size)).reshape(list(size)) & 0xFFFFFFFF
    bits = mix((mix(index ^ (seed & 0xFFFFFFFF)) + (seed >> 32)) & 0xFFFFFFFF) >> 8
    return lower + bits.double() * 2.0**-24 * (upper - lower)


def activate(
    u: Tensor, activation: str, negative_slope: float, upper_slope: float, learned: Tensor | None, seed: Tensor | None
) -> Tensor:
    """``act(u)``; u is ``[N, C, H, W]``."""
    if activation == "prelu":
        assert learned is not None
        return torch.where(u > 0, u, learned.to(u.dtype).reshape(-1, 1, 1) * u)
    if activation == "rrelu":
        assert seed is not None
        return torch.where(u > 0, u, random_slopes(u.shape, int(seed), negative_slope, upper_slope).to(u) * u)
    smooth: dict[str, Callable[[Tensor], Tensor]] = {
        "relu6": F.relu6, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "hardswish": F.hardswish,
    }  # fmt: skip
    if activation in smooth:
        return smooth[activation](u)
    return slope(u.detach(), activation, negative_slope) * u


def _downsample(y: Tensor, mode: str, window: Sequence[int], ceil_mode: bool, dtype: torch.dtype) -> Tensor:
    """Each window of y becomes one element; which one is the largest is decided after rounding to ``dtype``."""
    if mode == "none":
        return y
    h, w = window
    if mode == "avg":
        return F.avg_pool2d(y, (h, w), ceil_mode=ceil_mode)
    if mode == "max":
        _, index = F.max_pool2d(y.detach().to(dtype), (h, w), ceil_mode=ceil_mode, return_indices=True)
        return y.flatten(2).gather(2, index.flatten(2)).reshape(index.shape)
    n, c, height, width = y.shape
    return y.reshape(n, c, height // h, h, width // w, w).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def _update_running(running: Tensor, batch: Tensor, momentum: float) -> None:
    with torch.no_grad():
        running.mul_(1 - momentum).add_(momentum * batch.detach().to(running.dtype))


def bn_act_moments(
    z: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    upper_slope: float = 1 / 3,
    slope: Tensor | None = None,
    seed: Tensor | None = None,
    residual: Tensor | None = None,
    downsample: Downsample = None,
    ceil_mode: bool = False,
    bins: Pair = (1, 1),
    second_moment: bool = True,
) -> ActivationMoments:
    """See :func:`layerwise_ext.functional.bn_act_moments`."""
    dtype = z.dtype
    z = z.to(torch.promote_types(dtype, torch.float32))
    mode, window = _downsampling(downsample)
    if mode == "stride":
        mode, z = "none", z[..., :: window[0], :: window[1]]
    if training:
        mean, var = batch_statistics(z)
        if running_mean is not None and running_var is not None:
            count = z.numel() // z.size(1)
            _update_running(running_mean, mean, momentum)
            _update_running(running_var, var * count / (count - 1), momentum)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean.to(z.dtype), running_var.to(z.dtype)
    gamma = torch.ones_like(mean) if weight is None else weight.to(z.dtype)
    beta = torch.zeros_like(mean) if bias is None else bias.to(z.dtype)
    xhat = (z - mean[:, None, None]) * torch.rsqrt(var + eps)[:, None, None]
    u = gamma[:, None, None] * xhat + beta[:, None, None]
    if residual is not None:
        u = u + residual.to(u.dtype)
    y = activate(u, activation, negative_slope, upper_slope, slope, seed)
    y = _downsample(y, mode, window, ceil_mode, dtype)
    cells = _pair("bins", bins)
    m2 = cell_sums(y * y, cells) if second_moment else cast(Tensor, None)
    return ActivationMoments(y.to(dtype), cell_sums(y, cells), m2)


def conv_bn_act_moments(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    upper_slope: float = 1 / 3,
    slope: Tensor | None = None,
    seed: Tensor | None = None,
    residual: Tensor | None = None,
    downsample: Downsample = None,
    ceil_mode: bool = False,
    bins: Pair = (1, 1),
    second_moment: bool = True,
) -> ActivationMoments:
    """See :func:`layerwise_ext.functional.conv_bn_act_moments`."""
    mode, window = _downsampling(downsample)
    strides = _pair("stride", stride)
    if mode == "stride":
        strides, downsample = [s * w for s, w in zip(strides, window, strict=True)], None
    z = F.conv2d(input, conv_weight, conv_bias, strides, _pair("padding", padding), _pair("dilation", dilation), groups)
    return bn_act_moments(
        z, running_mean, running_var, weight, bias, training=training, momentum=momentum, eps=eps,
        activation=activation, negative_slope=negative_slope, upper_slope=upper_slope, slope=slope, seed=seed,
        residual=residual, downsample=downsample, ceil_mode=ceil_mode, bins=bins, second_moment=second_moment,
    )  # fmt: skip


class ClosedForm(NamedTuple):
    """Gradients of a stage: ``dz [N, C, H, W]``, ``dgamma [C]``, ``dbeta [C]``."""

    dz: Tensor
    dgamma: Tensor
    dbeta: Tensor


def closed_form_backward(
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    p: Tensor,
    q: Tensor,
    grad_y: Tensor | None = None,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    fixed_statistics: bool = False,
) -> ClosedForm:
    """The backward pass that the kernels compute, from ``p = dL/dm1`` and ``q = dL/dm2 [N, C, bins_h, bins_w]``.

    The affine part needs four sums per sample, cell and channel, which the forward pass gathers:

        A0 = sum s     A1 = sum s*xhat     B0 = sum y*s     B1 = sum y*s*xhat
        dbeta  = sum over samples and cells of  p*A0 + 2*q*B0     (+ sum of s*grad_y)
        dgamma = sum over samples and cells of  p*A1 + 2*q*B1     (+ sum of s*grad_y*xhat)
        dz     = gamma*rstd * (du - dbeta/M - xhat*dgamma/M),  du = s * (p + 2*q*y + grad_y),  M = N*H*W

    With fixed statistics (evaluation mode) the two means are absent from dz.
    """
    channel = (slice(None), None, None)
    xhat = (z - mean[channel]) * rstd[channel]
    u = gamma[channel] * xhat + beta[channel]
    s = slope(u, activation, negative_slope)
    y = s * u
    a0, a1, b0, b1 = (cell_sums(t, p.shape[2:]) for t in (s, s * xhat, y * s, y * s * xhat))
    dbeta = (p * a0 + 2 * q * b0).sum((0, 2, 3))
    dgamma = (p * a1 + 2 * q * b1).sum((0, 2, 3))
    dy = expand_cells(p, z.shape[2:]) + 2 * expand_cells(q, z.shape[2:]) * y
    if grad_y is not None:
        dbeta = dbeta + (s * grad_y).sum((0, 2, 3))
        dgamma = dgamma + (s * grad_y * xhat).sum((0, 2, 3))
        dy = dy + grad_y
    du = s * dy
    if not fixed_statistics:
        count = z.numel() // z.size(1)
        du = du - (dbeta[channel] + xhat * dgamma[channel]) / count
    return ClosedForm((gamma * rstd)[channel] * du, dgamma, dbeta)


def similarity_matching_loss(features: Tensor, target: Tensor, *, num_classes: int) -> Tensor:
    """See :func:`layerwise_ext.functional.similarity_matching_loss`."""
    counted = target != -100
    x, labels = features[counted], target[counted]
    x = x - x.mean(1, keepdim=True)
    norm = x.norm(dim=1, keepdim=True)
    x = torch.where(norm > 0, x / (norm + 1e-8), 0)
    similarity = (x @ x.T).clamp(-1, 1)
    wanted = torch.full_like(similarity, -1 / (num_classes - 1)).masked_fill(labels[:, None] == labels, 1)
    return F.mse_loss(similarity, wanted)


def supervised_contrastive_loss(features: Tensor, target: Tensor, *, temperature: float = 0.07) -> Tensor:
    """See :func:`layerwise_ext.functional.supervised_contrastive_loss`."""
    counted = target != -100
    x, labels = F.normalize(features[counted], eps=1e-12), target[counted]
    losses = []
    for i, cosines in enumerate((x @ x.T) / temperature):
        others = torch.arange(len(labels)) != i
        partners = others & (labels == labels[i])
        if partners.any():
            losses.append((cosines[others].logsumexp(0) - cosines[partners]).mean())
    return torch.stack(losses).mean() if losses else x.sum() * 0
