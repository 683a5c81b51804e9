"""Image files (JPEG, PNG, ...), decoded by Pillow: folders of them by class, and many of them in one npz file."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from pathlib import Path

import numpy as np
import torch

from layerwise_ext.data.files.common import DataError, Split, check_counts, check_folder, check_labels, find

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def decode(source: Path | io.BytesIO, name: str, size: tuple[int, int] | None = None, channels: int = 3) -> np.ndarray:
    """One image as uint8 ``[H, W, channels]``: RGB, or grey for one channel.

    With ``size`` ``(H, W)``, the largest central part of its proportions, resized with an antialiased bilinear filter.

    Raises:
        DataError: Pillow is not installed, or cannot decode the image, which is called ``name`` then; more than 8 bits
            per channel.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError("images are decoded by Pillow: pip install 'layerwise_ext[data]'") from error
    try:
        with Image.open(source) as file:
            if file.mode.startswith(("I", "F")):  # convert would clip them
                raise DataError(f"{name}: its mode is {file.mode}; images of 8 bits per channel are read")
            image = file.convert("RGB" if channels == 3 else "L")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: not a complete image ({error})") from error
    if size is not None and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _decode_all(count: int, shape: tuple[int, int, int], decode_one: Callable[[int], np.ndarray]) -> torch.Tensor:
    """uint8 ``[count, C, H, W]``, channels_last, of images ``[H, W, C]``; Pillow decodes in several threads."""
    images = np.empty((count, *shape), np.uint8)

    def fill(index: int) -> None:
        images[index] = decode_one(index)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, range(count)):
            pass
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def to_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """``(H, W)``, from one number for squares."""
    size = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    if len(size) != 2 or not all(isinstance(n, Integral) and n >= 1 for n in size):
        raise ValueError(f"image_size is {image_size}; allowed: 1 or more pixels, or (H, W) of such numbers")
    return int(size[0]), int(size[1])


# -- Folders -----------------------------------------------------------------------------------------------------------


def image_folder_classes(directory: Path) -> tuple[str, ...]:
    """Names of the sub-folders, sorted: label k is the k-th of them.

    Raises:
        DataError: no such folder, or no sub-folders.
    """
    check_folder(directory)
    classes = tuple(sorted(p.name for p in directory.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not classes:
        raise DataError(f"{directory}: no class folders; one folder of images for each class was expected")
    return classes


def read_image_folder(
    directory: Path,
    image_size: int | tuple[int, int],
    *,
    classes: Sequence[str] | None = None,
    channels: int = 3,
    limit_bytes: int | None = None,
) -> Split:
    """A folder with one folder of images per class, decoded into memory.

    Images are cut to the proportions of ``image_size`` around their centre and resized (bilinear, antialiased). They
    are taken in the order of their class and path.

    Args:
        directory: the folder above the class folders, in which images may lie at any depth; files whose names do not
            end as those of images do are left out.
        image_size: one number for squares, or ``(H, W)``, in pixels.
        classes: the names that labels count; None: :func:`image_folder_classes`. A class may be without a folder.
        channels: 3, or 1 for grey.
        limit_bytes: refuse to take more memory than this; None: half of the machine's.

    Raises:
        ValueError: ``image_size`` below 1, ``channels`` that are neither 1 nor 3.
        DataError: no class folders, one that is not in ``classes`` or has no images, an image that cannot be decoded,
            more images than fit.
    """
    size = to_size(image_size)
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; allowed: 1, 3")
    found = image_folder_classes(directory)
    known = found if classes is None else tuple(classes)
    paths: list[Path] = []
    labels: list[int] = []
    for name in found:
        if name not in known:
            raise DataError(f"{directory / name}: not one of the {len(known)} classes, which are {_some(known)}")
        images = sorted(p for p in (directory / name).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not images:
            raise DataError(f"{directory / name}: no images; files named {', '.join(SUFFIXES)} were expected")
        paths += images
        labels += [known.index(name)] * len(images)
    needed = len(paths) * channels * size[0] * size[1]
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if limit_bytes is None else limit_bytes
    if needed > limit:
        raise DataError(
            f"{directory}: {len(paths)} images of {channels}x{size[0]}x{size[1]} take {needed / 2**20:.1f} MiB, "
            f"limit_bytes is {limit / 2**20:.1f} MiB; choose a smaller image_size"
        )
    images_tensor = _decode_all(
        len(paths), (*size, channels), lambda i: decode(paths[i], str(paths[i]), size, channels)
    )
    return Split(images_tensor, torch.tensor(labels))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 10 else f"{', '.join(names[:9])}, ... {names[-1]}"


def training_folder(directory: Path) -> Path:
    """The folder ``train`` in ``directory``, whose class folders name the classes."""
    check_folder(directory)
    if not (directory / "train").is_dir():
        raise DataError(f"{directory}: no folder train; train and test, each with a folder per class, were expected")
    return directory / "train"


def load_image_folder(directory: Path, split: str, image_size: int | tuple[int, int]) -> Split:
    classes = image_folder_classes(training_folder(directory))
    names = ["train"] if split == "train" else ["test", "val"]
    for name in names:
        if (directory / name).is_dir():
            return read_image_folder(directory / name, image_size, classes=classes)
    raise DataError(f"{directory}: no folder {' or '.join(names)}, with a folder of images per class, for the tests")


# -- npz files ---------------------------------------------------------------------------------------------------------


def read_packed_images(path: Path, image_size: tuple[int, int], num_classes: int) -> Split:
    """Image files end to end in an npz file: RGB images of one size.

    The file has ``jpeg`` uint8 ``[bytes]``, ``offsets`` (integers ``[N + 1]``; image k is ``jpeg[offsets[k] :
    offsets[k + 1]]``) and ``labels`` (integers ``[N]``).

    Raises:
        DataError: a damaged file, an array that does not fit, a label out of range, an image of another size.
    """
    try:
        with np.load(path) as file:
            jpeg, offsets, labels = (file[name] for name in ("jpeg", "offsets", "labels"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a complete npz file of jpeg, offsets and labels ({error})") from error
    for name, array in (("jpeg", jpeg), ("offsets", offsets), ("labels", labels)):
        fits = array.dtype == np.uint8 if name == "jpeg" else array.dtype.kind in "iu"
        if array.ndim != 1 or array.size == 0 or not fits:
            expected = "uint8 [bytes]" if name == "jpeg" else "integers [N]"
            raise DataError(f"{path}: {name} is {array.dtype} {list(array.shape)}; {expected} was expected")
    check_counts(path, len(offsets) - 1, path, len(labels))
    if offsets[0] != 0 or offsets[-1] != len(jpeg) or (np.diff(offsets.astype(np.int64)) <= 0).any():
        raise DataError(f"{path}: offsets do not ascend from 0 to {len(jpeg)}, the number of bytes in jpeg")
    check_labels(path, labels, 0, num_classes - 1)

    def decode_one(index: int) -> np.ndarray:
        name = f"{path}, image {index}"
        image = decode(io.BytesIO(jpeg[offsets[index] : offsets[index + 1]].tobytes()), name)
        if image.shape[:2] != image_size:
            raise DataError(f"{name}: {image.shape[0]}x{image.shape[1]}; {image_size[0]}x{image_size[1]} was expected")
        return image

    images = _decode_all(len(labels), (*image_size, 3), decode_one)
    return Split(images, torch.from_numpy(labels.astype(np.int64)))


def load_cifar10_jpeg(directory: Path, split: str) -> Split:
    return read_packed_images(find(directory, ["."], [f"cifar10_jpeg_{split}.npz"]), (32, 32), 10)
