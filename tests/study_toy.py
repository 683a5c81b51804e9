"""A study that trains nothing, and its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from layerwise_ext import data, studies
from layerwise_ext.studies import runner
from layerwise_ext.studies.study import Cell, Figure, Finding, Results, Study, Table, Task


class Toy(Study):
    """Cells ``a`` and ``b``; a run takes as many seconds of the clock as its cell costs, per epoch of 100 images."""

    name = "toy"
    title = "A <b>toy</b> & its title"
    question = "Is a better than b?"
    default_epochs = 4
    max_epochs = 9

    def __init__(self, fail_at: int | None = None, *, draws: bool = False) -> None:
        self.costs = {"a": 1.0, "b": 2.0}
        self.now = 0.0
        self.fail_at = fail_at
        self.draws = draws
        self.ran: list[tuple[str, int, int, int]] = []  # cell, seed, epochs, images

    def clock(self) -> float:
        return self.now

    def cells(self, task: Task) -> list[Cell]:
        return [Cell("a", {"number": 1}), Cell("b", {"number": 2}), Cell("only-measured", trained=False)]

    def run(self, task: Task, cell: Cell, seed: int, epochs: int) -> dict[str, Any]:
        if len(self.ran) == self.fail_at:
            raise KeyboardInterrupt
        images = len(task.train.labels)
        self.ran.append((cell.name, seed, epochs, images))
        self.now += self.costs[cell.name] * epochs * images / 100
        drawn = float(torch.rand(()))  # of the global generator, which the runner seeds
        return {"accuracy": 0.5 + 0.1 * cell.options["number"] + 0.01 * seed, "drawn": drawn, "layers": [1, 2 + seed]}

    def setup(self, task: Task) -> dict[str, str]:
        return {"network": "none & <none>"}

    def table(self, results: Results) -> Table:
        rows = [[cell.name, results.summary(cell, "accuracy").text(100)] for cell in results.cells if cell.trained]
        return Table(["cell", "accuracy | %"], rows, "A caption.")

    def figures(self, results: Results) -> list[Figure]:
        line = Figure("line", 'The "title"', "A line.", lambda figure: figure.subplots().plot([1, 2]))
        return [line] if self.draws else []

    def findings(self, results: Results) -> list[Finding]:
        return [studies.compare(results, "b", "a"), Finding("<script>alert(1)</script>", False)]


def task(images: int = 1000) -> Task:
    split = data.Split(torch.zeros(images, 1, 4, 4, dtype=torch.uint8), torch.arange(images) % 10)
    return Task("digits", split, split, data.Normalization.of(split.images), 10)


def run(toy: Toy, folder: Path, **options: Any) -> tuple[Results, list[str]]:
    lines: list[str] = []
    results = runner.run(toy, options.pop("task", task()), folder, clock=toy.clock, say=lines.append, **options)
    return results, lines


def ran(toy: Toy) -> list[tuple[str, int]]:
    return [(cell, seed) for cell, seed, _, _ in toy.ran]
