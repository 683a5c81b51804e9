"""Joint training: backpropagation through the whole network from its output."""

from __future__ import annotations

from torch import Tensor, nn

from layerwise_ext.train.common import Trainer
from layerwise_ext.train.metrics import StepResult, step_result


class JointTrainer(Trainer):
    """Ordinary backpropagation: all bodies and the last stage's head, one loss, one optimiser.

    The other stages' heads are neither run nor trained, and ``detach`` is not looked at. See :class:`Trainer` for the
    arguments.
    """

    def _step(self, x: Tensor, target: Tensor, weight: float = 1.0, update: bool = True) -> StepResult:
        *hidden, last = self.stages
        with self._autocast():
            for stage in hidden:
                x = stage.features(x)
            _, moments = last.moments(x)
            logits, loss = last.head(moments, target)
        self._backward(loss, weight)
        if update:
            self._update(0)
        return step_result([loss], [logits], target)

    def _parameter_groups(self) -> list[list[nn.Parameter]]:
        parameters = [p for stage in self.stages for p in stage.body.parameters()]
        # A dictionary drops the repetitions of parameters that stages share, in order.
        return [list(dict.fromkeys([*parameters, *self.stages[-1].head.parameters()]))]

    def _reported(self) -> list[int]:
        return [len(self.stages) - 1]
