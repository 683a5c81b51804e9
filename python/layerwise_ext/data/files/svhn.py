"""SVHN, format 2 (cropped digits): MATLAB files with ``X`` ``[32, 32, 3, N]`` and ``y`` ``[N, 1]``, where 10 is a 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from layerwise_ext.data.files.common import DataError, Split, check_counts, check_labels, find, to_split


def read_svhn(path: Path) -> Split:
    """One SVHN file; the label of the digit 0 becomes 0.

    Raises:
        DataError: scipy is not installed, or the file is damaged or not one of SVHN's.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f"{path}: MATLAB files are read by scipy: pip install 'layerwise_ext[data]'") from error
    try:
        content = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # loadmat has no error type of its own for a damaged file
        raise DataError(f"{path}: not a complete MATLAB file ({error}); copy it again") from error
    for name, expected in (("X", "uint8 [32, 32, 3, N]"), ("y", "integers [N, 1]")):
        array = content.get(name)
        if array is None:
            raise DataError(f"{path}: has no variable {name}; {expected} was expected")
        pixels = array.dtype == np.uint8 and array.ndim == 4 and array.shape[:3] == (32, 32, 3)
        labels = array.dtype.kind in "iu" and array.ndim == 2 and array.shape[1] == 1
        if not (pixels if name == "X" else labels):
            raise DataError(f"{path}: {name} is {array.dtype} {list(array.shape)}; {expected} was expected")
    images, labels = content["X"], content["y"][:, 0]
    check_counts(path, images.shape[3], path, len(labels))
    check_labels(path, labels, 1, 10)
    return to_split(images.transpose(3, 2, 0, 1), np.where(labels == 10, 0, labels))


def load_svhn(directory: Path, split: str) -> Split:
    return read_svhn(find(directory, [".", "svhn", "SVHN"], [f"{split}_32x32.mat"]))
