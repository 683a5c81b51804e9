"""Fused operators: batch norm, activation and pooled moments in one pass over the pre-activation, each way.

All take maps ``[N, C, H, W]`` in float32, bfloat16, float16 or float64, ``channels_last`` or contiguous, each read in
its own layout; statistics, moments and their gradients are float32 (float64 for float64 maps). The formulas stand in
:mod:`layerwise_ext.reference`, which is the specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _replicas
from ._losses import similarity_matching_loss as similarity_matching_loss
from ._losses import supervised_contrastive_loss as supervised_contrastive_loss
from ._ops import Form, _is_channels_last
from ._ops import operators as _lib

Pair = int | Sequence[int]
Downsample = tuple[str, Pair] | None

DOWNSAMPLE_MODES = ("max", "avg", "stride", "space_to_depth")


class ActivationMoments(NamedTuple):
    """Activation and its pooled moments.

    Attributes:
        y: activation, ``[N, C, H, W]``, in the dtype of the input.
        m1: sum of ``y`` over each pooling cell, ``[N, C, bins_h, bins_w]``, float32 (float64 for float64 input).
        m2: sum of ``y * y`` over each pooling cell, as ``m1``; None with ``second_moment=False``.
    """

    y: Tensor
    m1: Tensor
    m2: Tensor


def _pair(name: str, value: Pair) -> list[int]:
    if isinstance(value, int):
        return [value, value]
    if len(value) != 2:
        raise ValueError(f"{name} must be an int or two ints, got {value!r}")
    return list(value)


def cell_area(size: Sequence[int], bins: Pair, device: torch.device | str | None = None) -> Tensor:
    """Number of elements of each cell of ``adaptive_avg_pool2d``; ``m1 / cell_area`` is what that function returns.

    Args:
        size: ``(H, W)`` of the map.
        bins: ``(bins_h, bins_w)``, or one int for both.

    Returns:
        float32 tensor ``[bins_h, bins_w]``.
    """
    sides = []
    for extent, count in zip(size, _pair("bins", bins), strict=True):
        # On the device: a copy from the host would wait for it, and could not be captured in a CUDA graph.
        i = torch.arange(count, device=device)
        sides.append(((i + 1) * extent + count - 1) // count - i * extent // count)
    return (sides[0][:, None] * sides[1]).float()


def _check_statistics(running_mean: Tensor | None, running_var: Tensor | None, training: bool, momentum: float) -> None:
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must lie between 0 and 1, got {momentum}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together, got only one of them")
    if not training and running_mean is None:
        raise ValueError("running_mean and running_var must be given with training=False")


def _check_more_than_one_value(shape: Sequence[int]) -> None:
    if shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(shape)}")


def _conv_size(
    size: Sequence[int], weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """``(H, W)`` of the convolution of a map ``[N, C, H, W]`` of this size."""
    (_, _, height, width), (_, _, rows, columns) = size, weight.shape
    return (
        (height + 2 * padding[0] - dilation[0] * (rows - 1) - 1) // max(1, stride[0]) + 1,
        (width + 2 * padding[1] - dilation[1] * (columns - 1) - 1) // max(1, stride[1]) + 1,
    )


def _downsampling(downsample: Downsample) -> tuple[str, list[int]]:
    """Mode and window; ``('none', [])`` without one."""
    if downsample is None:
        return "none", []
    if not isinstance(downsample, Sequence) or isinstance(downsample, str) or len(downsample) != 2:
        raise ValueError(f"downsample must be None or (mode, factor), got {downsample!r}")
    mode, factor = downsample
    if mode not in DOWNSAMPLE_MODES:
        raise ValueError(f"downsample mode is {mode!r}; allowed: {', '.join(map(repr, DOWNSAMPLE_MODES))}")
    window = _pair("downsample factor", factor)
    if min(window) < 1:
        raise ValueError(f"downsample factor must be at least 1, got {factor!r}")
    return mode, window


def _one_per_channel(slope: Tensor | None, channels: int) -> Tensor | None:
    """A single slope serves all channels."""
    return slope.expand(channels) if slope is not None and tuple(slope.shape) == (1,) else slope


def _make_form(
    device: torch.device,
    dtype: torch.dtype,
    eps: float,
    activation: str,
    negative_slope: float,
    upper_slope: float,
    slope: Tensor | None,
    seed: Tensor | None,
    residual: Tensor | None,
    mode: str,
    window: list[int],
    ceil_mode: bool,
    bins: list[int],
) -> Form:
    """Mode 'stride' is the caller's to carry out. A missing seed is drawn, a residual is converted under autocast."""
    if activation == "rrelu" and seed is None:
        seed = torch.randint(2**62, (1,), device=device)
    if residual is not None and residual.dtype != dtype and torch.is_autocast_enabled(device.type):
        residual = residual.to(dtype)
    if mode == "stride":
        mode, window = "none", []
    return Form(eps, activation, negative_slope, upper_slope, slope, seed, residual, mode, window, ceil_mode, bins)


