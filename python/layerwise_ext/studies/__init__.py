"""Studies: the questions that people ask about layer-wise training, answered with runs, a table, plots and a report."""

from __future__ import annotations

from layerwise_ext.studies.layerwise import Layerwise
from layerwise_ext.studies.pretraining import Pretraining
from layerwise_ext.studies.runner import run
from layerwise_ext.studies.scaling import Scaling
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
from layerwise_ext.studies.trainability import Trainability

# The studies by name, in the order of the questions.
NAMES: dict[str, type[Study]] = {study.name: study for study in (Layerwise, Trainability, Pretraining, Scaling)}

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
    "run",
]
