"""Local heads: the loss of one stage, a function of the pooled moments of its output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise_ext import functional
from layerwise_ext.nn.moments import PooledMoments

# The fused CUDA kernel is made for few classes; with more of them a library multiplies the matrices.
_FUSED_CLASSES = 64


class HeadOutput(NamedTuple):
    """``logits [N, num_classes]`` (None of a head without a classifier) and the scalar ``loss`` (None without a
    target)."""

    logits: Tensor | None
    loss: Tensor | None


class LocalHead(nn.Module, ABC):
    """Base class: its ``forward`` maps :class:`PooledMoments` and a target to :class:`HeadOutput`.

    Attributes:
        bins: ``(bh, bw)``, the grid of cells over which the stage pools its output for this head.
        second_moment: whether the head looks at ``m2`` and what comes from it; without it a stage saves that work.
        needs_map: whether the head looks at ``y`` itself. The backward pass is then the general one, with a gradient
            of ``y`` in memory.
        needs_image: whether the head looks at the network's image.
    """

    bins: tuple[int, int]
    second_moment = True
    needs_map = False
    needs_image = False

    @abstractmethod
    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        """Logits, and with a target the loss."""


class ClassifierHead(LocalHead):
    """A head that classifies as a part of a plain network could; the output of a network needs one."""

    @abstractmethod
    def to_modules(self) -> nn.Sequential:
        """The classifier as plain modules that share their parameters with this head: a map to logits."""


class FunctionHead(LocalHead):
    """Any differentiable function of the moments as a local loss.

    The stage's backward pass is the fused one whatever the function is: autograd goes through the function, on tensors
    of ``[N, C, bh, bw]``, and the operator does the rest.

        def sparsity(moments, target):  # mean |y| / rms(y) of each channel, small where few elements are active
            return (moments.mean / (moments.second_moment + 1e-6).sqrt()).mean()

        stage = LocalStage(body, FunctionHead(sparsity, bins=(1, 1)))

    Args:
        function: ``function(moments, target)`` gives the loss, a scalar; ``moments`` is a :class:`PooledMoments` in
            float32 (float64 for float64 maps). It runs outside of autocast. An ``nn.Module`` is trained with the head.
            A copied or pickled head has it by reference, as Python functions are, so lambdas cannot be pickled.
        bins: grid of cells, an int or ``(bh, bw)``.
        second_moment: False where the function does not look at ``m2``, which saves its computation.

    There are no logits; a head of yours that has some, or looks at ``y``, is a subclass of :class:`LocalHead`.
    """

    def __init__(
        self,
        function: Callable[[PooledMoments, Tensor], Tensor],
        bins: int | tuple[int, int] = (1, 1),
        *,
        second_moment: bool = True,
    ) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"function is {type(function).__name__}; a function of (moments, target) is needed")
        self.function = function
        self.bins = grid(bins)
        self.second_moment = second_moment

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        if target is None:
            return HeadOutput(None, None)
        with torch.autocast(moments.device.type, enabled=False):
            return HeadOutput(None, self.function(moments, target))

    def extra_repr(self) -> str:
        name = "" if isinstance(self.function, nn.Module) else f"{getattr(self.function, '__name__', 'function')}, "
        return f"{name}bins={self.bins}, second_moment={self.second_moment}"


class PooledLinearHead(ClassifierHead):
    """Average pooling, a linear classifier and cross-entropy: 'pred' of Nokland & Eidnes 2019, arXiv 1901.06656.

    The features are in (c, bh, bw) order, as ``adaptive_avg_pool2d(y, bins).flatten(1)`` gives them, so ``linear`` may
    be exchanged with the classifier of a plain network. Only the first moments are used. The head computes in its
    parameters' dtype, under autocast too: its input is a small float32 tensor and there is nothing to gain from
    rounding it.

    Args:
        in_channels: channels of the stage's output.
        num_classes: number of classes.
        bins: grid of cells, an int or ``(bh, bw)``.
        bias: whether the classifier has a bias.
        zero_init: start from zero weights, as the paper does, instead of nn.Linear's initialisation.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.

    Shapes:
        moments of ``[N, in_channels, H, W]`` with H >= bh, W >= bw; target ``[N]``, int64 in ``[0, num_classes)``, or
        -100 for a sample that the loss leaves out, as in ``cross_entropy``.

    Raises:
        ValueError: moments of another shape, a target of another shape or (on the CPU; a device-side assertion on CUDA,
            where a check would wait for the device at each step) out of range.
        TypeError: a target that is not int64.
    """

    second_moment = False

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        bins: int | tuple[int, int] = (4, 4),
        bias: bool = True,
        *,
        zero_init: bool = False,
        label_smoothing: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        rows, columns = grid(bins)
        if min(in_channels, num_classes) < 1:
            raise ValueError(f"in_channels and num_classes are {in_channels}, {num_classes}; both must be at least 1")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.bins = (rows, columns)
        self.label_smoothing = check_label_smoothing(label_smoothing)
        self.linear = nn.Linear(in_channels * rows * columns, num_classes, bias, device=device, dtype=dtype)
        if zero_init:
            zero_(self.linear)

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        check_features(moments, self.in_channels, self.bins)
        weight, bias = self.linear.weight, self.linear.bias
        sums, size = moments.sums()
        if target is not None:
            check_target(target, sums)
            if sums.dtype == weight.dtype and (self.num_classes <= _FUSED_CLASSES or not weight.is_cuda):
                loss, logits = _fused(sums, weight, bias, target, size, self.label_smoothing)
                return HeadOutput(logits, loss)
        with torch.autocast(weight.device.type, enabled=False):
            logits = moments.mean_linear(weight, bias)
            if target is None:
                return HeadOutput(logits, None)
            return HeadOutput(logits, cross_entropy(logits, target, self.label_smoothing))

    def to_modules(self) -> nn.Sequential:
        """The same classifier for a plain network: adaptive average pooling, flatten, this head's own ``linear``."""
        return nn.Sequential(AveragePool(self.bins), nn.Flatten(), self.linear)

    def extra_repr(self) -> str:
        smoothing = f", label_smoothing={self.label_smoothing}" if self.label_smoothing else ""
        return f"{self.in_channels}, {self.num_classes}, bins={self.bins}{smoothing}"


