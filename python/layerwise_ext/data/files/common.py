"""What all readers share: errors, bytes, places to look in, checks of labels."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class DataError(Exception):
    """A file that is missing, truncated or not what it should be; the message names it and says what was expected."""


class Split(NamedTuple):
    """``images`` uint8 ``[N, C, H, W]`` and ``labels`` int64 ``[N]``; -1 where an image has none."""

    images: Tensor
    labels: Tensor


def read(path: Path) -> bytes:
    """The content of a file, unpacked where its name ends in .gz."""
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a complete gzip file ({error}); copy it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_records(path: Path, size: int) -> np.ndarray:
    """A file of records of ``size`` bytes, as uint8 ``[N, size]``."""
    content = np.frombuffer(read(path), np.uint8)
    if len(content) == 0 or len(content) % size != 0:
        raise DataError(f"{path}: {len(content)} bytes, not a positive multiple of {size}, the size of a record")
    return content.reshape(-1, size)


def check_folder(directory: Path) -> None:
    if not directory.is_dir():
        raise DataError(f"{directory}: no such folder")


def find(directory: Path, folders: Sequence[str], names: Sequence[str]) -> Path:
    """The first of the files ``names`` in the first of the sub-folders that has one."""
    check_folder(directory)
    for folder in folders:
        for name in names:
            if (directory / folder / name).is_file():
                return directory / folder / name
    places = ", ".join(str(directory / folder) for folder in folders)
    raise DataError(f"{names[0]} was not found; looked for {' and '.join(names)} in: {places}")


def check_labels(path: Path, labels: np.ndarray, first: int, last: int) -> None:
    """``labels`` ``[N]`` as the file has them, which may count from 1."""
    wrong = np.flatnonzero((labels < first) | (labels > last))
    if wrong.size:
        index = int(wrong[0])
        raise DataError(f"{path}: label {labels[index]} of image {index}; labels are {first} to {last}")


def check_counts(image_path: Path, images: int, label_path: Path, labels: int) -> None:
    if images != labels:
        raise DataError(f"{image_path}: {images} images, but {label_path} has {labels} labels")
    if images == 0:
        raise DataError(f"{image_path}: no images")


def to_split(images: np.ndarray, labels: np.ndarray) -> Split:
    """uint8 ``[N, C, H, W]`` and integers ``[N]``, copied out of the files' bytes."""
    return Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))
