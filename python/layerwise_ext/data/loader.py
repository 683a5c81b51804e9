"""A loader that keeps a data set in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise_ext.data.files import Split


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel, of values between 0 and 1."""

    mean: Tensor  # [C]
    std: Tensor  # [C]

    @staticmethod
    def of(images: Tensor) -> Normalization:
        """Of uint8 images ``[N, C, H, W]``."""
        values = images.transpose(0, 1).flatten(1).double() / 255
        return Normalization(values.mean(1).float(), values.std(1).clamp_min(1e-3).float())

    def apply(self, images: Tensor) -> Tensor:
        """float32, channels_last."""
        scaled = images.float() / 255
        scaled.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])
        return scaled.contiguous(memory_format=torch.channels_last)


class MemoryLoader:
    """Batches ``(images float32 [B, C, H, W] channels_last, labels int64 [B])`` of a data set held in memory.

    Iterating gives one epoch; with ``shuffle`` in a new order each time, drawn from ``generator``, whose state is all
    that a resumed run needs.

    Args:
        split: images and labels.
        batch_size: images per batch; the last batch may be smaller.
        normalization: applied once, here.
        shuffle: new order in each epoch.
        drop_last: leave out a last batch that is smaller.
        seed: of the order.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        normalization: Normalization,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        if not 1 <= batch_size <= len(split.labels):
            raise ValueError(f"batch size is {batch_size}; allowed: 1 to {len(split.labels)}, the number of images")
        self.images = normalization.apply(split.images)
        self.labels = split.labels
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        count = len(self.labels)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.labels)
        order = torch.randperm(count, generator=self.generator) if self.shuffle else torch.arange(count)
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = order[first : first + self.batch_size]
            images = self.images[chosen].contiguous(memory_format=torch.channels_last)
            yield images, self.labels[chosen]
