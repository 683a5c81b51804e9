"""The convolutions and linear layers of a model, and calls of it in which hooks on each of them run."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from layerwise_ext import functional
from layerwise_ext.models import StagedModel
from layerwise_ext.nn import ConvBNReLU2d, LocalStage

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Layer(NamedTuple):
    """A convolution or linear layer; ``owner`` is the module that is called in its place, or the layer itself."""

    name: str
    module: nn.Module
    owner: nn.Module

    def parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return cast(nn.Parameter, self.module.weight), cast("nn.Parameter | None", self.module.bias)

    @property
    def channel_dim(self) -> int:
        """Of the output: the last dimension of a linear layer's, the one before the spatial ones of a convolution's."""
        return 1 - self.parameters()[0].dim() if not isinstance(self.module, nn.Linear) else -1

    def output(self, x: Tensor) -> Tensor:
        """Without hooks."""
        y: Tensor = self.module.forward(x)
        if isinstance(self.owner, ConvBNReLU2d) and self.owner.downsample is not None:
            mode, factor = self.owner.downsample
            if mode == "stride":  # which the fused layer folds into the convolution
                y = functional.downsample(y, mode, factor)
        return y

    @property
    def is_computed(self) -> bool:
        """Whether the weight is computed from others (weight_norm)."""
        return not isinstance(self.module._parameters.get("weight"), nn.Parameter)


def layers_of(model: nn.Module) -> list[Layer]:
    """In the order of ``named_modules``."""
    owners: dict[nn.Module, nn.Module] = {m.conv: m for m in model.modules() if isinstance(m, ConvBNReLU2d)}
    return [Layer(name, m, owners.get(m, m)) for name, m in model.named_modules() if isinstance(m, KINDS)]


def call(model: nn.Module, batch: Tensor) -> Any:
    """So that hooks run on every layer, which a stage that is asked for moments does without."""
    if isinstance(model, StagedModel):
        return model.backbone()(batch)
    return model.features(batch) if isinstance(model, LocalStage) else model(batch)
