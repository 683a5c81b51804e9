"""Outputs of frozen stages, kept in memory or in a file."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from layerwise_ext import checkpoint
from layerwise_ext.train.feature_file import FeatureFile, FeatureFileError

logger = logging.getLogger(__name__)


class FeatureCache:
    """Features ``[n, C, H, W]`` and targets ``[n]`` of a data set, read back in shuffled batches.

    Args:
        rows: ``[capacity, ...]``, samples as they lie in memory; ``[capacity, H, W, C]`` with ``channels_last``.
        targets: ``[capacity]``.
        batch_size: of the batches that are read.
        channels_last: the memory format of the features.
        device: where they are read to.
        filled: number of samples that are there already.
    """

    def __init__(
        self, rows: Tensor, targets: Tensor, batch_size: int, channels_last: bool, device: torch.device, filled: int = 0
    ) -> None:
        self.batch_size = batch_size
        # Samples are gathered whole: storing them as they lie in memory, [n, H, W, C] for channels_last, makes that a
        # copy of contiguous rows.
        self._channels_last = channels_last
        self._rows = rows
        self._target = targets
        self._device = device
        self._filled = filled
        self._path: Path | None = None

    @classmethod
    def fill(
        cls,
        batches: Iterable[tuple[Tensor, Tensor]],
        count: int | None,
        limit_bytes: int,
        path: Path | None = None,
        key: str = "",
    ) -> FeatureCache | None:
        """All of ``batches``, in memory on their device, or in the file ``path``, which is complete or absent.

        Args:
            count: number of batches.
            limit_bytes: for all of them.
            key: what the file is of, for :meth:`open`.

        Returns:
            None, with a warning, where ``count`` is unknown, the first batch says that they do not fit, or the disk
            has no room.

        Raises:
            RuntimeError: no batches, or larger ones than the first.
        """
        if count is None:
            logger.warning("the loader has no length: the frozen stages run in each step instead of once")
            return None
        iterator = iter(batches)
        first = next(iterator, None)
        if first is None:
            raise RuntimeError("loader gave no batches; there is nothing to cache")
        needed = first[0].numel() * first[0].element_size() * count
        if needed > limit_bytes:
            logger.warning(
                "the outputs of the frozen stages take %.1f MiB, cache_limit_bytes is %.1f MiB: the frozen "
                "stages run in each step instead of once",
                needed / 2**20,
                limit_bytes / 2**20,
            )
            return None
        batches = itertools.chain([first], iterator)
        if path is None:
            return cls._in_memory(first, count)._append(batches)
        try:
            with checkpoint.replacing(path) as temporary:
                cache, file = cls._in_file(temporary, first, count)
                cache._append(batches)
                file.finish(cache._filled, batch_size=cache.batch_size, channels_last=cache._channels_last, key=key)
        except FeatureFileError as error:
            logger.warning("%s: the frozen stages run in each step instead of once", error)
            return None
        cache._path = path
        return cache

    @classmethod
    def open(cls, path: Path, key: str, device: torch.device) -> FeatureCache:
        """What :meth:`fill` wrote, to be read to ``device``.

        Raises:
            FeatureFileError: no such file, a truncated or damaged one, or one with another ``key``.
        """
        file = FeatureFile.open(path, key=key)
        header = file.header
        batch_size, channels_last, samples = header["batch_size"], header["channels_last"], header["samples"]
        cache = cls(file.rows, file.targets, batch_size, channels_last, device, samples)
        cache._path = path
        return cache

    @classmethod
    def _in_memory(cls, first: tuple[Tensor, Tensor], count: int) -> FeatureCache:
        x, target = first
        row, capacity = _rows(x)[0], x.shape[0] * count
        rows, targets = row.new_empty((capacity, *row.shape)), target.new_empty(capacity)
        return cls(rows, targets, x.shape[0], _is_channels_last(x), x.device)

    @classmethod
    def _in_file(cls, path: Path, first: tuple[Tensor, Tensor], count: int) -> tuple[FeatureCache, FeatureFile]:
        x, target = first
        row = _rows(x)[0]
        file = FeatureFile.create(path, x.shape[0] * count, tuple(row.shape), row.dtype, target.dtype)
        return cls(file.rows, file.targets, x.shape[0], _is_channels_last(x), x.device), file

    def remove(self) -> None:
        """Delete the file, if there is one; the cache can be used no more."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self._filled // self.batch_size)

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once, in an order drawn from ``generator``."""
        order = torch.randperm(self._filled, generator=generator).to(self._rows.device)
        for index in torch.split(order, self.batch_size):
            rows = self._rows.index_select(0, index).to(self._device)
            target = self._target.index_select(0, index).to(self._device)
            yield rows.permute(0, 3, 1, 2) if self._channels_last else rows, target

    def _append(self, batches: Iterable[tuple[Tensor, Tensor]]) -> FeatureCache:
        for x, target in batches:
            end = self._filled + x.shape[0]
            if end > self._rows.shape[0]:
                raise RuntimeError(
                    "the loader gave more samples than its first batch and its length say; use cache=False"
                )
            self._rows[self._filled : end] = x.permute(0, 2, 3, 1) if self._channels_last else x
            self._target[self._filled : end] = target
            self._filled = end
        return self


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if _is_channels_last(x) else x
