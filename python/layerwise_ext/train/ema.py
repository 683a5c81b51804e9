"""Exponential moving averages of the weights of stages."""

from __future__ import annotations

from typing import cast

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from layerwise_ext.nn import LocalStage


class AveragedStage(AveragedModel):
    """``average = decay * average + (1 - decay) * weights``, from the weights after the first update on.

    Buffers, running statistics among them, are those of the stage. The number of updates is kept on the CPU, so that
    looking at it does not wait for the device.
    """

    def __init__(self, stage: LocalStage, decay: float) -> None:
        super().__init__(stage, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def of(self, stage: LocalStage) -> LocalStage:
        """The averaged stage; ``stage`` itself before there is an average."""
        return cast(LocalStage, self.module) if self.n_averaged > 0 else stage

    def into(self, stage: LocalStage) -> None:
        """Replace the weights of ``stage`` by their average."""
        stage.load_state_dict(self.of(stage).state_dict())
