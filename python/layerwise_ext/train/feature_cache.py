"""Outputs of frozen stages, kept in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class FeatureCache:
    """Features ``[n, C, H, W]`` and targets ``[n]`` of a data set, read back in shuffled batches.

    Memory for ``capacity`` samples is taken at once, in the memory format, dtype and device of ``example``
    ``[B, C, H, W]``, whose B becomes the batch size.
    """

    def __init__(self, example: Tensor, capacity: int) -> None:
        self.batch_size = example.shape[0]
        # Samples are gathered whole: storing them as they lie in memory, [n, H, W, C] for channels_last, makes that a
        # copy of contiguous rows.
        self._channels_last = example.dim() == 4 and example.is_contiguous(memory_format=torch.channels_last)
        self._rows = self._to_rows(example).new_empty((capacity, *self._to_rows(example).shape[1:]))
        self._target = torch.empty(capacity, dtype=torch.int64, device=example.device)
        self._filled = 0

    @classmethod
    def fill(cls, batches: Iterable[tuple[Tensor, Tensor]], count: int | None, limit_bytes: int) -> FeatureCache | None:
        """All of ``batches``; None, with a warning, where their ``count`` is unknown or the first says they do not fit.

        Raises:
            RuntimeError: no batches, or larger ones than the first.
        """
        if count is None:
            logger.warning("the loader has no length: the frozen stages run in each step instead of once")
            return None
        cache: FeatureCache | None = None
        for x, target in batches:
            if cache is None:
                needed = x.numel() * x.element_size() * count
                if needed > limit_bytes:
                    logger.warning(
                        "the outputs of the frozen stages take %.1f MiB, cache_limit_bytes is %.1f MiB: the frozen "
                        "stages run in each step instead of once",
                        needed / 2**20,
                        limit_bytes / 2**20,
                    )
                    return None
                cache = cls(x, x.shape[0] * count)
            cache._append(x, target)
        if cache is None:
            raise RuntimeError("loader gave no batches; there is nothing to cache")
        return cache

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self._filled // self.batch_size)

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once, in an order drawn from ``generator``."""
        order = torch.randperm(self._filled, generator=generator).to(self._rows.device)
        for index in torch.split(order, self.batch_size):
            rows = self._rows.index_select(0, index)
            yield rows.permute(0, 3, 1, 2) if self._channels_last else rows, self._target.index_select(0, index)

    def _append(self, x: Tensor, target: Tensor) -> None:
        end = self._filled + x.shape[0]
        if end > self._rows.shape[0]:
            raise RuntimeError("the loader gave more samples than its first batch and its length say; use cache=False")
        self._rows[self._filled : end] = self._to_rows(x)
        self._target[self._filled : end] = target
        self._filled = end

    def _to_rows(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) if self._channels_last else x