def _replicas_of(process_group: ProcessGroup | None) -> _replicas.Replicas | None:
    """None for a group of one."""
    if process_group is None:
        return None
    _replicas.check(process_group)
    return _replicas.Replicas(process_group) if process_group.size() > 1 else None


def _check_rank(name: str, t: Tensor) -> None:
    if t.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions [N, C, H, W], got shape {list(t.shape)}")


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
    process_group: ProcessGroup | None = None,
    bins: Pair = (1, 1),
    second_moment: bool = True,
) -> ActivationMoments:
    """Batch norm (Ioffe & Szegedy 2015, arXiv 1502.03167), activation and pooled moments of a pre-activation.

        y = downsample(activation(batch_norm(z) + residual))

    A loss that looks at the activation through ``m1`` and ``m2`` alone has a closed backward pass: one reading of
    ``z``, no gradient of ``y`` in memory. A gradient of ``y`` itself is added where there is one.

    Args:
        z: pre-activation ``[N, C, H, W]``; never modified.
        running_mean, running_var: ``[C]``, updated in place when ``training`` (unbiased variance, as
            :func:`torch.nn.functional.batch_norm`), used instead of the batch statistics when not.
        weight, bias: scale and shift ``[C]``; 1 and 0 where None.
        training: normalise with the statistics of the batch.
        momentum: share of the batch statistics in the running ones, 0 to 1.
        eps: added to the variance.
        activation: ``'relu'``, ``'leaky_relu'``, ``'prelu'`` (He et al. 2015, arXiv 1502.01852), ``'rrelu'`` (a random
            slope for each element: Xu et al. 2015, arXiv 1505.00853), ``'relu6'``, ``'identity'``, ``'tanh'``,
            ``'sigmoid'``, ``'silu'``, ``'gelu'``, ``'gelu_tanh'`` or ``'hardswish'``.
        negative_slope: slope of ``'leaky_relu'`` below zero; the least one of ``'rrelu'``.
        upper_slope: the largest slope of ``'rrelu'``.
        slope: of ``'prelu'``, ``[C]`` or ``[1]``, learned.
        seed: of ``'rrelu'``, one int64 on the device of ``z``: equal seeds give equal slopes. None: drawn from
            PyTorch's generator.
        residual: added before the activation, of the dtype of ``z`` and its shape, with ``'stride'`` that of what is
            kept of it.
        downsample: ``(mode, factor)``, the factor an int or ``(h, w)``: what becomes of each window of the activation.
            ``'max'`` and ``'avg'`` are :func:`torch.nn.functional.max_pool2d` and ``avg_pool2d`` with
            ``kernel_size=stride=factor`` (rows and columns that fill no window are left out, but with ``ceil_mode``);
            ``'stride'`` keeps its first element, the others are then not part of the batch norm either;
            ``'space_to_depth'`` moves it to the channels as ``pixel_unshuffle`` does, and the factor must divide the
            size. Only the reduced map is written, and the moments are its own.
        ceil_mode: whether windows that the edge cuts off count.
        process_group: with ``training``, the processes whose batches are normalised together, as
            :class:`torch.nn.SyncBatchNorm` does; None: this one alone.
        bins: cells of the moments, ``(bins_h, bins_w)`` or one int for both; those of ``adaptive_avg_pool2d``.
        second_moment: whether ``m2`` is wanted. A loss of ``m1`` alone saves its time and half of the sums' memory.

    Returns:
        :class:`ActivationMoments` ``(y, m1, m2)``.

    Raises:
        ValueError: one value per channel in training, momentum outside [0, 1], statistics missing.
        RuntimeError: wrong shape, dtype, device, bins, eps or activation.
    """
    _check_rank("z", z)
    _check_statistics(running_mean, running_var, training, momentum)
    mode, window = _downsampling(downsample)
    if mode == "stride":
        z = z[..., :: window[0], :: window[1]]
    replicas = _replicas_of(process_group) if training else None
    if training and replicas is None:
        _check_more_than_one_value(z.shape)
    form = _make_form(
        z.device, z.dtype, eps, activation, negative_slope, upper_slope, _one_per_channel(slope, z.size(1)), seed,
        residual, mode, window, ceil_mode, _pair("bins", bins),
    )  # fmt: skip
    mean, var = (None, None) if training else (running_mean, running_var)
    arguments = (z, weight, bias, mean, var, *form, second_moment, True)
    if replicas is not None:
        y, m1, m2, _, mean_z, var_z = _replicas.bn_act_moments(replicas, *arguments)
    else:
        y, m1, m2, _, mean_z, var_z = _lib.bn_act_moments(*arguments)
    if replicas is not None and running_mean is not None:
        replicas.update_running_statistics(running_mean, cast(Tensor, running_var), mean_z, var_z, None, momentum)
    elif training and running_mean is not None:
        count = z.numel() // z.size(1)
        _lib.update_running_statistics_(running_mean, running_var, mean_z, var_z, None, count, momentum)
    return ActivationMoments(y, m1, m2 if second_moment else cast(Tensor, None))


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
    process_group: ProcessGroup | None = None,
    bins: Pair = (1, 1),
    second_moment: bool = True,
    detached_downsample: Downsample = None,
) -> ActivationMoments:
    """Convolution followed by :func:`bn_act_moments`, as one autograd node.

    The pre-activation belongs to the node: its memory becomes that of its gradient where nothing else can read it. No
    gradient of ``input`` is computed when ``input`` does not require one. Under autocast the convolution and the maps
    have the autocast dtype, the rest is float32.

    Args:
        input: ``[N, C_in, H_in, W_in]``.
        conv_weight: ``[C_out, C_in / groups, kH, kW]``.
        conv_bias: ``[C_out]`` or None. Batch statistics cancel it; it only moves ``running_mean``.
        stride, padding, dilation, groups: as :func:`torch.nn.functional.conv2d`.
        running_mean, running_var, weight, bias, training, momentum, eps, activation, negative_slope, upper_slope,
            slope, seed, residual, ceil_mode, process_group, bins, second_moment: as :func:`bn_act_moments`; the
            residual has the shape of the convolution's output.
        downsample: as :func:`bn_act_moments`; ``'stride'`` multiplies the stride of the convolution.
        detached_downsample: ``(mode, factor)`` as ``downsample``, for a network whose stages are trained alone and pool
            between one stage's loss and the next stage: ``y`` is reduced and has no graph, and the moments are those of
            the activation before that, which is never written.

    Returns:
        :class:`ActivationMoments` ``(y, m1, m2)``.

    Raises:
        ValueError: one value per channel in training, momentum outside [0, 1], statistics missing;
            ``detached_downsample`` beside ``downsample`` or with the random slopes of ``'rrelu'``.
        TypeError: ``conv_weight`` and ``input`` differ in dtype outside autocast; ``process_group`` is none.
        RuntimeError: wrong shape, dtype, device, bins, eps or activation.
    """
    if detached_downsample is not None and (downsample is not None or activation == "rrelu"):
        raise ValueError(
            f"detached_downsample={detached_downsample!r} goes with neither downsample ({downsample!r}) nor 'rrelu' "
            f"({activation!r})"
        )
    _downsampling(detached_downsample)
    return _conv_bn_act_moments(
        input, conv_weight, conv_bias, running_mean, running_var, weight, bias,
        _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups, training, momentum,
        eps, activation, negative_slope, upper_slope, slope, seed, residual, downsample, ceil_mode, process_group,
        _pair("bins", bins), second_moment, detached_downsample,
    )  # fmt: skip


