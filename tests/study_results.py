"""Results that nobody measured, for tests of findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerwise_ext.studies import Cell, Results, Run


def made_up(cells: Sequence[Cell], values: Mapping[str, Sequence[Mapping[str, Any]]], **options: Any) -> Results:
    """``values`` by name of the cell, an entry per seed."""
    trained = [cell for cell in cells if cell.trained]
    runs = [Run(cell.name, seed, 1, 1.0, of) for cell in trained for seed, of in enumerate(values[cell.name])]
    return Results(cells, runs, **{"test_images": 1000, **options})
