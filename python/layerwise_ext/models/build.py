"""What the networks here share: stages of given bodies, with heads sized by the maps that really come out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerwise_ext.models.staged import StagedModel
from layerwise_ext.nn import (
    ContrastiveHead,
    ConvHead,
    GoodnessHead,
    InfoProHead,
    LocalHead,
    LocalStage,
    MLPSRHead,
    ModuleHead,
    PooledLinearHead,
    PredSimHead,
    ReconstructionHead,
    SimilarityHead,
    infopro_weights,
)
from layerwise_ext.nn.conv import ACTIVATIONS
from layerwise_ext.nn.heads import zero_

HEADS = (
    "pooled_linear",
    "similarity",
    "similarity_projected",
    "predsim",
    "predsim_projected",
    "contrastive",
    "conv",
    "mlp_sr",
    "auglocal",
    "goodness",
    "reconstruction",
    "infopro",
    "infopro_contrastive",
)
# They need more of a network than a map: its units, or a normalisation in front of each.
OF_NETWORKS = ("auglocal", "goodness")
# Whose classifier is that of the network's output, too, unless the map there is one element.
OF_OUTPUTS = ("conv", "mlp_sr")

# Units of the first stage's auxiliary network of 'auglocal', and by how much it is shorter at the last one.
AUGLOCAL_DEPTH, AUGLOCAL_DECAY = 3, 0.5


class Unit(NamedTuple):
    """The backbone's part of a stage: builds it for inputs of a shape ``[1, C, H, W]``; what reduces its output."""

    body: Callable[[torch.Size], nn.Module]
    downsample: tuple[str, int] | None = None


class Heads(NamedTuple):
    """The local losses of a network, see the arguments of :func:`~layerwise_ext.models.vgg` with these names."""

    head: str
    head_depth: int
    num_classes: int
    bins: int | tuple[int, int] | None
    dim: int
    beta: float
    label_smoothing: float
    image_channels: int
    image_mean: float | Sequence[float]
    image_std: float | Sequence[float]

    def check(self) -> None:
        """
        Raises:
            ValueError: an unknown head, a depth below 1, or label smoothing where there is no cross-entropy.
        """
        if self.head not in HEADS:
            raise ValueError(f"head is {self.head!r}; allowed: {', '.join(map(repr, HEADS))}")
        if self.head_depth < 1:
            raise ValueError(f"head_depth is {self.head_depth}; it must be at least 1")
        if self.head == "goodness" and self.label_smoothing:
            raise ValueError(f"label_smoothing is {self.label_smoothing} with head 'goodness'; allowed: 0")

    def build(self, channels: int, size: tuple[int, int], index: int, stages: int, *, pooled_output: bool) -> LocalHead:
        """The head of a stage, the index-th of so many, whose map has ``size``; that of the output, the last one, tells
        the classes apart whatever the others do."""
        is_output = index == stages - 1
        grid = _largest_grid(channels, size, self.dim) if self.bins is None else _clip(self.bins, size)
        if is_output and pooled_output and self.bins is None:
            grid = (1, 1)
        kind, _, form = self.head.partition("_")
        # Of a map of one element a 3x3 kernel would see its middle only.
        projection: dict[str, Any] = {"project": form == "projected", "kernel_size": 1 if size == (1, 1) else 3}
        classifier: dict[str, Any] = {"zero_init": True, "label_smoothing": self.label_smoothing}
        image: dict[str, Any] = {"image_channels": self.image_channels, "mean": self.image_mean, "std": self.image_std}
        if kind == "goodness":
            return GoodnessHead(num_classes=self.num_classes)
        if kind == "predsim":
            return PredSimHead(channels, self.num_classes, grid, self.beta, **classifier, **projection)
        if is_output and (self.head not in OF_OUTPUTS or size == (1, 1)):
            return PooledLinearHead(channels, self.num_classes, grid, **classifier)
        if kind == "similarity":
            return SimilarityHead(channels, self.num_classes, **projection)
        if kind == "contrastive":
            return ContrastiveHead(channels, grid)
        if self.head == "conv":
            return ConvHead(channels, self.num_classes, self.head_depth, bins=_clip(2, size), **classifier)
        if self.head == "mlp_sr":
            return MLPSRHead(channels, self.num_classes, size, **classifier)
        if kind == "reconstruction":
            return ReconstructionHead(channels, **image)
        if kind == "infopro":
            task = form or "softmax"
            weights = infopro_weights(stages - 1)[index]
            smoothing = self.label_smoothing if task == "softmax" else 0.0
            return InfoProHead(channels, self.num_classes, task, weights=weights, label_smoothing=smoothing, **image)
        return PooledLinearHead(channels, self.num_classes, grid, **classifier)


