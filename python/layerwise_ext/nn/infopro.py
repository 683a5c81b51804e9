"""Information propagation: local losses that keep what the image says (Wang et al. 2021, arXiv 2101.10832)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise_ext import functional
from layerwise_ext.nn.conv import ConvBNReLU2d
from layerwise_ext.nn.heads import (
    HeadOutput,
    LocalHead,
    check_features,
    check_label_smoothing,
    check_target,
    cross_entropy,
)
from layerwise_ext.nn.moments import PooledMoments

LOSSES = ("bce", "mse")
TASKS = ("softmax", "contrastive")


class ReconstructionHead(LocalHead):
    """How well a small decoder recovers the network's image from the stage's output; has no logits.

    The decoder: bilinear interpolation to the image's size, 3x3 convolution to ``hidden`` channels, batch norm, ReLU,
    3x3 convolution to the image's channels. With ``'bce'`` its sigmoid is compared by binary cross-entropy with the
    image in [0, 1], as in the paper, with ``'mse'`` its output by the mean square.

    Args:
        in_channels: channels of the stage's output.
        image_channels: channels of the image.
        hidden: channels between the convolutions; the paper's is 12.
        loss: ``'bce'`` or ``'mse'``.
        mean, std: what the images were normalised with, a number or one for each channel; ``'bce'`` undoes it and cuts
            what is outside of [0, 1].

    Shapes:
        moments of ``[N, in_channels, H, W]`` with the map and the image ``[N, image_channels, H', W']``, which the
        stage gives the head: the argument ``image`` of :meth:`LocalStage.forward`, or the stage's own input without it.

    Raises:
        ValueError: a map or an image of other channels; an unknown ``loss``; ``mean`` or ``std`` of another length.
    """

    bins = (1, 1)
    second_moment = False
    needs_map = True
    needs_image = True
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        in_channels: int,
        image_channels: int = 3,
        hidden: int = 12,
        *,
        loss: str = "bce",
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}; allowed: {', '.join(map(repr, LOSSES))}")
        self.in_channels = in_channels
        self.image_channels = image_channels
        self.loss = loss
        for name, value in (("mean", mean), ("std", std)):
            values = torch.as_tensor(value, device=device, dtype=dtype or torch.get_default_dtype()).flatten()
            if values.numel() not in (1, image_channels):
                raise ValueError(f"{name} has {values.numel()} values; allowed: 1 or {image_channels}, one per channel")
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)
        factory = {"device": device, "dtype": dtype}
        self.decoder = nn.Sequential(
            ConvBNReLU2d(in_channels, hidden, 3, padding=1, **factory),
            nn.Conv2d(hidden, image_channels, 3, padding=1, **factory),
        )

    def reconstruction(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """``[N, image_channels, *size]``, what the decoder makes of a map; before the sigmoid with ``'bce'``."""
        if y.shape[2:] != torch.Size(size):
            y = F.interpolate(y, size, mode="bilinear", align_corners=True)
        decoded: Tensor = self.decoder(y)
        return decoded

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        check_features(moments, self.in_channels, self.bins)
        if target is None:
            return HeadOutput(None, None)
        image = moments.image
        if image.dim() != 4 or image.shape[1] != self.image_channels:
            raise ValueError(
                f"the head was built for images of {self.image_channels} channels, got shape {list(image.shape)}"
            )
        decoded = self.reconstruction(moments.y, (image.shape[2], image.shape[3]))
        with torch.autocast(decoded.device.type, enabled=False):
            decoded = decoded if decoded.dtype == torch.float64 else decoded.float()
            image = image.detach().to(decoded.dtype)
            if self.loss == "mse":
                return HeadOutput(None, F.mse_loss(decoded, image))
            image = (image * self.std + self.mean).clamp(0, 1)
            return HeadOutput(None, F.binary_cross_entropy_with_logits(decoded, image))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.image_channels}, loss={self.loss!r}"


class InfoProHead(LocalHead):
    """``weights[0] * reconstruction + weights[1] * task``: keep what the image says and tell the classes apart.

    Args:
        in_channels: channels of the stage's output.
        num_classes: number of classes.
        task: ``'softmax'``, cross-entropy of a classifier, or ``'contrastive'``, the supervised contrastive loss of
            ``features`` numbers at ``temperature``: both behind a 3x3 convolution with batch norm and ReLU, the mean
            over the map, and a linear layer with ReLU of 128 units.
        weights: of the two losses; see :func:`infopro_weights`.
        image_channels, mean, std: as of :class:`ReconstructionHead`, which is the child ``reconstruction``.
        features, temperature: of the contrastive task.
        label_smoothing: of the cross-entropy, as in ``torch.nn.functional.cross_entropy``.

    Shapes:
        those of :class:`ReconstructionHead`; target ``[N]``, int64, -100 for a sample without a label. Logits with
        ``'softmax'``.

    Raises:
        ValueError: an unknown ``task``; negative ``weights``; ``label_smoothing`` out of range, or with
            ``'contrastive'``; a target of another shape or out of range.
        TypeError: a target that is not int64.
    """

    bins = (1, 1)
    second_moment = False
    needs_map = True
    needs_image = True

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        task: str = "softmax",
        *,
        weights: tuple[float, float] = (1.0, 1.0),
        image_channels: int = 3,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        features: int = 128,
        temperature: float = 0.07,
        label_smoothing: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"task is {task!r}; allowed: {', '.join(map(repr, TASKS))}")
        if label_smoothing and task == "contrastive":
            raise ValueError(f"label_smoothing is {label_smoothing}; allowed with task 'contrastive': 0")
        if len(weights) != 2 or min(weights) < 0:
            raise ValueError(f"weights are {tuple(weights)}; allowed: two numbers of at least 0")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be positive")
        self.in_channels = in_channels
        self.task = task
        self.weights = (float(weights[0]), float(weights[1]))
        self.temperature = temperature
        self.label_smoothing = check_label_smoothing(label_smoothing)
        factory = {"device": device, "dtype": dtype}
        self.reconstruction = ReconstructionHead(in_channels, image_channels, mean=mean, std=std, **factory)
        self.conv = ConvBNReLU2d(in_channels, in_channels, 3, padding=1, **factory)
        self.projection = nn.Sequential(
            nn.Linear(in_channels, 128, **factory),
            nn.ReLU(),
            nn.Linear(128, num_classes if task == "softmax" else features, **factory),
        )

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        check_features(moments, self.in_channels, self.bins)
        _, m1, _ = self.conv.forward_moments(moments.y, (1, 1), second_moment=False)
        pooled = PooledMoments(m1, None, self.conv.map_size(moments.y)).mean.flatten(1)
        with torch.autocast(pooled.device.type, enabled=False):
            projected: Tensor = self.projection(pooled.to(next(self.projection.parameters()).dtype))
        logits = projected if self.task == "softmax" else None
        if target is None:
            return HeadOutput(logits, None)
        check_target(target, projected)
        if logits is not None:
            task = cross_entropy(logits, target, self.label_smoothing)
        else:
            task = functional.supervised_contrastive_loss(projected, target, temperature=self.temperature)
        recovered = self.reconstruction(moments, target).loss
        return HeadOutput(logits, self.weights[0] * recovered + self.weights[1] * task)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, task={self.task!r}, weights={self.weights}"


def infopro_weights(
    stages: int, first: tuple[float, float] = (5.0, 0.5), last: tuple[float, float] = (1.0, 1.0)
) -> list[tuple[float, float]]:
    """Weights of reconstruction and task for each stage but the output's, linear from the first stage to the last.

    Args:
        stages: number of stages with such a loss.
        first, last: of the first and of the last of them. The paper tunes them for each data set; these are this
            package's.

    Raises:
        ValueError: ``stages`` below 0.
    """
    if stages < 0:
        raise ValueError(f"stages is {stages}; it must be at least 0")
    shares = [i / max(1, stages - 1) for i in range(stages)]
    return [(_between(first[0], last[0], s), _between(first[1], last[1], s)) for s in shares]


def _between(first: float, last: float, share: float) -> float:
    return first + (last - first) * share
