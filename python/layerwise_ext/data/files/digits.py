"""scikit-learn's digits, which come with it."""

from __future__ import annotations

import numpy as np

from layerwise_ext.data.files.common import DataError, Split, to_split


def load_digits(split: str) -> Split:
    """1,797 images of 8x8; a fixed stratified fifth is the test part."""
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("the digits data set comes with scikit-learn: pip install 'layerwise_ext[cli]'") from error
    digits = datasets.load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)[:, None]  # 17 grey levels
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
    chosen = np.sort(train if split == "train" else test)
    return to_split(images[chosen], digits.target[chosen])
