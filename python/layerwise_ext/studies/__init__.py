"""Studies: the questions that people ask about layer-wise training, answered with runs, a table, plots and a report."""

from __future__ import annotations

from layerwise_ext.studies.study import (
    Cell,
    Figure,
    Finding,
    Results,
    Run,
    Study,
    Summary,
    Table,
    Task,
    compare,
    compare_steps,
)

# The studies by name, in the order of the questions.
NAMES: dict[str, type[Study]] = {}

__all__ = [
    "NAMES",
    "Cell",
    "Figure",
    "Finding",
    "Results",
    "Run",
    "Study",
    "Summary",
    "Table",
    "Task",
    "compare",
    "compare_steps",
]
