"""Supervised contrastive learning as a local loss (Khosla et al. 2020, arXiv 2004.11362)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise_ext import functional
from layerwise_ext.nn.heads import HeadOutput, LocalHead, check_features, grid
from layerwise_ext.nn.moments import PooledMoments


class ContrastiveHead(LocalHead):
    """Draws pooled features of a class together and pushes those of other classes away; has no logits.

    The features are the means of the cells, in (c, bh, bw) order, through a small network (linear, ReLU, linear) with
    ``features`` outputs, and the loss is :func:`~layerwise_ext.functional.supervised_contrastive_loss` of them. InfoPro
    (Wang et al. 2021, arXiv 2101.10832) trains its modules with this loss.

    Args:
        in_channels: channels of the stage's output.
        bins: grid of cells, an int or ``(bh, bw)``.
        features: outputs of the network; None leaves it out, and the means themselves are compared.
        hidden: its hidden units; None: as many as it has inputs.
        temperature: divides the cosines.

    Shapes:
        moments of ``[N, in_channels, H, W]`` with H >= bh, W >= bw; target ``[N]``, int64, -100 for a sample that is
        left out.

    Raises:
        ValueError: moments or a target of another shape.
        TypeError: a target that is not int64.
    """

    second_moment = False

    def __init__(
        self,
        in_channels: int,
        bins: int | tuple[int, int] = (1, 1),
        features: int | None = 128,
        *,
        hidden: int | None = None,
        temperature: float = 0.07,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.bins = grid(bins)
        for name, value in (("in_channels", in_channels), ("features", features), ("hidden", hidden)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be positive")
        self.in_channels = in_channels
        self.temperature = temperature
        self.first: nn.Linear | None = None
        self.second: nn.Linear | None = None
        if features is not None:
            inputs = in_channels * self.bins[0] * self.bins[1]
            hidden = inputs if hidden is None else hidden
            self.first = nn.Linear(inputs, hidden, device=device, dtype=dtype)
            self.second = nn.Linear(hidden, features, device=device, dtype=dtype)

    def features(self, moments: PooledMoments) -> Tensor:
        """``[N, features]``, what is compared, before it is brought to length 1."""
        if self.first is None or self.second is None:
            return moments.mean.flatten(1)
        with torch.autocast(moments.device.type, enabled=False):
            hidden = F.relu(moments.mean_linear(self.first.weight, self.first.bias))
            return F.linear(hidden, self.second.weight, self.second.bias)

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        check_features(moments, self.in_channels, self.bins)
        if target is None:
            return HeadOutput(None, None)
        loss = functional.supervised_contrastive_loss(self.features(moments), target, temperature=self.temperature)
        return HeadOutput(None, loss)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, bins={self.bins}, temperature={self.temperature}"
