"""Words of the findings."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise_ext.studies.study import Summary


def points(difference: Summary) -> str:
    """A difference of accuracies, with half of its spread where there is one: '+1.2 ± 0.4 points'."""
    sign = "+" if difference.mean >= 0 else ""
    return f"{sign}{difference.text(100)} points"


def listed(items: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
