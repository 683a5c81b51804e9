"""The data sets by name: what they are, and where their files are looked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from layerwise_ext.data.files.cifar import load_cifar10, load_cifar100
from layerwise_ext.data.files.common import DataError, Split
from layerwise_ext.data.files.digits import load_digits
from layerwise_ext.data.files.idx import load_idx
from layerwise_ext.data.files.images import (
    image_folder_classes,
    load_cifar10_jpeg,
    load_image_folder,
    to_size,
    training_folder,
)
from layerwise_ext.data.files.stl10 import load_stl10
from layerwise_ext.data.files.svhn import load_svhn

DATA_DIR_VARIABLE = "LAYERWISE_DATA"


@dataclass(frozen=True)
class Info:
    """What a data set is.

    Attributes:
        num_classes: labels are 0 to ``num_classes - 1``.
        channels, image_size: of its images; ``image_size`` is ``(H, W)``.
        splits: what :func:`load` can read of it.
        crop_padding, flip: its usual augmentation, see :func:`standard_augment`.
    """

    num_classes: int
    channels: int
    image_size: tuple[int, int]
    splits: tuple[str, ...] = ("train", "test")
    crop_padding: int = 0
    flip: bool = False


# Augmentation as in the code of arXiv 1901.06656, which has none for KMNIST, SVHN and STL-10; digits: our own choice.
_INFO = {
    "digits": Info(10, 1, (8, 8), crop_padding=1),
    "mnist": Info(10, 1, (28, 28), crop_padding=2),
    "fashion-mnist": Info(10, 1, (28, 28), crop_padding=2, flip=True),
    "kmnist": Info(10, 1, (28, 28)),
    "cifar10": Info(10, 3, (32, 32), crop_padding=4, flip=True),
    "cifar10-jpeg": Info(10, 3, (32, 32), crop_padding=4, flip=True),
    "cifar100": Info(100, 3, (32, 32), crop_padding=4, flip=True),
    "cifar100-coarse": Info(20, 3, (32, 32), crop_padding=4, flip=True),
    "svhn": Info(10, 3, (32, 32), splits=("train", "test", "extra")),
    "stl10": Info(10, 3, (96, 96), splits=("train", "test", "unlabeled")),
}
IMAGE_FOLDER = "image-folder"
NAMES = (*_INFO, IMAGE_FOLDER)

# Their files have the same names, so a folder of the set's own comes before files that lie in data_dir itself.
IDX_FOLDERS = {
    "mnist": ["mnist", "MNIST", "MNIST/raw", "mnist/raw", "."],
    "fashion-mnist": ["fashion-mnist", "fashion_mnist", "FashionMNIST", "FashionMNIST/raw", "."],
    "kmnist": ["kmnist", "KMNIST", "KMNIST/raw", "."],
}


def _load_idx(name: str) -> Callable[[Path, str], Split]:
    return lambda directory, split: load_idx(directory, IDX_FOLDERS[name], split)


_LOAD: dict[str, Callable[[Path, str], Split]] = {
    **{name: _load_idx(name) for name in IDX_FOLDERS},
    "cifar10": load_cifar10,
    "cifar10-jpeg": load_cifar10_jpeg,
    "cifar100": load_cifar100,
    "cifar100-coarse": partial(load_cifar100, coarse=True),
    "svhn": load_svhn,
    "stl10": load_stl10,
}


def info(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
) -> Info:
    """Number of classes, channels, image size and usual augmentation of a data set, without reading its files.

    Args:
        name, data_dir, image_size: as for :func:`load`; only ``'image-folder'`` looks into ``data_dir``, for the names
            of its classes.

    Raises:
        ValueError: unknown ``name``, an ``image_size`` below 1 or where it is fixed, or none where it is not.
        DataError: (``'image-folder'``) folders that are missing.
    """
    if name not in NAMES:
        raise ValueError(f"data is {name!r}; allowed: {', '.join(NAMES)}")
    if name != IMAGE_FOLDER:
        if image_size is not None:
            height, width = _INFO[name].image_size
            raise ValueError(f"image_size is {image_size}, but images of {name} have {height}x{width}; leave it out")
        return _INFO[name]
    if image_size is None:
        raise ValueError(f"image_size is None; {name} needs the size that its images are given")
    size = to_size(image_size)
    classes = image_folder_classes(training_folder(_folder(name, data_dir)))
    return Info(len(classes), 3, size, crop_padding=min(size) // 8, flip=True)


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    *,
    image_size: int | tuple[int, int] | None = None,
) -> Split:
    """A data set's training or test part, from local files.

    Args:
        name: ``'digits'`` (1,797 images of 8x8 in scikit-learn; a fixed stratified fifth is the test part),
            ``'mnist'``, ``'fashion-mnist'``, ``'kmnist'`` (idx files), ``'cifar10'``, ``'cifar100'``,
            ``'cifar100-coarse'`` (the official binary files, the last with the 20 coarse labels), ``'cifar10-jpeg'``
            (``cifar10_jpeg_train.npz``, see :func:`read_packed_images`), ``'svhn'``, ``'stl10'`` or
            ``'image-folder'`` (``train/CLASS/*``, ``test/CLASS/*`` or ``val/CLASS/*``, see :func:`read_image_folder`).
        data_dir: folder of the files, or one above it (torchvision's layout, too); None: the environment variable
            ``LAYERWISE_DATA``.
        split: ``'train'`` or ``'test'``; for SVHN also ``'extra'``, for STL-10 ``'unlabeled'``, whose labels are -1.
        image_size: (``'image-folder'`` only) what images are resized to: one number, or ``(H, W)``.

    Raises:
        ValueError: unknown ``name`` or ``split``, or an ``image_size`` that does not belong there or is missing.
        DataError: files missing or damaged.
    """
    known = info(name, data_dir, image_size=image_size)
    if split not in known.splits:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(map(repr, known.splits))}")
    if name == "digits":
        return load_digits(split)
    folder = _folder(name, data_dir)
    if name == IMAGE_FOLDER:
        return load_image_folder(folder, split, known.image_size)
    return _LOAD[name](folder, split)


def _folder(name: str, data_dir: str | os.PathLike[str] | None) -> Path:
    folder = data_dir if data_dir is not None else os.environ.get(DATA_DIR_VARIABLE)
    if not folder:
        raise DataError(f"{name} is read from files: name their folder with --data-dir or {DATA_DIR_VARIABLE}")
    return Path(folder)
