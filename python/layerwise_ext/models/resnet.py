"""Residual networks (He et al. 2016, arXiv 1512.03385)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from layerwise_ext.models import build
from layerwise_ext.models.schedule import Schedule, positions
from layerwise_ext.models.staged import StagedModel
from layerwise_ext.models.vgg import plain
from layerwise_ext.nn import ConvBNReLU2d, Residual

# Kind of block, blocks of each group, width of the first group.
RESNET_CONFIGS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "resnet18": ("basic", (2, 2, 2, 2), 64),
    "resnet34": ("basic", (3, 4, 6, 3), 64),
    "resnet50": ("bottleneck", (3, 4, 6, 3), 64),
    "resnet101": ("bottleneck", (3, 4, 23, 3), 64),
    "resnet152": ("bottleneck", (3, 8, 36, 3), 64),
    # For CIFAR: 6n + 2 layers, three groups of n blocks.
    "resnet20": ("basic", (3, 3, 3), 16),
    "resnet32": ("basic", (5, 5, 5), 16),
    "resnet56": ("basic", (9, 9, 9), 16),
    "resnet110": ("basic", (18, 18, 18), 16),
}
STEMS = ("cifar", "imagenet")
BLOCKS = ("basic", "bottleneck")
_EXPANSION = {"basic": 1, "bottleneck": 4}


def resnet(
    config: str | Sequence[int] = "resnet18",
    *,
    block: str | None = None,
    width: int | None = None,
    stem: str = "cifar",
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: tuple[int, int] = (32, 32),
    width_multiplier: float = 1.0,
    downsampling: Schedule = "standard",
    bins: int | tuple[int, int] | None = None,
    dim: int = 1024,
    fused: bool = True,
    head: str = "pooled_linear",
    head_depth: int = 2,
    beta: float = 0.99,
    label_smoothing: float = 0.0,
    image_mean: float | Sequence[float] = 0.0,
    image_std: float | Sequence[float] = 1.0,
    activation: str = "relu",
    dropout: float = 0.0,
    seed: int | None = None,
) -> StagedModel:
    """A residual network: a stage for the stem and one for each block; :func:`~layerwise_ext.models.split` joins them.

    Convolutions have no bias. Where a block changes the number of channels or the resolution, its shortcut is a 1x1
    convolution with batch norm (the paper's option B, for the networks of CIFAR, too). The last head classifies the
    mean over the map, and is the output. Classifiers start from zero weights, convolutions from He's normal
    distribution (fan out).

    Args:
        config: ``'resnet18'``, ``'resnet34'``, ``'resnet50'``, ``'resnet101'``, ``'resnet152'``, or for CIFAR
            ``'resnet20'``, ``'resnet32'``, ``'resnet56'``, ``'resnet110'``; or the blocks of each group, such as
            ``(1, 2, 8, 5)``, each group twice as wide as the one before.
        block: ``'basic'`` (two 3x3 convolutions) or ``'bottleneck'`` (1x1, 3x3, 1x1 with four times the channels; the
            stride is in the 3x3 one); None: that of the config, ``'basic'`` for a list.
        width: channels of the first group, before a bottleneck's factor of four; None: that of the config, 64 for a
            list.
        stem: ``'cifar'``, one 3x3 convolution, or ``'imagenet'``, 7x7 with stride 2 and a 3x3 max-pool with stride 2.
        in_channels, num_classes, image_size: of the data; ``image_size`` is ``(H, W)``.
        width_multiplier: scales every layer's channels (rounded, at least 1).
        downsampling: where the resolution halves: ``'standard'``, in the first block of each group but the first;
            ``'accelerated'``, each time one group earlier, so that for CIFAR the stem has stride 2 and the last group
            keeps the resolution of the one before; or the units, from 0 (the stem), that work at half the resolution of
            the one before (:mod:`layerwise_ext.models.schedule`). ResNet-18 has ``[3, 5, 7]``, accelerated
            ``[0, 3, 5]``. What the stem for ImageNet halves comes on top; accelerated, its first group is the next.
        bins, dim, fused, head, head_depth, beta, label_smoothing, image_mean, image_std, activation, dropout, seed: as
            of :func:`~layerwise_ext.models.vgg`; the output head has one cell where ``bins`` is None.

    Raises:
        ValueError: an unknown ``config``, ``block``, ``stem``, ``downsampling``, ``head`` or ``activation``;
            ``dropout`` outside [0, 1); an image too small.
    """
    kind, groups, base = _parse(config)
    kind = block or kind
    if kind not in BLOCKS:
        raise ValueError(f"block is {block!r}; allowed: {', '.join(map(repr, BLOCKS))}")
    if stem not in STEMS:
        raise ValueError(f"stem is {stem!r}; allowed: {', '.join(map(repr, STEMS))}")
    build.check_activation(activation)
    base = base if width is None else width
    if base < 1:
        raise ValueError(f"width is {width}; it must be at least 1")
    firsts = [1 + sum(groups[:i]) for i in range(len(groups))]  # the first block of each group; 0 is the stem
    accelerated = [0 if stem == "cifar" else 1, *firsts[1:-1]][: len(groups) - 1]
    halved = positions(downsampling, firsts[1:], accelerated, 1 + sum(groups))
    if stem == "imagenet" and 0 in halved:
        raise ValueError("downsampling holds 0, but the stem for ImageNet halves the resolution twice already")

    units = [
        build.Unit(_Stem(build.channels(base, width_multiplier), stem, 2 if 0 in halved else 1, activation, fused))
    ]
    for group, count in enumerate(groups):
        inner = build.channels(base * 2**group, width_multiplier)
        for i in range(count):
            stride = 2 if firsts[group] + i in halved else 1
            units.append(build.Unit(_Block(kind, inner, stride, activation, fused)))
    return build.staged(
        units,
        build.Heads(
            head, head_depth, num_classes, bins, dim, beta, label_smoothing, in_channels, image_mean, image_std
        ),
        in_channels=in_channels,
        image_size=image_size,
        pooled_output=True,
        dropout=dropout,
        seed=seed,
        downsampling=halved,
    )


class PlainResidual(nn.Module):
    """:class:`~layerwise_ext.nn.Residual` of plain modules, under the same names."""

    def __init__(self, block: Residual) -> None:
        super().__init__()
        self.body = nn.Sequential(*(plain(cast(ConvBNReLU2d, layer)) for layer in block.body))
        self.shortcut = None if block.shortcut is None else plain(cast(ConvBNReLU2d, block.shortcut))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        *first, last = self.body
        for layer in first:
            x = layer(x)
        conv, bn, act = cast(nn.Sequential, last)
        return cast(Tensor, act(bn(conv(x)) + shortcut))


class _Stem:
    def __init__(self, channels: int, stem: str, stride: int, activation: str, fused: bool) -> None:
        self.channels = channels
        self.stem = stem
        self.stride = stride
        self.activation = activation
        self.fused = fused

    def __call__(self, shape: torch.Size) -> nn.Module:
        kernel_size, stride = (3, self.stride) if self.stem == "cifar" else (7, 2)
        layer = _layer(shape[1], self.channels, kernel_size, stride, self.activation)
        body = layer if self.fused else plain(layer)
        if self.stem == "cifar":
            return body
        return nn.Sequential(OrderedDict(block=body, pool=nn.MaxPool2d(3, 2, 1)))


class _Block:
    def __init__(self, kind: str, inner: int, stride: int, activation: str, fused: bool) -> None:
        self.kind = kind
        self.inner = inner
        self.stride = stride
        self.activation = activation
        self.fused = fused

    def __call__(self, shape: torch.Size) -> nn.Module:
        in_channels, inner, activation = shape[1], self.inner, self.activation
        out_channels = inner * _EXPANSION[self.kind]
        if self.kind == "basic":
            layers = [
                _layer(in_channels, inner, 3, self.stride, activation),
                _layer(inner, out_channels, 3, 1, activation),
            ]
        else:
            layers = [
                _layer(in_channels, inner, 1, 1, activation),
                _layer(inner, inner, 3, self.stride, activation),
                _layer(inner, out_channels, 1, 1, activation),
            ]
        shortcut = None
        if self.stride != 1 or in_channels != out_channels:
            shortcut = _layer(in_channels, out_channels, 1, self.stride, "identity")
        block = Residual(*layers, shortcut=shortcut)
        return block if self.fused else PlainResidual(block)


def _layer(in_channels: int, out_channels: int, kernel_size: int, stride: int, activation: str) -> ConvBNReLU2d:
    layer = ConvBNReLU2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, activation=activation
    )
    nn.init.kaiming_normal_(layer.conv.weight, mode="fan_out", nonlinearity="relu")
    return layer


def _parse(config: str | Sequence[int]) -> tuple[str, tuple[int, ...], int]:
    if isinstance(config, str):
        if config not in RESNET_CONFIGS:
            raise ValueError(f"config is {config!r}; allowed: {', '.join(map(repr, RESNET_CONFIGS))}, or a list")
        return RESNET_CONFIGS[config]
    groups = tuple(config)
    if not groups or not all(isinstance(count, int) and count > 0 for count in groups):
        raise ValueError(f"config is {list(groups)}; allowed: positive numbers of blocks, one for each group")
    return "basic", groups, 64
