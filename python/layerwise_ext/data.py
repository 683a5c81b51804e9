"""Image data sets from local files, and a loader that keeps them in memory.

Formats: idx, plain or gzipped (MNIST, Fashion-MNIST), the official CIFAR-10 binary files, and scikit-learn's digits,
which need no files. Nothing is downloaded and nothing is unpickled.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DATA_DIR_VARIABLE = "LAYERWISE_DATA"


class DataError(Exception):
    """A file that is missing, truncated or not what it should be; the message names it and says what was expected."""


class Split(NamedTuple):
    """``images`` uint8 ``[N, C, H, W]`` and ``labels`` int64 ``[N]``."""

    images: Tensor
    labels: Tensor


# -- Files -------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a complete gzip file ({error}); copy it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes with that many dimensions (1: labels, 3: images), gzipped where it ends in .gz.

    Raises:
        DataError: wrong magic number, truncated, or longer than its header says.
    """
    content = _read(path)
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


CIFAR10_RECORD = 1 + 3 * 32 * 32  # label, then 1024 red, green and blue values


def read_cifar10(path: Path) -> Split:
    """One CIFAR-10 binary file.

    Raises:
        DataError: not a whole number of records, or a label above 9.
    """
    content = np.frombuffer(_read(path), np.uint8)
    if len(content) == 0 or len(content) % CIFAR10_RECORD != 0:
        raise DataError(
            f"{path}: {len(content)} bytes, not a positive multiple of {CIFAR10_RECORD}, the size of a record"
        )
    records = content.reshape(-1, CIFAR10_RECORD)
    _check_labels(path, records[:, 0])
    return Split(
        torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()), torch.from_numpy(records[:, 0].astype(np.int64))
    )


def _check_labels(path: Path, labels: np.ndarray) -> None:
    if labels.size and labels.max() > 9:
        index = int(labels.argmax())
        raise DataError(f"{path}: label {labels[index]} of image {index}; labels are 0 to 9")


def _find(directory: Path, folders: list[str], names: list[str]) -> Path:
    """The first of the files `names` in the first of the sub-folders that has one."""
    if not directory.is_dir():
        raise DataError(f"{directory}: no such folder")
    for folder in folders:
        for name in names:
            if (directory / folder / name).is_file():
                return directory / folder / name
    places = ", ".join(str(directory / folder) for folder in folders)
    raise DataError(f"{names[0]} was not found; looked for {' and '.join(names)} in: {places}")


def _load_idx(directory: Path, folders: list[str], split: str) -> Split:
    prefix = "train" if split == "train" else "t10k"

    def find(kind: str) -> Path:
        stems = [f"{prefix}-{kind}", f"{prefix}-{kind[:-11]}.{kind[-10:]}"]  # some copies have a dot: images.idx3-ubyte
        return _find(directory, folders, [stem + suffix for stem in stems for suffix in (".gz", "")])

    image_path, label_path = find("images-idx3-ubyte"), find("labels-idx1-ubyte")
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{image_path}: {len(images)} images, but {label_path} has {len(labels)} labels")
    if len(images) == 0:
        raise DataError(f"{image_path}: no images")
    _check_labels(label_path, labels)
    return Split(torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64)))


def _load_cifar10(directory: Path, split: str) -> Split:
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    parts = [read_cifar10(_find(directory, [".", "cifar-10-batches-bin"], [name])) for name in names]
    return Split(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


def _load_digits(split: str) -> Split:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("the digits data set comes with scikit-learn: pip install 'layerwise_ext[cli]'") from error
    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8))[:, None]  # 17 grey levels
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    chosen = torch.from_numpy(np.sort(train if split == "train" else test))
    return Split(images[chosen], labels[chosen])


# -- Data sets ---------------------------------------------------------------------------------------------------------

IDX_FOLDERS = {
    "mnist": [".", "mnist", "MNIST", "MNIST/raw", "mnist/raw"],
    "fashion-mnist": [".", "fashion-mnist", "fashion_mnist", "FashionMNIST", "FashionMNIST/raw"],
}
NAMES = ("digits", "mnist", "fashion-mnist", "cifar10")


def load(name: str, data_dir: str | os.PathLike[str] | None = None, split: str = "train") -> Split:
    """A data set's training or test part.

    Args:
        name: ``'digits'`` (1,797 images of 8x8 in scikit-learn; a fixed stratified fifth is the test part),
            ``'mnist'``, ``'fashion-mnist'`` (idx files) or ``'cifar10'`` (``data_batch_1.bin`` ... ``test_batch.bin``).
        data_dir: folder of the files, or one above it (torchvision's layout, too); None: the environment variable
            ``LAYERWISE_DATA``.
        split: ``'train'`` or ``'test'``.

    Raises:
        ValueError: unknown ``name`` or ``split``.
        DataError: files missing or damaged.
    """
    if name not in NAMES:
        raise ValueError(f"data is {name!r}; allowed: {', '.join(NAMES)}")
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; allowed: 'train', 'test'")
    if name == "digits":
        return _load_digits(split)
    folder = data_dir if data_dir is not None else os.environ.get(DATA_DIR_VARIABLE)
    if not folder:
        raise DataError(f"{name} is read from files: name their folder with --data-dir or {DATA_DIR_VARIABLE}")
    if name == "cifar10":
        return _load_cifar10(Path(folder), split)
    return _load_idx(Path(folder), IDX_FOLDERS[name], split)


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