def conv_bn_act(
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
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """:func:`conv_bn_act_moments` without the moments: the activation ``y`` alone, ``[N, C_out, H, W]``."""
    return _conv_bn_act_moments(
        input, conv_weight, conv_bias, running_mean, running_var, weight, bias,
        _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups, training, momentum,
        eps, activation, negative_slope, upper_slope, slope, seed, residual, downsample, ceil_mode, process_group,
        [], False, None,
    ).y  # fmt: skip


def downsample(x: Tensor, mode: str, factor: Pair, ceil_mode: bool = False) -> Tensor:
    """What becomes of each window of a map; the operators above do it without writing the map first.

    Args:
        x: ``[N, C, H, W]``, any dtype that PyTorch pools.
        mode: ``'max'``, ``'avg'``, ``'stride'`` (the first element) or ``'space_to_depth'`` (all of them, as channels,
            in the order of ``pixel_unshuffle``).
        factor: size and stride of the windows, an int or ``(h, w)``.
        ceil_mode: of ``'max'`` and ``'avg'``: whether windows that the edge cuts off count.

    Returns:
        ``[N, C, H / h, W / w]``, rounded down, with ``ceil_mode`` and for ``'stride'`` up; for ``'space_to_depth'``
        ``[N, C * h * w, H / h, W / w]``.

    Raises:
        ValueError: unknown mode, a factor below 1, a size that space_to_depth's factor does not divide.
        RuntimeError: what PyTorch's pooling rejects.
    """
    _check_rank("x", x)
    mode, (h, w) = _downsampling((mode, factor))
    if mode == "max":
        return F.max_pool2d(x, (h, w), ceil_mode=ceil_mode)
    if mode == "avg":
        return F.avg_pool2d(x, (h, w), ceil_mode=ceil_mode)
    if mode == "stride":
        return x[..., ::h, ::w]
    n, c, height, width = x.shape
    if height % h or width % w:
        raise ValueError(f"space_to_depth needs a map whose size is a multiple of ({h}, {w}), got {list(x.shape)}")
    windows = x.reshape(n, c, height // h, h, width // w, w)
    y = windows.permute(0, 1, 3, 5, 2, 4).reshape(n, c * h * w, height // h, width // w)
    return y.contiguous(memory_format=torch.channels_last) if _is_channels_last(x) else y


def depth_to_space(y: Tensor, factor: Pair) -> Tensor:
    """The inverse of :func:`downsample` in the mode ``'space_to_depth'``.

    Args:
        y: ``[N, C * h * w, H, W]``.
        factor: size of the windows, an int or ``(h, w)``.

    Returns:
        ``[N, C, H * h, W * w]``.

    Raises:
        ValueError: a factor below 1, or channels that are not a multiple of ``h * w``.
    """
    _check_rank("y", y)
    _, (h, w) = _downsampling(("space_to_depth", factor))
    n, channels, height, width = y.shape
    if channels % (h * w):
        raise ValueError(f"y must have a multiple of {h * w} channels for the factor ({h}, {w}), got {list(y.shape)}")
    windows = y.reshape(n, channels // (h * w), h, w, height, width)
    x = windows.permute(0, 1, 4, 2, 5, 3).reshape(n, channels // (h * w), height * h, width * w)
    return x.contiguous(memory_format=torch.channels_last) if _is_channels_last(y) else x


def pooled_linear_cross_entropy(
    m1: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    size: Sequence[int],
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Average pooling, a linear classifier and cross-entropy of it, from the first moments, as one autograd node.

    ``linear(flatten(adaptive_avg_pool2d(y, bins)), weight, bias)`` and ``cross_entropy`` of that, for the ``m1`` of
    ``y``: the local loss 'pred' of Nokland & Eidnes 2019, arXiv 1901.06656. On CUDA it takes three launches, backward
    included, made for few classes (up to about 64).

    Args:
        m1: sums of the map over its cells ``[N, C, bins_h, bins_w]``, float32 or float64.
        weight: ``[num_classes, C * bins_h * bins_w]``, features in (c, bin_h, bin_w) order, in the dtype of ``m1``.
        bias: ``[num_classes]`` or None.
        target: ``[N]``, int64 in ``[0, num_classes)``, or -100 for a sample that the loss leaves out.
        size: ``(H, W)`` of the map.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.

    Returns:
        ``(loss, logits)``: the mean loss, a scalar, and ``[N, num_classes]``; both differentiable, once.

    Raises:
        RuntimeError: wrong shape, dtype, device, size or label_smoothing, a target out of range (on CUDA a device-side
            assertion).
    """
    loss, logits, _ = _lib.pooled_linear_cross_entropy(m1, weight, bias, target, list(size), label_smoothing)
    return loss, logits


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _conv_bn_act_moments(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    upper_slope: float,
    slope: Tensor | None,
    seed: Tensor | None,
    residual: Tensor | None,
    downsample: Downsample,
    ceil_mode: bool,
    process_group: ProcessGroup | None,
    bins: list[int],
    second_moment: bool,
    detached_downsample: Downsample,
) -> ActivationMoments:
    _check_rank("input", input)
    _check_rank("conv_weight", conv_weight)
    _check_statistics(running_mean, running_var, training, momentum)
    mode, window = _downsampling(downsample)
    if mode == "stride":
        stride = [s * w for s, w in zip(stride, window, strict=True)]
    replicas = _replicas_of(process_group) if training else None
    if training and replicas is None and input.size(0) == 1:
        _check_more_than_one_value(
            [1, conv_weight.size(0), *_conv_size(input.shape, conv_weight, stride, padding, dilation)]
        )
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(device))
    elif conv_weight.dtype != input.dtype:
        raise TypeError(f"conv_weight must have the dtype of input, {input.dtype}, got {conv_weight.dtype}")
    form = _make_form(
        input.device, input.dtype, eps, activation, negative_slope, upper_slope,
        _one_per_channel(slope, conv_weight.size(0)), seed, residual, mode, window, ceil_mode, bins,
    )  # fmt: skip
    convolution = (stride, padding, dilation, groups)
    tensors = (input, conv_weight, conv_bias, weight, bias)
    if not (training or bins or _needs_gradient(*tensors, slope, residual)):
        y = _lib.conv_bn_act_inference(*tensors, running_mean, running_var, *convolution, *form)
        return ActivationMoments(y, cast(Tensor, None), cast(Tensor, None))
    mean, var = (None, None) if training else (running_mean, running_var)
    arguments = (*tensors, mean, var, *convolution, *form, second_moment, detached_downsample is None)
    if replicas is not None:
        y, m1, m2, _, mean_z, var_z, z = _replicas.conv_bn_act_moments(replicas, *arguments)
    else:
        y, m1, m2, _, mean_z, var_z, z = _lib.conv_bn_act_moments(*arguments)
    if detached_downsample is not None:  # may raise an error: before anything is changed
        y = _downsampled_activation(z, mean_z, var_z, weight, bias, form, detached_downsample)
    if replicas is not None and running_mean is not None:
        replicas.update_running_statistics(running_mean, cast(Tensor, running_var), mean_z, var_z, conv_bias, momentum)
    elif training and running_mean is not None:
        count = z.numel() // z.size(1)
        _lib.update_running_statistics_(running_mean, running_var, mean_z, var_z, conv_bias, count, momentum)
    return ActivationMoments(y, m1, m2 if second_moment else cast(Tensor, None))


def _downsampled_activation(
    z: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form, downsample: Downsample
) -> Tensor:
    mode, window = _downsampling(downsample)
    residual = form.residual
    if mode == "stride":
        z = z[..., :: window[0], :: window[1]]
        residual = None if residual is None else residual[..., :: window[0], :: window[1]]
        mode, window = "none", []
    form = form._replace(residual=residual, downsample=mode, window=window, bins=[])
    with torch.no_grad():
        y: Tensor = _lib.bn_act_moments(z, weight, bias, mean, var, *form, False, True)[0]
    return y
