"""Blocks: stages in a row that are trained jointly, on the loss of the last one's head."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerwise_ext.nn import LocalStage


class BlockOutput(NamedTuple):
    """``features`` for the next block, without a graph, the ``loss`` to be minimised, and the losses and logits of the
    heads that have a part in it."""

    features: Tensor
    loss: Tensor
    losses: list[Tensor]
    logits: list[Tensor | None]


@dataclass(frozen=True)
class Block:
    """Stages from ``start`` on, ``weights[i]`` the part that the i-th one's head has in the loss: 1 for the last one, 0
    where the head is not run. ``segments`` hold the indices, within the block, at which parts begin of which all but
    the last one are run again in the backward pass."""

    stages: list[LocalStage]
    start: int
    weights: list[float]
    segments: list[int]

    @property
    def supervised(self) -> list[int]:
        """Indices in the network of the stages whose heads are run."""
        return [self.start + i for i, weight in enumerate(self.weights) if weight > 0]

    @property
    def indices(self) -> list[int]:
        """Of its stages in the network."""
        return list(range(self.start, self.start + len(self.stages)))

    def parameters(self) -> list[nn.Parameter]:
        """What the loss depends on, each once."""
        parameters = [p for stage in self.stages for p in stage.body.parameters()]
        for stage, weight in zip(self.stages, self.weights, strict=True):
            parameters += stage.head.parameters() if weight > 0 else []
        return list(dict.fromkeys(parameters))  # stages may share some

    def __call__(self, x: Tensor, target: Tensor, image: Tensor) -> BlockOutput:
        """``x`` and ``image`` are what the block and the network get, ``[N, C, H, W]``."""
        if len(self.stages) == 1:
            output = self.stages[0](x, target, image)
            return BlockOutput(output.features.detach(), output.loss, [output.loss], [output.logits])
        losses: list[Tensor] = []
        logits: list[Tensor | None] = []
        ends = [*self.segments[1:], len(self.stages)]
        for start, end in zip(self.segments, ends, strict=True):
            if end < len(self.stages):
                x, *outputs = self._run_twice(start, end, x, target, image)
            else:
                x, *outputs = self._run(start, end, x, target, image)
            losses += outputs[0::2]
            logits += outputs[1::2]
        weights = [weight for weight in self.weights if weight > 0]
        loss = sum((w * t for w, t in zip(weights[:-1], losses[:-1], strict=True)), start=losses[-1])
        return BlockOutput(x.detach(), loss, losses, logits)

    def _run(self, start: int, end: int, x: Tensor, target: Tensor, image: Tensor) -> tuple[Any, ...]:
        """The features of stage ``end - 1``, then loss and logits of each head on the way."""
        outputs: list[Any] = []
        for i in range(start, end):
            stage, is_last = self.stages[i], i == len(self.stages) - 1
            if self.weights[i] == 0:
                x = stage.features(x)
                continue
            x, moments = stage.moments(x, image, detach=None if is_last else False)
            logits, loss = stage.head(moments, target)
            outputs += [loss, logits]
        return x, *outputs

    def _run_twice(self, start: int, end: int, *inputs: Tensor) -> tuple[Any, ...]:
        """:meth:`_run`, but nothing between is kept: the backward pass does it again."""
        contexts = lambda: (nullcontext(), _aside_from_buffers(self.stages[start:end]))  # noqa: E731
        return cast(
            tuple[Any, ...], checkpoint(self._run, start, end, *inputs, use_reentrant=False, context_fn=contexts)
        )


def make_blocks(
    stages: list[LocalStage],
    sizes: Sequence[int],
    deep_supervision: float | Sequence[float] | None,
    checkpointing: bool | int = False,
) -> list[Block]:
    """Blocks of so many stages each.

    Raises:
        TypeError: ``sizes`` is no sequence.
        ValueError: sizes that are not those of these stages; what the trainers say of the other arguments.
    """
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise TypeError(f"blocks is {sizes!r}; allowed: a sequence of numbers of stages, such as [1, 2], None")
    if min(sizes, default=1) < 1 or sum(sizes) != len(stages):
        raise ValueError(f"blocks is {list(sizes)}; the sizes must be 1 or more and add up to the {len(stages)} stages")
    hidden = len(stages) - len(sizes)
    if not isinstance(deep_supervision, Sequence):
        deep_supervision = [deep_supervision or 0.0] * hidden
    if len(deep_supervision) != hidden:
        raise ValueError(f"deep_supervision has {len(deep_supervision)} weights; there are {hidden} hidden heads")
    for weight in deep_supervision:
        if not 0 <= weight < math.inf:
            raise ValueError(f"deep_supervision has the weight {weight}; allowed: 0 or more")
    remaining, blocks, start = iter(deep_supervision), [], 0
    for size in sizes:
        weights = [*itertools.islice(remaining, size - 1), 1.0]
        blocks.append(Block(stages[start : start + size], start, weights, _segments(size, checkpointing)))
        start += size
    return blocks


def _segments(count: int, checkpointing: bool | int) -> list[int]:
    if isinstance(checkpointing, bool):
        return list(range(count)) if checkpointing else [0]
    if not 2 <= checkpointing <= count:
        raise ValueError(f"checkpointing is {checkpointing}; allowed: True, False, 2 to {count} segments")
    return [i * count // checkpointing for i in range(checkpointing)]


@contextmanager
def _aside_from_buffers(stages: list[LocalStage]) -> Iterator[None]:
    """Running a stage again must not move its running statistics again: it works on copies."""
    modules = [module for stage in stages for module in stage.modules()]
    buffers = [(m, name, t) for m in modules for name, t in m._buffers.items() if t is not None]
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
