"""Where a network loses resolution: a list of positions, never a second network (Ma et al. 2020, arXiv 2010.08038).

A network is a row of units: the convolutions of a VGG, the stem and the blocks of a ResNet. A schedule names, from 0,
the units that work at half the resolution of the one before. Accelerated downsampling keeps the units, their widths and
the final resolution, and moves the positions towards the input. Which layers the paper chose is not public: reports
should give the schedule that was used (:attr:`StagedModel.downsampling`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

Schedule = str | Sequence[int]


def positions(schedule: Schedule, standard: Sequence[int], accelerated: Sequence[int], units: int) -> tuple[int, ...]:
    """The units that work at half the resolution of the one before.

    Args:
        schedule: ``'standard'``, ``'accelerated'``, or positions in ascending order.
        standard, accelerated: what the names stand for in this network.
        units: their number.

    Raises:
        ValueError: another name; positions out of order or out of range.
    """
    if isinstance(schedule, str):
        if schedule not in ("standard", "accelerated"):
            raise ValueError(
                f"downsampling is {schedule!r}; allowed: 'standard', 'accelerated', or a list of the units that work "
                f"at half the resolution of the one before, such as {list(standard)}"
            )
        return tuple(standard if schedule == "standard" else accelerated)
    chosen = tuple(map(operator.index, schedule))
    if not all(0 <= p < units for p in chosen) or sorted(set(chosen)) != list(chosen):
        raise ValueError(f"downsampling is {list(chosen)}; allowed: different ascending numbers from 0 to {units - 1}")
    return chosen


def one_earlier(standard: Sequence[int]) -> tuple[int, ...]:
    """Each position one unit earlier, where another position or the input does not stand in the way."""
    moved: list[int] = []
    for position in standard:
        moved.append(max(position - 1, 0, moved[-1] + 1 if moved else 0))
    return tuple(moved)