def staged(
    units: Sequence[Unit],
    heads: Heads,
    *,
    in_channels: int,
    image_size: tuple[int, int],
    pooled_output: bool,
    dropout: float,
    seed: int | None,
    downsampling: tuple[int, ...],
) -> StagedModel:
    """A stage for each unit; ``pooled_output``: the last head classifies the mean over the map, if ``bins`` is None;
    ``dropout``: behind all stages but the last.

    The initial values come from ``seed``, or from torch's global generator where it is None.

    Raises:
        ValueError: an image that is too small; ``dropout`` outside [0, 1).
    """
    heads.check()
    if min(image_size) < 1:
        raise ValueError(f"image_size is {tuple(image_size)}; both must be at least 1")
    if heads.head == "goodness" and in_channels * image_size[0] * image_size[1] < heads.num_classes:
        raise ValueError(
            f"num_classes is {heads.num_classes}, but images {[in_channels, *image_size]} have fewer elements for "
            "labels, which head 'goodness' writes into them"
        )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # The CPU's generator only, which draws all initial values; torch.manual_seed would reseed CUDA as well.
            torch.default_generator.manual_seed(seed)
        stages: list[LocalStage] = []
        inputs: list[torch.Size] = []
        outputs: list[torch.Size] = []
        # A blank image goes through each new body: the heads are sized by the shapes that really come out.
        x = torch.zeros(1, in_channels, *image_size)
        for index, unit in enumerate(units):
            body = unit.body(x.shape)
            if heads.head == "goodness":  # the length of its input would tell a stage how good that is
                norm = nn.RMSNorm(x.shape[1:], elementwise_affine=False)
                body = nn.Sequential(OrderedDict(norm=norm, block=body))
            inputs.append(x.shape)
            x = output_of(body, x)
            outputs.append(x.shape)
            size = (x.shape[2], x.shape[3])
            head = heads.build(x.shape[1], size, index, len(units), pooled_output=pooled_output)
            rate = dropout if unit is not units[-1] else 0.0
            stages.append(LocalStage(body, head, downsample=unit.downsample, dropout=rate))
            reduction = stages[-1].downsample
            if reduction is not None:
                if min(x.shape[2:]) < 2 or (reduction.mode == "space_to_depth" and (x.shape[2] % 2 or x.shape[3] % 2)):
                    raise ValueError(
                        f"image_size is {tuple(image_size)}: the map of unit {index} is {tuple(x.shape[2:])}, which "
                        f"downsampling by {unit.downsample} cannot reduce; use fewer positions or larger images"
                    )
                x = reduction(x)
        if heads.head == "auglocal":
            for index, stage in enumerate(stages[:-1]):
                stage.head = _of_later_units(units, inputs, outputs[index], index, heads)
    return StagedModel(stages, downsampling=downsampling)


def _of_later_units(
    units: Sequence[Unit], inputs: Sequence[torch.Size], shape: torch.Size, index: int, heads: Heads
) -> ModuleHead:
    """A small network like the rest of this one: evenly spaced later units, the last one among them.

    AugLocal (Ma et al. 2024, arXiv 2402.17318), whose auxiliary networks get shorter towards the output. A unit reads a
    map of the size that it reads in the network.
    """
    last = len(units) - 1
    share = index / max(1, last - 1)
    depth = min(max(1, round(AUGLOCAL_DEPTH * (1 - AUGLOCAL_DECAY * share))), last - index)
    modules: list[nn.Module] = []
    x = torch.zeros(shape)
    for step in range(1, depth + 1):
        chosen = index + round(step * (last - index) / depth)
        size = (min(x.shape[2], inputs[chosen][2]), min(x.shape[3], inputs[chosen][3]))
        if size != (x.shape[2], x.shape[3]):
            modules.append(nn.AdaptiveAvgPool2d(size))
            x = modules[-1](x)
        modules.append(units[chosen].body(x.shape))
        x = output_of(modules[-1], x)
    linear = zero_(nn.Linear(x.shape[1], heads.num_classes))
    row = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    return ModuleHead(row, label_smoothing=heads.label_smoothing)


def output_of(body: nn.Module, x: Tensor) -> Tensor:
    """In eval mode, which a blank image does not disturb; every module's own mode is put back."""
    with evaluating(body), torch.no_grad():
        y: Tensor = body(x)
    return y


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def channels(width: float, multiplier: float) -> int:
    """
    Raises:
        ValueError: a multiplier that is not positive.
    """
    if not multiplier > 0:
        raise ValueError(f"width_multiplier is {multiplier}; it must be positive")
    return max(1, round(width * multiplier))


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed: {', '.join(map(repr, ACTIVATIONS))}")


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
