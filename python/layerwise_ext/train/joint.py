"""Joint training: backpropagation through the whole network from its output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from layerwise_ext.nn import LocalStage
from layerwise_ext.train.blocks import make_blocks
from layerwise_ext.train.common import Trainer
from layerwise_ext.train.metrics import StepResult


class JointTrainer(Trainer):
    """Ordinary backpropagation: all bodies and the last stage's head, one loss, one optimiser.

    ``detach`` is not looked at. The other stages' heads are neither run nor trained, but for deep supervision.

    Args:
        stages, optimizer, ...: see :class:`Trainer`.
        deep_supervision: weights of the losses of the hidden heads, which are added to that of the last one (Lee et al.
            2015, arXiv 1409.5185): a number for all of them, or one for each stage but the last. Heads with a weight
            above 0 are trained and reported, too.
        checkpointing: keep only the inputs of the stages (True), or of that many segments of them, and run them again
            in the backward pass (Chen et al. 2016, arXiv 1604.06174). The last segment is not run again. Gradients are
            the same, and so are the running statistics, which move once.

    Raises:
        ValueError: a weight that is negative or not finite, another number of weights than of hidden heads; a number of
            segments that is not between 2 and that of stages; ``checkpointing`` with ``cuda_graph``.
    """

    def __init__(
        self,
        stages: Iterable[LocalStage],
        *args: Any,
        deep_supervision: float | Sequence[float] | None = None,
        checkpointing: bool | int = False,
        **kwargs: Any,
    ) -> None:
        stages = list(stages)
        if checkpointing and kwargs.get("cuda_graph"):
            raise ValueError(f"cuda_graph=True needs checkpointing=False, got {checkpointing}")
        sizes = [len(stages)] if stages else []
        self._blocks = make_blocks(stages, sizes, deep_supervision, checkpointing)
        super().__init__(stages, *args, **kwargs)

    def _step(self, x: Tensor, target: Tensor, weight: float = 1.0, update: bool = True) -> StepResult:
        (block,) = self._blocks
        with self._autocast():
            output = block(x, target, x)
        self._backward(output.loss, weight)
        if update:
            self._update(0)
        return self._result(output.losses, output.logits, target)

    def _parameter_groups(self) -> list[list[nn.Parameter]]:
        return [block.parameters() for block in self._blocks]

    def _reported(self) -> list[int]:
        return self._blocks[0].supervised

    def _stages_of(self, group: int) -> list[int]:
        return self._blocks[group].indices
