"""The training step of one stage, by this package and by its peers: the same parameters, input and loss for all.

A stage is a 3x3 convolution without bias, batch norm, ReLU and a local classifier: adaptive average pooling to a grid
of cells, a linear layer, cross-entropy.  A step is forward, local loss, backward, and the gradients of all parameters.
The input is detached, as between the stages of a stage-local network, so no gradient for it is computed.  The features
are handed on detached; they are held until the backward pass is done, because the next stage needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_CLASSES = 10

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

OURS = "layerwise_ext"
EAGER = "eager_channels_last"
CONTIGUOUS = "eager_contiguous"
COMPILE = "compile"
CONVOLUTION = "convolution"
STEPS = (OURS, EAGER, CONTIGUOUS, COMPILE)  # complete training steps; CONVOLUTION is the floor below them


# What follows the activation, by name; 2x2 windows.
FORMS = {"plain": "", "max": "max", "avg": "avg", "depth": "space_to_depth", "residual": ""}


class Row(NamedTuple):
    """Shape of one benchmark row: square maps, square kernel, padding that keeps the size."""

    batch: int
    in_channels: int
    out_channels: int
    size: int
    cells: int
    stride: int = 1
    kernel: int = 3
    form: str = "plain"  # one of FORMS

    @classmethod
    def parse(cls, text: str) -> Row:
        """Reads ``N,C_in,C_out,size,cells[,stride[,kernel[,form]]]``."""
        numbers, form = text.split(","), "plain"
        if numbers[-1] in FORMS:
            form = numbers.pop()
        try:
            values = [int(part) for part in numbers]
        except ValueError:
            values = []
        if len(values) not in (5, 6, 7) or min(values) < 1:
            raise ValueError(
                "row must be N,C_in,C_out,size,cells[,stride[,kernel]] in positive integers, and perhaps one of "
                f"{', '.join(FORMS)}, got {text!r}"
            )
        row = cls(*values)._replace(form=form)
        if row.cells > row.output_size // row.factor:
            raise ValueError(f"row {text!r}: {row.cells} cells do not fit a map of {row.output_size // row.factor}")
        if form == "residual" and (row.in_channels != row.out_channels or row.stride > 1):
            raise ValueError(f"row {text!r}: a residual needs as many output as input channels, and stride 1")
        return row

    @property
    def output_size(self) -> int:
        """Of the convolution."""
        return (self.size - 1) // self.stride + 1

    @property
    def downsample(self) -> tuple[str, int] | None:
        return (FORMS[self.form], 2) if FORMS[self.form] else None

    @property
    def factor(self) -> int:
        return 2 if self.downsample else 1

    @property
    def features(self) -> int:
        """Channels of what goes on."""
        return self.out_channels * (self.factor**2 if self.form == "depth" else 1)

    def map_bytes(self, dtype: torch.dtype) -> int:
        """Size of the pre-activation z."""
        return self.batch * self.out_channels * self.output_size**2 * dtype.itemsize

    def least_bytes(self, dtype: torch.dtype) -> int:
        """z, which the backward pass needs, and y, which goes on."""
        y = self.batch * self.features * (self.output_size // self.factor) ** 2 * dtype.itemsize
        return self.map_bytes(dtype) + y

    def __str__(self) -> str:
        text = f"{self.batch}x{self.in_channels}->{self.out_channels} {self.size}x{self.size}"
        text += f" /{self.stride}" if self.stride > 1 else ""
        text += f" {self.kernel}x{self.kernel}" if self.kernel != 3 else ""
        return text if self.form == "plain" else f"{text} {self.form}"


ROWS = (
    Row(64, 64, 64, 32, 4),
    Row(64, 128, 128, 16, 2),
    Row(64, 128, 256, 32, 4),
    Row(128, 64, 128, 32, 2),
    Row(32, 64, 64, 56, 4),
    Row(128, 16, 16, 32, 4),
    Row(128, 32, 32, 16, 4),
    Row(64, 256, 512, 8, 2),
    Row(32, 3, 64, 32, 4),
    Row(64, 64, 128, 28, 2, 2),
    Row(64, 64, 64, 32, 4, form="max"),
    Row(64, 128, 256, 16, 2, form="max"),
    Row(128, 32, 32, 32, 4, form="max"),
    Row(64, 64, 64, 32, 4, form="avg"),
    Row(64, 64, 64, 32, 4, form="depth"),
    Row(64, 64, 64, 32, 4, form="residual"),
    Row(64, 256, 256, 8, 2, form="residual"),
)


class EagerStage(nn.Module):
    """The stage in plain PyTorch layers."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(row.in_channels, row.out_channels, row.kernel, row.stride, row.kernel // 2, bias=False),
            nn.BatchNorm2d(row.out_channels),
            nn.ReLU(),
        )
        self.downsample = {"max": nn.MaxPool2d(2), "avg": nn.AvgPool2d(2), "depth": nn.PixelUnshuffle(2)}.get(row.form)
        self.residual = row.form == "residual"
        self.pool = nn.AdaptiveAvgPool2d(row.cells)
        self.linear = nn.Linear(row.features * row.cells**2, NUM_CLASSES)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, C_in, H, W], target [N] -> features [N, C_out, H', W'] (detached), loss []."""
        if self.residual:
            conv, bn, relu = self.body
            y = relu(bn(conv(x)) + x)
        else:
            y = self.body(x)
        if self.downsample is not None:
            y = self.downsample(y)
        logits = self.linear(self.pool(y).flatten(1))
        return y.detach(), F.cross_entropy(logits, target)


class FusedStage(nn.Module):
    """The same stage in the layers of this package, with the parameters of ``eager``."""

    def __init__(self, row: Row, eager: EagerStage) -> None:
        super().__init__()
        import layerwise_ext as lw  # here, so that the peers run in processes that have not loaded the package

        body = lw.nn.ConvBNReLU2d(
            row.in_channels, row.out_channels, row.kernel, row.stride, row.kernel // 2, downsample=row.downsample
        )
        body.load_state_dict(eager.body.state_dict())
        head = lw.nn.PooledLinearHead(row.features, NUM_CLASSES, bins=(row.cells, row.cells))
        with torch.no_grad():
            for ours, theirs in zip(head.parameters(), eager.linear.parameters(), strict=True):
                ours.copy_(theirs)
        self.stage = lw.nn.LocalStage(lw.nn.Residual(body) if row.form == "residual" else body, head)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """As `EagerStage.forward`."""
        output = self.stage(x, target)
        return output.features, output.loss


@dataclass(frozen=True)
class Step:
    """What is timed: ``run``; ``prepare`` comes untimed before each run."""

    run: Callable[[], None]
    prepare: Callable[[], None]


@dataclass(frozen=True)
class TrainingStep(Step):
    """A complete step of one contestant."""

    module: nn.Module  # the parameters that are trained, in the same order for every contestant
    loss: Callable[[], Tensor]  # one run that gives its loss back, for comparing results


def inputs(row: Row, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Input map [N, C_in, size, size], channels_last, in ``dtype``, and targets [N]; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(row.batch, row.in_channels, row.size, row.size, generator=generator)
    target = torch.randint(0, NUM_CLASSES, (row.batch,), generator=generator)
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last), target.to(device)


def eager_stage(row: Row, seed: int = 0) -> EagerStage:
    """A stage whose batch norm is not at its initial ones and zeros, where errors in gamma and beta would not show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stage = EagerStage(row)
        _conv_weight, gamma, beta = stage.body.parameters()
        nn.init.uniform_(gamma, 0.5, 1.5)
        nn.init.normal_(beta, std=0.2)
    return stage


