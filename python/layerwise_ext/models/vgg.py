"""VGG networks for layer-wise training (Nokland & Eidnes 2019, arXiv 1901.06656)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from layerwise_ext.models.staged import StagedModel
from layerwise_ext.nn import (
    ContrastiveHead,
    ConvBNReLU2d,
    LocalHead,
    LocalStage,
    PooledLinearHead,
    PredSimHead,
    SimilarityHead,
)

# Output channels of each 3x3 convolution; 'M' is a 2x2 max-pool.
VGG_CONFIGS: dict[str, tuple[int | str, ...]] = {
    "vgg8b": (128, 256, "M", 256, 512, "M", 512, "M", 512, "M"),
    "vgg11b": (128, 128, 128, 256, "M", 256, 512, "M", 512, 512, "M", 512, "M"),
}

VGG_HEADS = (
    "pooled_linear",
    "similarity",
    "similarity_projected",
    "predsim",
    "predsim_projected",
    "contrastive",
)

# Above this image size the first convolution is 7x7 with stride 2.
_LARGE_IMAGE = 64


def vgg(
    config: str | Sequence[int | str] = "vgg8b",
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: tuple[int, int] = (32, 32),
    width_multiplier: float = 1.0,
    hidden: int | None = 1024,
    bins: int | tuple[int, int] | None = None,
    dim: int = 1024,
    fused: bool = True,
    head: str = "pooled_linear",
    beta: float = 0.99,
    activation: str = "relu",
    seed: int | None = None,
) -> StagedModel:
    """A VGG network, one stage per convolution, then one fully connected stage, whose head is the output.

    All convolutions are 3x3 with bias and padding 1; the first is 7x7 with stride 2 for images above 64. A max-pool
    is the ``downsample`` of the stage before it, whose local loss sees the map before pooling. The fully connected
    layer is a convolution whose kernel covers the whole remaining map: the same function and the same number of
    parameters. Its local loss and the network's output are one and the same head. Classifiers start from zero weights.

    Args:
        config: ``'vgg8b'``, ``'vgg11b'``, or a list of output channels and ``'M'``, such as ``[32, 'M', 64]``.
        in_channels, num_classes, image_size: of the data; ``image_size`` is ``(H, W)``.
        width_multiplier: scales every layer's channels, the fully connected one's as well (rounded, at least 1).
        hidden: channels of the fully connected stage; None leaves it out, and the last convolution has the output head.
        bins: cells of the heads, an int or ``(bh, bw)``, clipped to the map of each stage. None: the finest grid that
            the paper's rule gives, halving rows and columns in turn until channels * cells <= ``dim``.
        dim: largest number of pooled features of a head when ``bins`` is None (the paper: 2048 for CIFAR, 1024 for
            MNIST).
        fused: False builds ``nn.Sequential(Conv2d, BatchNorm2d, activation)`` in place of each
            :class:`~layerwise_ext.nn.ConvBNReLU2d`, with the same names, parameters and initial values.
        head: the local loss of the stages. ``'pooled_linear'`` is the paper's pred, ``'similarity'`` its sim and
            ``'predsim'`` its predsim, both from the moments of each stage's own output, ``'similarity_projected'`` and
            ``'predsim_projected'`` the paper's form, on a 3x3 convolution of it; ``'contrastive'`` is supervised
            contrastive. With predsim the output is the classifier of the last stage's own predsim, whose cross-entropy
            is scaled by ``1 - beta`` as the paper's is; with losses that have no classifier the last stage is trained
            by cross-entropy. Joint training looks at the last head alone: leave it at ``'pooled_linear'`` there.
        beta: share of similarity matching in predsim.
        activation: ``'relu'``, the paper's choice for joint training and pred, or ``'leaky_relu'`` (slope 0.01), its
            choice for sim and predsim.
        seed: initialise from this seed, leaving torch's global generator untouched; None uses the global generator.

    Raises:
        ValueError: an unknown ``config``, ``head`` or ``activation``; an image too small for the pools.
    """
    layers = _layers(config)
    if head not in VGG_HEADS:
        raise ValueError(f"head is {head!r}; allowed: {', '.join(map(repr, VGG_HEADS))}")
    if activation not in ("relu", "leaky_relu"):
        raise ValueError(f"activation is {activation!r}; allowed: 'relu', 'leaky_relu'")
    if width_multiplier <= 0:
        raise ValueError(f"width_multiplier is {width_multiplier}; it must be positive")
    if hidden is None and layers[-1] == "M":
        raise ValueError("config ends in 'M' but hidden is None: no layer is left to read the last pool")
    _check_pools(layers, image_size)

    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # The CPU's generator only, which draws all initial values; torch.manual_seed would reseed CUDA as well.
            torch.default_generator.manual_seed(seed)
        stages: list[LocalStage] = []
        # A blank image goes through each new body: the heads are sized by the shapes that really come out.
        x = torch.zeros(1, in_channels, *image_size)
        convolutions = list(_convolutions(layers, image_size, hidden))
        pools = [pool for *_, pool in convolutions]
        for index, (width, kernel_size, pool) in enumerate(convolutions):
            channels = max(1, round(width * width_multiplier))
            body = _body(x.shape, channels, kernel_size, activation, fused)
            if index == 0 and pool:  # there is no stage before it
                body = nn.Sequential(OrderedDict(pool=nn.MaxPool2d(2), block=body))
            with torch.no_grad():
                x = body.eval()(x)
            body.train()
            size = (x.shape[2], x.shape[3])
            grid = _largest_grid(channels, size, dim) if bins is None else _clip(bins, size)
            is_output = index == len(convolutions) - 1
            downsample = ("max", 2) if not is_output and pools[index + 1] else None
            local_head = _head(head, channels, num_classes, grid, size, beta, is_output)
            stages.append(LocalStage(body, local_head, downsample=downsample))
            if stages[-1].downsample is not None:
                x = stages[-1].downsample(x)
    return StagedModel(stages)


def _convolutions(
    layers: tuple[int | str, ...], image_size: tuple[int, int], hidden: int | None
) -> Iterator[tuple[int, int | None, bool]]:
    """(channels, kernel size, whether a pool comes first) of each layer; None is a kernel that covers the map."""
    kernel_size = 7 if max(image_size) > _LARGE_IMAGE else 3
    pool = False
    for layer in layers:
        if isinstance(layer, str):
            pool = True
            continue
        yield layer, kernel_size, pool
        kernel_size, pool = 3, False
    if hidden is not None:
        yield hidden, None, pool


def _body(input_shape: torch.Size, channels: int, kernel_size: int | None, activation: str, fused: bool) -> nn.Module:
    """Convolution + batch norm + activation for an input [1, C, H, W]."""
    if kernel_size is None:
        geometry: tuple[tuple[int, int], int, int] = ((input_shape[2], input_shape[3]), 1, 0)
    else:
        geometry = ((kernel_size, kernel_size), 2 if kernel_size == 7 else 1, kernel_size // 2)
    layer = ConvBNReLU2d(input_shape[1], channels, *geometry, bias=True, activation=activation)
    if fused:
        return layer
    return nn.Sequential(OrderedDict(zip(("conv", "bn", "act"), layer.to_modules(), strict=True)))


def _head(
    name: str,
    channels: int,
    num_classes: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    beta: float,
    is_output: bool,
) -> LocalHead:
    """The head of a stage whose map has ``size``; that of the output is always a classifier."""
    kind, _, form = name.partition("_")
    # Of a map of one element a 3x3 kernel would see its middle only.
    projection: dict[str, Any] = {"project": form == "projected", "kernel_size": 1 if size == (1, 1) else 3}
    if kind == "predsim":
        return PredSimHead(channels, num_classes, grid, beta, zero_init=True, **projection)
    if kind == "similarity" and not is_output:
        return SimilarityHead(channels, num_classes, **projection)
    if kind == "contrastive" and not is_output:
        return ContrastiveHead(channels, grid)
    return PooledLinearHead(channels, num_classes, grid, zero_init=True)


def _layers(config: str | Sequence[int | str]) -> tuple[int | str, ...]:
    if isinstance(config, str):
        if config not in VGG_CONFIGS:
            raise ValueError(f"config is {config!r}; allowed: {', '.join(map(repr, VGG_CONFIGS))}, or a list")
        return VGG_CONFIGS[config]
    layers = tuple(config)
    for layer, previous in zip(layers, (None, *layers), strict=False):
        if layer != "M" and not (isinstance(layer, int) and layer > 0):
            raise ValueError(f"config holds {layer!r}; allowed: positive numbers of channels and 'M'")
        if layer == previous == "M":
            raise ValueError("config holds two pools in a row; put a layer between them")
    if not any(isinstance(layer, int) for layer in layers):
        raise ValueError(f"config is {list(layers)}; it needs at least one number of channels")
    return layers


def _check_pools(layers: tuple[int | str, ...], image_size: tuple[int, int]) -> None:
    size = min(image_size)
    if size < 1:
        raise ValueError(f"image_size is {image_size}; both must be at least 1")
    if max(image_size) > _LARGE_IMAGE:
        size = (size + 1) // 2
    pools = layers.count("M")
    if size < 2**pools:
        raise ValueError(
            f"image_size is {tuple(image_size)}, too small for {pools} 2x2 pools: the map before them is {size} wide "
            f"and must be at least {2**pools}; use fewer pools or larger images"
        )


def _largest_grid(channels: int, size: tuple[int, int], dim: int) -> tuple[int, int]:
    """The paper's rule: double the pooling kernel, rows then columns, until channels * cells <= dim."""
    height, width = size
    kernel_height = kernel_width = 1
    rows, columns = size
    while channels * rows * columns > dim and (rows > 1 or columns > 1):
        kernel_height *= 2
        rows = -(-height // kernel_height)
        if channels * rows * columns > dim:
            kernel_width *= 2
            columns = -(-width // kernel_width)
    return rows, columns


def _clip(bins: int | tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (bins, bins) if isinstance(bins, int) else bins
    return min(rows, size[0]), min(columns, size[1])
