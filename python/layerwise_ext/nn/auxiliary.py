"""Small networks as local heads: those of greedy and decoupled greedy learning."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from layerwise_ext.nn.conv import ConvBNReLU2d
from layerwise_ext.nn.heads import (
    AveragePool,
    ClassifierHead,
    HeadOutput,
    check_features,
    check_label_smoothing,
    check_target,
    cross_entropy,
    grid,
    zero_,
)
from layerwise_ext.nn.moments import PooledMoments


class ConvHead(ClassifierHead):
    """``depth - 1`` 3x3 convolutions, average pooling, batch norm and a linear layer, with cross-entropy.

    The auxiliary classifier of depth k of greedy training (Belilovsky et al. 2019, arXiv 1812.11446), and the 'cnn' of
    decoupled greedy learning (Belilovsky et al. 2020, arXiv 1901.08164). With ``depth=1`` it needs the pooled moments
    alone; deeper ones read the map, and their own last layer gives its moments from the fused operator.

    Args:
        in_channels: channels of the stage's output.
        num_classes: number of classes.
        depth: layers in all, the linear one included.
        channels: of the convolutions; None: as many as the stage has.
        bins: grid of cells in front of the linear layer, an int or ``(bh, bw)``; the papers' is 2.
        zero_init, label_smoothing: as of :class:`PooledLinearHead`.

    Shapes:
        moments of ``[N, in_channels, H, W]`` with H >= bh, W >= bw; target ``[N]``, int64, -100 for a sample that the
        loss leaves out.

    Raises:
        ValueError: moments or a target of another shape, or out of range; a ``depth`` below 1.
        TypeError: a target that is not int64.
    """

    second_moment = False

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        depth: int = 2,
        *,
        channels: int | None = None,
        bins: int | tuple[int, int] = (2, 2),
        zero_init: bool = False,
        label_smoothing: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth is {depth}; it must be at least 1")
        self.in_channels = in_channels
        self.cells = grid(bins)
        self.needs_map = depth > 1
        self.bins = (1, 1) if self.needs_map else self.cells
        self.label_smoothing = check_label_smoothing(label_smoothing)
        factory = {"device": device, "dtype": dtype}
        widths = [in_channels] + [in_channels if channels is None else channels] * (depth - 1)
        self.layers = nn.Sequential(
            *(ConvBNReLU2d(a, b, 3, padding=1, **factory) for a, b in itertools.pairwise(widths))
        )
        linear = nn.Linear(widths[-1] * self.cells[0] * self.cells[1], num_classes, **factory)
        if zero_init:
            zero_(linear)
        self.output = nn.Sequential(nn.BatchNorm2d(widths[-1], **factory), nn.Flatten(), linear)

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        check_features(moments, self.in_channels, self.bins)
        pooled = moments if not len(self.layers) else _pooled(self.layers, moments.y, self.cells)
        return classify(pooled.mean, self.output, target, self.label_smoothing)

    def to_modules(self) -> nn.Sequential:
        return nn.Sequential(*self.layers, AveragePool(self.cells), *self.output)


class MLPSRHead(ClassifierHead):
    """A small network on a map of a quarter of the resolution: 'MLP-SR' of Belilovsky et al. 2020, arXiv 1901.08164.

    Average pooling to a quarter of the height and width (rounded up), three 1x1 convolutions with batch norm and ReLU,
    average pooling to 2x2, three linear layers with batch norm and ReLU, a linear layer. It sees the stage's output
    through its first moments alone, so it costs the stage nothing but their sums.

    Args:
        in_channels: channels of the stage's output.
        num_classes: number of classes.
        map_size: ``(H, W)`` of the stage's output.
        hidden: units of the linear layers; None: four times ``in_channels``, as many as a 2x2 map has.
        zero_init, label_smoothing: as of :class:`PooledLinearHead`.

    Shapes:
        moments of ``[N, in_channels, H, W]``; target ``[N]``, int64, -100 for a sample that the loss leaves out.

    Raises:
        ValueError: moments or a target of another shape, or out of range; a ``map_size`` below 1.
        TypeError: a target that is not int64.
    """

    second_moment = False

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        map_size: tuple[int, int],
        *,
        hidden: int | None = None,
        zero_init: bool = False,
        label_smoothing: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if min(map_size) < 1:
            raise ValueError(f"map_size is {tuple(map_size)}; both must be at least 1")
        self.in_channels = in_channels
        self.bins = (-(-map_size[0] // 4), -(-map_size[1] // 4))
        self.label_smoothing = check_label_smoothing(label_smoothing)
        factory = {"device": device, "dtype": dtype}
        cells = (min(2, self.bins[0]), min(2, self.bins[1]))
        features = in_channels * cells[0] * cells[1]
        hidden = 4 * in_channels if hidden is None else hidden
        layers: list[nn.Module] = [ConvBNReLU2d(in_channels, in_channels, 1, **factory) for _ in range(3)]
        layers += [nn.AdaptiveAvgPool2d(cells), nn.Flatten()]
        for inputs in (features, hidden, hidden):
            layers += [nn.Linear(inputs, hidden, bias=False, **factory), nn.BatchNorm1d(hidden, **factory), nn.ReLU()]
        output = nn.Linear(hidden, num_classes, **factory)
        if zero_init:
            zero_(output)
        self.layers = nn.Sequential(*layers, output)

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        check_features(moments, self.in_channels, self.bins)
        return classify(moments.mean, self.layers, target, self.label_smoothing)

    def to_modules(self) -> nn.Sequential:
        return nn.Sequential(AveragePool(self.bins), *self.layers)


def _pooled(layers: nn.Sequential, x: Tensor, cells: tuple[int, int]) -> PooledMoments:
    """The moments of the last layer's output, which is written but not kept."""
    *first, last = layers
    for layer in first:
        x = layer(x)
    assert isinstance(last, ConvBNReLU2d)
    _, m1, _ = last.forward_moments(x, cells, second_moment=False)
    return PooledMoments(m1, None, last.map_size(x))


def classify(features: Tensor, network: nn.Module, target: Tensor | None, label_smoothing: float) -> HeadOutput:
    """Logits of ``network`` in its parameters' own dtype, and the loss."""
    dtype = next(network.parameters()).dtype
    with torch.autocast(features.device.type, enabled=False):
        logits = network(features.to(dtype))
        if target is None:
            return HeadOutput(logits, None)
        check_target(target, logits)
        return HeadOutput(logits, cross_entropy(logits, target, label_smoothing))
