"""Local training: every stage in each step, each on its own loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise_ext.nn import LocalStage
from layerwise_ext.train.blocks import make_blocks
from layerwise_ext.train.common import Trainer
from layerwise_ext.train.metrics import StepResult


class LocalTrainer(Trainer):
    """All stages at once, each with its own loss and optimiser (Nokland & Eidnes 2019, arXiv 1901.06656).

    Within a step, stage k's features are computed, then it is updated, then stage k+1 runs on those features: no
    gradient crosses a stage, and only one stage's activations are alive at a time.

    A stage that early stopping ends is frozen while the others go on: no gradient, no update, eval mode. It is still
    run, and its metrics stay in the records. With ``detach=False`` gradients of later losses still pass through it.

    Args:
        stages, optimizer, ...: see :class:`Trainer`.
        blocks: numbers of stages, which add up to all of them: the stages of a block are trained jointly, on the loss
            of its last head and with one optimiser, and no gradient crosses a block. None: each stage is a block. A
            single block is joint training.
        deep_supervision: weights of the losses of the other heads of a block, which are added to the last one's: a
            number for all of them, or one for each stage that is not the last one of its block.
        detach: False lets gradients flow on where the stages do: through a stage with ``detach=False``, later losses
            reach earlier stages. There is one backward pass, on the sum of the losses, and then a step of each stage's
            optimiser. Stages with ``detach=True`` cut the graph all the same.

    Raises:
        TypeError: ``blocks`` is no sequence.
        ValueError: a stage with ``detach=False`` where the trainer has ``detach=True``; ``blocks`` with
            ``detach=False`` or of other sizes; ``deep_supervision`` without ``blocks``, weights as in
            :class:`JointTrainer`.
    """

    def __init__(
        self,
        stages: Iterable[LocalStage],
        *args: Any,
        blocks: Sequence[int] | None = None,
        deep_supervision: float | Sequence[float] | None = None,
        detach: bool = True,
        **kwargs: Any,
    ) -> None:
        stages = list(stages)
        if blocks is not None and not detach:
            raise ValueError("blocks with detach=False: no gradient crosses a block; leave one of the two out")
        if deep_supervision is not None and blocks is None:
            raise ValueError(f"deep_supervision is {deep_supervision} without blocks: there are no hidden heads")
        self.detach = detach
        self._blocks = make_blocks(stages, [1] * len(stages) if blocks is None else blocks, deep_supervision)
        super().__init__(stages, *args, **kwargs)

    def _check_stages(self) -> None:
        super()._check_stages()
        for index, stage in enumerate(self.stages):
            if self.detach and not stage.detach:
                raise ValueError(
                    f"stages[{index}] has detach=False; local training needs detach=True, or the trainer detach=False"
                )

    def _step(self, x: Tensor, target: Tensor, weight: float = 1.0, update: bool = True) -> StepResult:
        if not self.detach:
            return self._connected_step(x, target, weight, update)
        return self._pass(x, target, x, weight, update)[1]

    def _pass(self, x: Tensor, target: Tensor, image: Tensor, weight: float, update: bool) -> tuple[Tensor, StepResult]:
        """A step on the first stage's inputs ``x`` and the network's ``image``; with the last stage's features."""
        losses, logits = [], []
        for group, block in enumerate(self._blocks):
            stopped = self._has_stopped(group)
            with torch.set_grad_enabled(not stopped), self._autocast():
                output = block(x, target, image)
            if not stopped:
                self._backward(output.loss, weight, group)
            if update and not stopped:
                self._update(group)
            x = output.features
            losses += [loss.detach() for loss in output.losses]
            logits += [None if t is None else t.detach() for t in output.logits]
        return x, self._result(losses, logits, target)

    def _connected_step(self, x: Tensor, target: Tensor, weight: float, update: bool) -> StepResult:
        losses, logits, image = [], [], x
        with self._autocast():
            for stage in self.stages:
                x, loss, output = stage(x, target, image)
                losses.append(loss)
                logits.append(output)
        self._backward(sum(losses[1:], start=losses[0]), weight)
        for group, optimizer in enumerate(self.optimizers) if update else ():
            if self._has_stopped(group):
                optimizer.zero_grad(set_to_none=True)
            else:
                self._update(group)
        return self._result(losses, logits, target)

    def _losses(self, groups: int) -> int:
        return groups if self.detach else 1

    def _parameter_groups(self) -> list[list[nn.Parameter]]:
        return [block.parameters() for block in self._blocks]

    def _reported(self) -> list[int]:
        return [index for block in self._blocks for index in block.supervised]

    def _stages_of(self, group: int) -> list[int]:
        return self._blocks[group].indices
