"""Fetching data sets, on request only, by torchvision."""

from __future__ import annotations

import os
from pathlib import Path

from layerwise_ext.data.files import DataError

# torchvision's own CIFAR classes fetch the pickled files; the readers here take the binary ones, of the same site.
_CIFAR = {
    "cifar10": ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
    "cifar100-coarse": ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
}
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "svhn": "SVHN", "stl10": "STL10"}
DOWNLOADS = (*_TORCHVISION, *_CIFAR)


def download(name: str, directory: str | os.PathLike[str]) -> None:
    """Fetch a data set into ``directory``, from which :func:`load` reads it; files that are there already are kept.

    Nothing else in this package uses the network. torchvision knows the addresses and checks the files; of SVHN,
    ``'extra'`` is left out. The data sets' own terms apply.

    Raises:
        ValueError: a ``name`` that cannot be fetched.
        DataError: torchvision is not installed, or the download failed.
    """
    if name not in DOWNLOADS:
        raise ValueError(f"data is {name!r}; allowed: {', '.join(DOWNLOADS)}")
    try:
        from torchvision import datasets
        from torchvision.datasets.utils import download_and_extract_archive
    except ImportError as error:
        raise DataError(f"{name} is fetched by torchvision, which is not installed; see docs/data.md") from error
    folder = Path(directory)
    try:
        if name in _CIFAR:
            file, md5 = _CIFAR[name]
            url = f"https://www.cs.toronto.edu/~kriz/{file}"
            download_and_extract_archive(url, str(folder), md5=md5)
        elif name in ("svhn", "stl10"):
            for split in ("train", "test"):
                getattr(datasets, _TORCHVISION[name])(str(folder), split=split, download=True)
        else:
            getattr(datasets, _TORCHVISION[name])(str(folder), download=True)
    except (ImportError, OSError, RuntimeError) as error:  # torchvision imports SciPy for some
        raise DataError(f"{name} could not be fetched into {folder} ({error})") from error
