"""The binary files of STL-10: 96x96 images, channel by channel and each of them column by column; labels 1 to 10."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from layerwise_ext.data.files.common import Split, check_counts, check_labels, find, read_records, to_split

FOLDERS = [".", "stl10_binary"]


def read_stl10(image_path: Path, label_path: Path | None = None) -> Split:
    """Images and labels; without a file of labels, all are -1.

    Raises:
        DataError: not a whole number of images, a label outside 1 to 10, or another number of labels than of images.
    """
    images = read_records(image_path, 3 * 96 * 96).reshape(-1, 3, 96, 96).swapaxes(2, 3)
    if label_path is None:
        return to_split(images, np.full(len(images), -1))
    labels = read_records(label_path, 1)[:, 0]
    check_counts(image_path, len(images), label_path, len(labels))
    check_labels(label_path, labels, 1, 10)
    return to_split(images, labels.astype(np.int64) - 1)


def load_stl10(directory: Path, split: str) -> Split:
    image_path = find(directory, FOLDERS, [f"{split}_X.bin"])
    return read_stl10(image_path, None if split == "unlabeled" else find(directory, FOLDERS, [f"{split}_y.bin"]))
