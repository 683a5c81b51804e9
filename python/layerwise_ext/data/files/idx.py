"""idx files, plain or gzipped: MNIST, Fashion-MNIST, KMNIST."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from layerwise_ext.data.files.common import DataError, Split, check_counts, check_labels, find, read, to_split


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes with that many dimensions (1: labels, 3: images), gzipped where it ends in .gz.

    Raises:
        DataError: wrong magic number, truncated, or longer than its header says.
    """
    content = read(path)
    header = 4 + 4 * dimensions
    expected_magic = bytes([0, 0, 8, dimensions])
    if len(content) < header:
        raise DataError(f"{path}: {len(content)} bytes, shorter than the idx header of {header} bytes")
    if content[:4] != expected_magic:
        raise DataError(
            f"{path}: begins with {content[:4].hex(' ')}; an idx file of unsigned bytes with {dimensions} dimensions "
            f"begins with {expected_magic.hex(' ')}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    expected = math.prod(shape)
    if len(content) - header != expected:
        raise DataError(
            f"{path}: {len(content) - header} bytes after the header, which announces {shape}: {expected} bytes"
        )
    return np.frombuffer(content, np.uint8, expected, offset=header).reshape(shape)


def load_idx(directory: Path, folders: Sequence[str], split: str) -> Split:
    prefix = "train" if split == "train" else "t10k"

    def find_kind(kind: str, directory: Path, folders: Sequence[str]) -> Path:
        stems = [f"{prefix}-{kind}", f"{prefix}-{kind[:-11]}.{kind[-10:]}"]  # some copies have a dot: images.idx3-ubyte
        return find(directory, folders, [stem + suffix for stem in stems for suffix in (".gz", "")])

    image_path = find_kind("images-idx3-ubyte", directory, folders)
    label_path = find_kind("labels-idx1-ubyte", image_path.parent, ["."])
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    check_counts(image_path, len(images), label_path, len(labels))
    check_labels(label_path, labels, 0, 9)
    return to_split(images[:, None], labels)
