"""The official binary files of CIFAR-10 and CIFAR-100: labels (one byte or two), 1024 red, green and blue values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from layerwise_ext.data.files.common import Split, check_labels, find, read_records, to_split

PIXELS = 3 * 32 * 32


def read_cifar10(path: Path) -> Split:
    """One CIFAR-10 binary file.

    Raises:
        DataError: not a whole number of records, or a label above 9.
    """
    records = read_records(path, 1 + PIXELS)
    check_labels(path, records[:, 0], 0, 9)
    return _to_split(records[:, 1:], records[:, 0])


def read_cifar100(path: Path, *, coarse: bool = False) -> Split:
    """One CIFAR-100 binary file with its 100 fine or its 20 coarse labels.

    Raises:
        DataError: not a whole number of records, a coarse label above 19 or a fine one above 99.
    """
    records = read_records(path, 2 + PIXELS)
    check_labels(path, records[:, 0], 0, 19)
    check_labels(path, records[:, 1], 0, 99)
    return _to_split(records[:, 2:], records[:, 0 if coarse else 1])


def _to_split(pixels: np.ndarray, labels: np.ndarray) -> Split:
    return to_split(pixels.reshape(-1, 3, 32, 32), labels)


def load_cifar10(directory: Path, split: str) -> Split:
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    parts = [read_cifar10(find(directory, [".", "cifar-10-batches-bin"], [name])) for name in names]
    return Split(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


def load_cifar100(directory: Path, split: str, *, coarse: bool = False) -> Split:
    return read_cifar100(find(directory, [".", "cifar-100-binary"], [f"{split}.bin"]), coarse=coarse)
