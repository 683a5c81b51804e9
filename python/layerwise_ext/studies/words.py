"""Words of the findings."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise_ext import data
from layerwise_ext.studies.study import Summary


def points(difference: Summary) -> str:
    """A difference of accuracies, with half of its spread where there is one: '+1.2 ± 0.4 points'."""
    sign = "+" if difference.mean >= 0 else ""
    return f"{sign}{difference.text(100)} points"


def listed(items: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def augmentation(name: str) -> str:
    """The usual one of a data set: 'random crops (padding 4) and flips'."""
    usual = data.standard_augment(data.info(name))
    kinds = [f"random crops (padding {usual.crop_padding})"] * bool(usual.crop_padding) + ["flips"] * usual.flip
    return listed(kinds) if kinds else "no augmentation"
