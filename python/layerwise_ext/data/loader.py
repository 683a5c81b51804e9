"""A loader that keeps a data set in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise_ext.data.files import Split
from layerwise_ext.data.sampler import ClassBatchSampler


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel, of values between 0 and 1."""

    mean: Tensor  # [C]
    std: Tensor  # [C]

    @staticmethod
    def of(images: Tensor) -> Normalization:
        """Of uint8 images ``[N, C, H, W]``."""
        counts = torch.stack(
            [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
        ).double()
        values = torch.arange(256, dtype=torch.float64, device=images.device) / 255
        total = counts.sum(1)
        mean = (counts @ values) / total
        variance = (counts * (values - mean[:, None]) ** 2).sum(1) / (total - 1).clamp_min(1)
        return Normalization(mean.float(), variance.sqrt().clamp_min(1e-3).float())

    def apply(self, images: Tensor) -> Tensor:
        """float32, channels_last."""
        count, channels, height, width = images.shape
        # Rows of pixels: subtracting vectors of W*C numbers is several times faster than broadcasting C of them.
        rows = images.permute(0, 2, 3, 1).reshape(-1, width * channels).float() / 255
        rows.sub_(self.mean.to(rows).repeat(width)).div_(self.std.to(rows).repeat(width))
        return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


class MemoryLoader:
    """Batches ``(images float32 [B, C, H, W] channels_last, labels int64 [B])`` of a data set held in memory.

    Images are kept as the bytes they are, on the device where they are. Iterating gives one epoch; with ``shuffle`` in
    a new order each time. Order and augmentation are drawn from ``generator``, whose state is all that a resumed run
    needs.

    Args:
        split: images and labels.
        batch_size: images per batch; the last batch may be smaller.
        normalization: applied to each batch, after the augmentation.
        shuffle: new order in each epoch.
        drop_last: leave out a last batch that is smaller.
        augment: ``augment(images, generator) -> images`` on batches uint8 ``[B, C, H, W]``, such as :class:`Augment`.
        classes_per_batch: batches with images of that many classes (:class:`ClassBatchSampler`), all of them full;
            needs ``shuffle``.
        seed: of the order and the augmentation.

    Raises:
        TypeError: images that are not uint8.
        ValueError: not as many images as labels; ``batch_size`` or ``classes_per_batch`` out of range.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        normalization: Normalization,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        classes_per_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        if split.images.dtype != torch.uint8:
            raise TypeError(f"split.images is {split.images.dtype}; allowed: torch.uint8")
        if len(split.images) != len(split.labels):
            raise ValueError(f"split has {len(split.images)} images and {len(split.labels)} labels")
        if not 1 <= batch_size <= len(split.labels):
            raise ValueError(f"batch size is {batch_size}; allowed: 1 to {len(split.labels)}, the number of images")
        if classes_per_batch is not None and not shuffle:
            raise ValueError(f"classes_per_batch is {classes_per_batch} with shuffle=False; such batches are drawn")
        self.images = split.images.contiguous(memory_format=torch.channels_last)
        self.labels = split.labels
        self.batch_size = batch_size
        self.normalization = normalization
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.augment = augment
        self.generator = torch.Generator().manual_seed(seed)
        self._sampler: ClassBatchSampler | None = None
        if classes_per_batch is not None:
            self._sampler = ClassBatchSampler(split.labels, batch_size, classes_per_batch, generator=self.generator)

    def __len__(self) -> int:
        if self._sampler is not None:
            return len(self._sampler)
        count = len(self.labels)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self.images.permute(0, 2, 3, 1)  # contiguous: gathering copies whole images
        for chosen in self._epoch():
            indices = chosen.to(rows.device, non_blocking=True)
            images = rows.index_select(0, indices).permute(0, 3, 1, 2)
            if self.augment is not None:
                images = self.augment(images, self.generator)
            yield self.normalization.apply(images), self.labels.index_select(0, indices)

    def _epoch(self) -> Iterator[Tensor]:
        """Indices ``[B]`` of each batch."""
        if self._sampler is not None:
            yield from self._sampler.epoch()
            return
        count = len(self.labels)
        order = torch.randperm(count, generator=self.generator) if self.shuffle else torch.arange(count)
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[first : first + self.batch_size]
