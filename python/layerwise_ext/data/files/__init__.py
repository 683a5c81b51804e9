"""Readers, one module per format. Nothing is unpickled; damaged files end in a DataError that names them."""

from __future__ import annotations

from layerwise_ext.data.files.cifar import read_cifar10, read_cifar100
from layerwise_ext.data.files.common import DataError, Split
from layerwise_ext.data.files.idx import read_idx
from layerwise_ext.data.files.images import image_folder_classes, read_image_folder, read_packed_images
from layerwise_ext.data.files.stl10 import read_stl10
from layerwise_ext.data.files.svhn import read_svhn

__all__ = [
    "DataError",
    "Split",
    "image_folder_classes",
    "read_cifar10",
    "read_cifar100",
    "read_idx",
    "read_image_folder",
    "read_packed_images",
    "read_stl10",
    "read_svhn",
]