def training_step(name: str, row: Row, dtype: torch.dtype, x: Tensor, target: Tensor) -> TrainingStep:
    """The step of contestant ``name`` for an input of `inputs`; all of them start from the same parameters.

    A name of COMPILE may carry a mode: ``compile:max-autotune``.
    """
    eager = eager_stage(row).to(x.device)
    if name == CONTIGUOUS:
        return _training_step(eager, eager, dtype, x.contiguous(), target)
    use_channels_last(eager)
    if name == EAGER:
        return _training_step(eager, eager, dtype, x, target)
    if name.partition(":")[0] == COMPILE:
        mode = name.partition(":")[2] or None
        return _training_step(eager, torch.compile(eager, dynamic=False, mode=mode), dtype, x, target)
    if name == OURS:
        fused = FusedStage(row, eager).to(x.device)
        use_channels_last(fused)
        return _training_step(fused, fused, dtype, x, target)
    raise ValueError(f"unknown contestant {name!r}, choose from {', '.join(STEPS)}")


def use_channels_last(module: nn.Module) -> None:
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations


def _training_step(
    module: nn.Module,
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    x: Tensor,
    target: Tensor,
) -> TrainingStep:
    def loss() -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            _features, loss = forward(x, target)  # the features live until the backward pass is done
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def run() -> None:  # frees everything but the gradients before the clock stops
        loss()

    def drop_gradients() -> None:
        for parameter in module.parameters():
            parameter.grad = None

    return TrainingStep(run, drop_gradients, module, loss)


def convolution_step(row: Row, dtype: torch.dtype, x: Tensor) -> Step:
    """Forward and weight gradient alone, weights already in ``dtype``: what no fusion around it can go below."""
    weight = next(eager_stage(row).body.parameters()).detach()
    weight = weight.to(x.device, dtype).contiguous(memory_format=torch.channels_last)
    # stride, padding, dilation, transposed, output_padding, groups
    geometry = ([row.stride] * 2, [row.kernel // 2] * 2, [1, 1], False, [0, 0], 1)
    grad = torch.randn_like(torch.ops.aten.convolution(x, weight, None, *geometry))

    def run() -> None:
        torch.ops.aten.convolution(x, weight, None, *geometry)
        torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, [False, True, False])

    return Step(run, lambda: None)