class ModuleHead(ClassifierHead):
    """Any modules that classify a map, with cross-entropy; the stage's backward pass is then the general one.

    Args:
        module: maps ``[N, C, H, W]`` to logits ``[N, num_classes]``; the child ``module``.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.

    Shapes:
        moments of the map that ``module`` takes; target ``[N]``, int64, -100 for a sample that the loss leaves out.

    Raises:
        ValueError: a module that gives other than ``[N, num_classes]``, a target out of range.
        TypeError: a target that is not int64.
    """

    bins = (1, 1)
    second_moment = False
    needs_map = True

    def __init__(self, module: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.module = module
        self.label_smoothing = check_label_smoothing(label_smoothing)

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        logits = self.module(moments.y)
        if logits.dim() != 2 or logits.shape[0] != moments.y.shape[0]:
            raise ValueError(
                f"the head's module gives {list(logits.shape)} of a map {list(moments.y.shape)}; logits need "
                f"[{moments.y.shape[0]}, num_classes]"
            )
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if target is None:
                return HeadOutput(logits, None)
            check_target(target, logits)
            return HeadOutput(logits, cross_entropy(logits, target, self.label_smoothing))

    def to_modules(self) -> nn.Sequential:
        return self.module if isinstance(self.module, nn.Sequential) else nn.Sequential(self.module)


class AveragePool(nn.AdaptiveAvgPool2d):
    """Of a classifier as plain modules; vectors ``[N, C]`` are maps of one element, as they are to heads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, None, None] if x.dim() == 2 else x)


def zero_(linear: nn.Linear) -> nn.Linear:
    """So that all classes begin alike."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def check_label_smoothing(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"label_smoothing is {value}; allowed: 0 to 1")
    return value


def grid(bins: int | tuple[int, int]) -> tuple[int, int]:
    rows, columns = (bins, bins) if isinstance(bins, int) else bins
    if min(rows, columns) < 1:
        raise ValueError(f"bins is {(rows, columns)}; both must be at least 1")
    return rows, columns


def check_features(moments: PooledMoments, channels: int, bins: tuple[int, int]) -> None:
    """
    Raises:
        ValueError: moments of another number of channels or cells.
    """
    features = [moments.channels, *moments.bins]
    if features != [channels, *bins]:
        raise ValueError(
            f"the head was built for pooled features {[channels, *bins]} (channels, cells) but the stage gives "
            f"{features}"
        )


def check_target(target: Tensor, sums: Tensor) -> None:
    if target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}; class indices must be torch.int64")
    if target.shape != sums.shape[:1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; allowed: ({sums.shape[0]},), one class index per sample"
        )


# The CPU's own range checks, turned into the error of a wrong argument, so that none has to be made here.


def _fused(sums: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, size: Any, smoothing: float) -> Any:
    try:
        return functional.pooled_linear_cross_entropy(sums, weight, bias, target, size=size, label_smoothing=smoothing)
    except RuntimeError as error:
        if "target is out of range" in str(error):
            raise ValueError(str(error).splitlines()[0]) from error
        raise


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    try:
        return F.cross_entropy(logits, target, label_smoothing=smoothing)
    except IndexError as error:
        raise ValueError(f"target is out of range: {error}; allowed: 0 to {logits.shape[1] - 1}") from error
