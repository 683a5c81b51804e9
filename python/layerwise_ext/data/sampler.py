"""Batches of a few classes each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from layerwise_ext.data.subset import count_by_class, shuffled_by_class


class ClassBatchSampler:
    """Batches with images of exactly ``classes_per_batch`` classes, as evenly as possible (arXiv 1901.06656).

    Losses that compare images within a batch, similarity matching and supervised contrastive ones, see several of each
    class in it. An epoch is the largest number of batches for which there are images, the same in each epoch; which
    classes meet is drawn anew, with probabilities that follow the images that each has left. No image comes twice in an
    epoch. Some are left over where classes differ in size, and where ``batch_size`` is no multiple of
    ``classes_per_batch``: then up to one image per class and batch.

    Serves as the ``batch_sampler`` of a :class:`torch.utils.data.DataLoader`.

    Args:
        labels: int64 ``[N]``.
        batch_size: images per batch; all batches are full.
        classes_per_batch: 1 to the number of classes.
        generator: of the order; None: torch's global one.

    Raises:
        ValueError: a number that is out of range, or too few images for one batch.
    """

    def __init__(
        self,
        labels: Tensor,
        batch_size: int,
        classes_per_batch: int,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        self.labels = labels.cpu()
        self.generator = generator
        counts = count_by_class(self.labels)
        classes = int(counts.count_nonzero())
        if not 1 <= classes_per_batch <= classes:
            raise ValueError(
                f"classes_per_batch is {classes_per_batch}; allowed: 1 to {classes}, the classes there are"
            )
        if batch_size < classes_per_batch:
            raise ValueError(f"batch size is {batch_size}; allowed: {classes_per_batch}, classes_per_batch, or more")
        self.batch_size = batch_size
        self.classes_per_batch = classes_per_batch
        self._quota = -(-batch_size // classes_per_batch)  # images of one class in a batch, the most of them
        self._first = counts.cumsum(0) - counts  # of each class, in shuffled_by_class
        # How many batches each class can be in. T batches can be filled where these, at most T of each, are enough.
        self._shares = counts // self._quota
        possible = torch.arange(int(self._shares.sum()) // classes_per_batch + 1)
        enough = torch.minimum(self._shares, possible[:, None]).sum(1) >= classes_per_batch * possible
        self._length = int(possible[enough].max())
        if self._length == 0:
            raise ValueError(
                f"batch size is {batch_size} with classes_per_batch {classes_per_batch}: fewer than "
                f"{classes_per_batch} classes have {self._quota} images"
            )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.epoch().tolist())

    def epoch(self) -> Tensor:
        """Indices ``[batches, batch_size]`` of the next epoch."""
        order = shuffled_by_class(self.labels, self.generator)
        chosen = self._classes()  # [batches, classes_per_batch]
        turn = torch.zeros_like(chosen)  # how often the class was chosen before
        for label in chosen.unique().tolist():
            hits = chosen == label
            turn[hits] = torch.arange(int(hits.sum()))
        first = self._first[chosen] + turn * self._quota
        images = order[first[:, :, None] + torch.arange(self._quota)]
        # Where the classes cannot all have their quota, the last ones have one image less.
        full = torch.arange(self.classes_per_batch) < self.batch_size - self.classes_per_batch * (self._quota - 1)
        kept = full[:, None] | (torch.arange(self._quota) < self._quota - 1)
        images = images[:, kept]
        return images.gather(1, torch.rand(images.shape, generator=self.generator).argsort(1))

    def _classes(self) -> Tensor:
        """Which classes are in each batch, ``[batches, classes_per_batch]``, in random order.

        With R batches left, no class is to be in more than R of them, and all together in R * classes_per_batch: a
        class that is to be in R has to be in the next one, and if those are, the same holds with R - 1.
        """
        available = self._shares.clamp_max(self._length)
        tickets = torch.arange(len(available)).repeat_interleave(available)
        used = tickets[torch.randperm(len(tickets), generator=self.generator)[: self._length * self.classes_per_batch]]
        left = torch.bincount(used, minlength=len(available))
        # The smallest of exponential / weight are a draw without replacement with these weights.
        draws = torch.empty(self._length, len(left), dtype=torch.float64).exponential_(generator=self.generator)
        batches = []
        for rest, draw in zip(range(self._length, 0, -1), draws, strict=True):
            keys = (draw / left).masked_fill(left == rest, -1.0)
            batches.append(keys.topk(self.classes_per_batch, largest=False).indices)
            left[batches[-1]] -= 1
        chosen = torch.stack(batches)
        return chosen.gather(1, torch.rand(chosen.shape, generator=self.generator).argsort(1))
