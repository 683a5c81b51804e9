"""A local loss on every convolution of a residual network."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from layerwise_ext import models
from layerwise_ext.nn import ConvBNReLU2d, LocalHead, LocalStage, PooledMoments, Residual, StageOutput
from layerwise_ext.nn.heads import ClassifierHead, HeadOutput


class ConvolutionLossStage(LocalStage):
    """A basic residual block with a local loss on each of its two convolutions (arXiv 1901.06656).

    What the second convolution reads is detached, and so is what the shortcut reads: it is trained with the second. The
    stage's loss is the sum of the two, of which each parameter is in one: an optimiser that treats parameters one by
    one, such as Adam, does with it what two optimisers do.

    Args:
        block: of two layers.
        head: of the block's output.
        first_head: of the first convolution's.

    Raises:
        ValueError: a block of another number of layers.
    """

    body: Residual
    head: _TwoHeads

    def __init__(self, block: Residual, head: ClassifierHead, first_head: LocalHead) -> None:
        if len(block.body) != 2:
            raise ValueError(f"block has {len(block.body)} layers; allowed: 2, a basic block")
        super().__init__(block, _TwoHeads(head, first_head))

    def forward(self, x: Tensor, target: Tensor | None = None, image: Tensor | None = None) -> StageOutput:
        if target is None:
            return super().forward(x, target, image)
        first, last = (cast(ConvBNReLU2d, layer) for layer in self.body.body)
        shortcut = self.body.shortcut
        x = x.detach()
        y, hidden = _moments(first, x, self.head.first)
        z, moments = _moments(last, y.detach(), self.head, x if shortcut is None else shortcut(x))
        first_loss = self.head.first(hidden, target).loss
        logits, loss = self.head(moments, target)
        return StageOutput(z.detach(), loss + first_loss, logits)


class _TwoHeads(ClassifierHead):
    """The head of a block's output, which keeps that of its first convolution."""

    def __init__(self, last: ClassifierHead, first: LocalHead) -> None:
        super().__init__()
        self.last = last
        self.first = first
        self.bins = last.bins
        self.second_moment = last.second_moment
        self.needs_map = last.needs_map

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        output: HeadOutput = self.last(moments, target)
        return output

    def to_modules(self) -> nn.Sequential:
        return self.last.to_modules()


def _moments(
    layer: ConvBNReLU2d, x: Tensor, head: LocalHead, residual: Tensor | None = None
) -> tuple[Tensor, PooledMoments]:
    y, m1, m2 = layer.forward_moments(x, head.bins, head.second_moment, residual)
    return y, PooledMoments(m1, m2, (y.shape[2], y.shape[3]), y if head.needs_map else None)


def on_every_convolution(
    model: models.StagedModel,
    image_shape: tuple[int, int, int],
    head: Callable[[int, tuple[int, int]], LocalHead],
) -> models.StagedModel:
    """The same network, with the modules of ``model``, and a local loss on the first convolution of each block, too.

    Args:
        model: a fused ResNet of basic blocks.
        image_shape: ``(C, H, W)``.
        head: makes a new head for maps of so many channels and ``(H, W)``; the heads of the blocks stay.

    Raises:
        ValueError: a block of another number of convolutions than two.
    """
    stages = []
    for stage, cost in zip(model, models.summary(model, image_shape).stages, strict=True):
        if isinstance(stage.body, Residual):
            channels, height, width = cost.output  # of both convolutions: the first one has the stride
            first = head(channels, (height, width))
            stage = ConvolutionLossStage(stage.body, cast(ClassifierHead, stage.head), first)
        stages.append(stage)
    return models.StagedModel(stages, model.downsampling)
