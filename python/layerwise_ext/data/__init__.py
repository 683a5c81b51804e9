"""Image data sets from local files, and a loader that keeps them in memory.

:func:`load` reads a data set by name, :func:`info` says what it is, :mod:`layerwise_ext.data.files` has a reader for
each format. :class:`MemoryLoader` makes batches, with :class:`Augment` changed at random, of a few classes each where
they are asked for; :func:`subset` takes a few images of each class, :func:`hold_out` takes out a share of each. Nothing
is unpickled, and only :func:`download` uses the network.
"""

from __future__ import annotations

from layerwise_ext.data.augment import Augment, Cutout, RandomCrop, RandomFlip, standard_augment
from layerwise_ext.data.download import download
from layerwise_ext.data.files import (
    DataError,
    Split,
    image_folder_classes,
    read_cifar10,
    read_cifar100,
    read_idx,
    read_image_folder,
    read_packed_images,
    read_stl10,
    read_svhn,
)
from layerwise_ext.data.loader import MemoryLoader, Normalization
from layerwise_ext.data.sampler import ClassBatchSampler
from layerwise_ext.data.sets import DATA_DIR_VARIABLE, NAMES, Info, info, load
from layerwise_ext.data.subset import hold_out, subset

__all__ = [
    "DATA_DIR_VARIABLE",
    "NAMES",
    "Augment",
    "ClassBatchSampler",
    "Cutout",
    "DataError",
    "Info",
    "MemoryLoader",
    "Normalization",
    "RandomCrop",
    "RandomFlip",
    "Split",
    "download",
    "hold_out",
    "image_folder_classes",
    "info",
    "load",
    "read_cifar10",
    "read_cifar100",
    "read_idx",
    "read_image_folder",
    "read_packed_images",
    "read_stl10",
    "read_svhn",
    "standard_augment",
    "subset",
]
