"""Local training: every stage in each step, each on its own loss."""

from __future__ import annotations

from torch import Tensor, nn

from layerwise_ext.train.common import Trainer
from layerwise_ext.train.metrics import StepResult, step_result


class LocalTrainer(Trainer):
    """All stages at once, each with its own loss and optimiser (Nokland & Eidnes 2019, arXiv 1901.06656).

    Within a step, stage k's features are computed, then it is updated, then stage k+1 runs on those features: no
    gradient crosses a stage, and only one stage's activations are alive at a time. See :class:`Trainer` for the
    arguments.

    Raises:
        ValueError: a stage with ``detach=False``.
    """

    def _check_stages(self) -> None:
        super()._check_stages()
        for index, stage in enumerate(self.stages):
            if not stage.detach:
                raise ValueError(f"stages[{index}] has detach=False; local training needs detach=True")

    def _step(self, x: Tensor, target: Tensor, weight: float = 1.0, update: bool = True) -> StepResult:
        losses, logits, images = [], [], x
        for index, stage in enumerate(self.stages):
            with self._autocast():
                output = stage(x, target, images)
            self._backward(output.loss, weight)
            if update:
                self._update(index)
            x = output.features
            losses.append(output.loss.detach())
            logits.append(None if output.logits is None else output.logits.detach())
        return step_result(losses, logits, target)

    def _parameter_groups(self) -> list[list[nn.Parameter]]:
        return [list(stage.parameters()) for stage in self.stages]

    def _reported(self) -> list[int]:
        return list(range(len(self.stages)))
