"""What a network costs: the resolution of every layer, and the memory and operations of each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from layerwise_ext.models.build import evaluating
from layerwise_ext.models.staged import StagedModel
from layerwise_ext.nn import ConvBNReLU2d, LocalStage, PooledMoments

_COUNTED = (ConvBNReLU2d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class LayerCost:
    """One convolution or linear layer: its ``name`` in the model, ``shape (C, H, W)`` of what the convolution gives,
    number of ``parameters`` (batch norm's with it), multiply-adds of one sample's forward pass."""

    stage: int
    name: str
    kind: str
    shape: tuple[int, int, int]
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class StageCost:
    """One stage: ``input`` and ``output (C, H, W)``, parameters of body and head, and of one sample

    - ``elements``: of the outputs of its convolutions, which training keeps for the backward pass,
    - ``multiply_adds``: of the forward pass of the body,
    - ``head_multiply_adds``: of the local head, its loss included.
    """

    stage: int
    input: tuple[int, int, int]
    output: tuple[int, int, int]
    parameters: int
    head_parameters: int
    elements: int
    multiply_adds: int
    head_multiply_adds: int


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` found; ``str`` of it is a table."""

    layers: list[LayerCost]
    stages: list[StageCost]

    def memory_bytes(self, batch_size: int, dtype: torch.dtype = torch.float32) -> list[int]:
        """Of each stage: the outputs of its convolutions for a batch, at least what training keeps of it.

        Joint training keeps the sum over the stages at a time, local training the largest one.
        """
        return [stage.elements * batch_size * dtype.itemsize for stage in self.stages]

    def local_multiply_adds(self) -> list[int]:
        """Of each stage: what a training step on its own loss takes for one sample, head and backward pass included."""
        first = {layer.stage: layer.multiply_adds for layer in reversed(self.layers)}
        return [3 * (s.multiply_adds + s.head_multiply_adds) - first.get(s.stage, 0) for s in self.stages]

    def __str__(self) -> str:
        rows = [["layer", "kind", "output", "parameters", "MMAC"]]
        for stage in self.stages:
            for layer in self.layers:
                if layer.stage == stage.stage:
                    shape = "x".join(map(str, layer.shape))
                    cost = f"{layer.multiply_adds / 1e6:.2f}"
                    rows.append([layer.name, layer.kind, shape, f"{layer.parameters:,}", cost])
        lines = _table(rows, left=3)
        rows = [["stage", "input", "output", "parameters", "of the head", "MiB at batch 128", "MMAC", "of the head"]]
        total = [0, 0, 0.0, 0, 0]
        for stage, memory in zip(self.stages, self.memory_bytes(128), strict=True):
            numbers = [stage.parameters, stage.head_parameters, memory / 2**20, stage.multiply_adds,
                       stage.head_multiply_adds]  # fmt: skip
            total = [a + b for a, b in zip(total, numbers, strict=True)]
            shapes = ["x".join(map(str, shape)) for shape in (stage.input, stage.output)]
            rows.append([str(stage.stage), *shapes, *_numbers(numbers)])
        rows.append(["all", "", "", *_numbers(total)])
        return "\n".join([*lines, "", *_table(rows, left=3)])


def summary(model: StagedModel | Sequence[LocalStage], input_size: Sequence[int]) -> Summary:
    """Resolution, parameters, memory and operations of a network for inputs ``[N, *input_size]``.

    Nothing is computed: the model runs on tensors without data. Operations are counted by
    :class:`torch.utils.flop_counter.FlopCounterMode`, which knows this package's operators, as multiply-adds, of two
    floating-point operations each. A backward pass takes as many again for the gradient of the weights and as many for
    that of the input, which the first layer of a local stage does without.

    Args:
        model: the network, or its stages.
        input_size: ``(C, H, W)`` of an image, or ``(D,)`` of a vector.

    Raises:
        ValueError: ``input_size`` is neither three positive numbers nor one.
    """
    if len(input_size) not in (1, 3) or min(input_size) < 1:
        raise ValueError(f"input_size is {tuple(input_size)}; allowed: positive numbers, (C, H, W) or (D,)")
    layers: list[LayerCost] = []
    stages: list[StageCost] = []
    every = nn.ModuleList(model)
    parameter = next(every.parameters())
    with evaluating(every), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype)
        target = torch.zeros(1, dtype=torch.int64, device=parameter.device)
        x = image
        for index, stage in enumerate(model):
            y, found = costs(stage.body, x, f"stages.{index}.body")
            features = y if stage.downsample is None else stage.downsample(y)
            moments = PooledMoments.of(y, stage.head.bins, second_moment=stage.head.second_moment)
            moments.image = image
            with FlopCounterMode(display=False) as head:
                stage.head(moments, target)
            layers += [LayerCost(index, *cost) for cost in found]
            stages.append(
                StageCost(
                    index,
                    _size(x),
                    _size(features),
                    _parameters(stage.body),
                    _parameters(stage.head),
                    sum(math.prod(cost.shape) for cost in found),
                    sum(cost.multiply_adds for cost in found),
                    head.get_total_flops() // 2,
                )
            )
            x = features
    return Summary(layers, stages)


class Cost(NamedTuple):
    """The fields of :class:`LayerCost` but the stage."""

    name: str
    kind: str
    shape: tuple[int, int, int]
    parameters: int
    multiply_adds: int


def costs(module: nn.Module, x: Tensor, prefix: str) -> tuple[Tensor, list[Cost]]:
    """``module(x)`` for x ``[1, C, H, W]``, and what each convolution and linear layer took, in order of calls."""
    names = {m: ".".join(filter(None, (prefix, name))) for name, m in module.named_modules()}
    found: list[Cost] = []
    counters: list[FlopCounterMode] = []

    def before(layer: nn.Module, inputs: Any) -> None:
        counters.append(FlopCounterMode(display=False).__enter__())

    def after(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        counter = counters.pop()
        counter.__exit__(None, None, None)
        if isinstance(layer, ConvBNReLU2d):
            shape: tuple[int, int, int] = (layer.conv.out_channels, *layer.map_size(inputs[0]))
        else:
            shape = _size(output)
        kind = type(layer).__name__
        found.append(Cost(names[layer], kind, shape, _parameters(layer), counter.get_total_flops() // 2))

    hooks = []
    inside = {m for layer in names if isinstance(layer, ConvBNReLU2d) for m in layer.children()}
    for layer in names:
        if isinstance(layer, _COUNTED) and layer not in inside:
            hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        y: Tensor = module(x)
    finally:
        for hook in hooks:
            hook.remove()
    return y, found


def _size(x: Tensor) -> tuple[int, int, int]:
    _, *size = x.shape
    channels, height, width = [*size, 1, 1][:3]
    return channels, height, width


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _numbers(values: Sequence[float]) -> list[str]:
    parameters, head_parameters, memory, multiply_adds, head_multiply_adds = values
    return [f"{parameters:,}", f"{head_parameters:,}", f"{memory:.1f}", f"{multiply_adds / 1e6:.2f}",
            f"{head_multiply_adds / 1e6:.2f}"]  # fmt: skip


def _table(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Columns of equal width, the first ``left`` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
