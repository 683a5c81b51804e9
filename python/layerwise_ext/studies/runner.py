"""Runs a study: chooses its length, trains seed after seed, and writes what came of it."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from layerwise_ext.studies import measure, report
from layerwise_ext.studies.facts import machine
from layerwise_ext.studies.folder import Folder, Plan
from layerwise_ext.studies.study import Cell, Results, Run, Study, Task

DEFAULT_SEEDS = 3
# More time is not turned into more of them than this, unless the user asks for it.
MAX_SEEDS = 10
# Images that each cell trains on for the estimate of its time.
TIMED_IMAGES = 512
# How much longer than its budget a study may take before it leaves out a seed.
TOLERANCE = 1.1


def run(
    study: Study,
    task: Task,
    output: str | Path,
    *,
    epochs: int | None = None,
    seeds: int | None = None,
    budget: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = print,
) -> Results:
    """Run a study, or go on with it, and write its table, figures and report.

    Seed 0 of all cells comes first, then seed 1, ...: what there is at any time compares all cells. Each finished run
    is in the folder, so that a study that was killed goes on with the same call, and a call with more seeds or minutes
    extends it.

    Args:
        study: what to run.
        task: what on.
        output: folder of the study.
        epochs: of each run; None: what ``budget`` allows, otherwise those of the folder or the study's own number.
        seeds: how many; None: 3, or what ``budget`` allows.
        budget: minutes for everything that is timed and trained; a folder that has its epochs gets the seeds that fit.
        clock: in seconds.
        say: shows a line of progress.

    Raises:
        ValueError: numbers below 1; all three of them; a ``budget`` that is too small for one epoch of everything; a
            folder of another study, or with other epochs.
    """
    for name, value in (("epochs", epochs), ("seeds", seeds)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; allowed: 1 or more")
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"budget is {budget}; allowed: a positive number of minutes")
    if budget is not None and epochs is not None and seeds is not None:
        raise ValueError(f"epochs {epochs} and seeds {seeds} leave nothing for budget to choose; leave one of them out")
    cells = study.cells(task)
    _check_names(cells)
    folder = Folder(Path(output), _settings(study, task))
    if folder.plan is not None and epochs not in (None, folder.plan.epochs):
        raise ValueError(
            f"epochs is {epochs}, but the study in {output} has {folder.plan.epochs}; name another folder with --output"
        )
    facts, start = machine(task), clock()
    if folder.measured is None:
        folder.add_machine(facts)
        with _seeded(task, 0):
            folder.measured = measure.steps(study, task, cells, say=say) | {"seconds": clock() - start}
    trained = [cell for cell in cells if cell.trained]
    folder.plan = plan = _plan(study, task, folder, trained, epochs, seeds, budget, start, clock, say)
    _train(study, task, folder, trained, plan, facts, clock, say)
    runs = [run for run in folder.runs() if run.cell in {cell.name for cell in trained}]
    results = Results(cells, runs, (folder.measured or {})["cells"], len(task.test.labels), task.num_classes)
    complete = [run for run in runs if run.seed in results.seeds]  # others are of a seed that was left out after all
    results = dataclasses.replace(results, runs=complete)
    report.write(study, task, folder, results, command(study, task, plan, output))
    say(f"written to {folder.path}; open {folder.path / 'report.html'}")
    return results


def command(study: Study, task: Task, plan: Plan, output: str | Path) -> str:
    """The command line that does the same again."""
    parts = ["layerwise-ext", "study", study.name, "--data", task.name]
    if task.name != "digits":
        parts += ["--data-dir", "DIR"]
    if task.limit_train is not None:
        parts += ["--limit-train", str(task.limit_train)]
    parts += ["--epochs", str(plan.epochs), "--seeds", str(plan.seeds), "--threads", str(task.threads)]
    parts += ["--device", str(task.device), *(["--quick"] if task.quick else []), "--output", str(output)]
    return shlex.join(parts)


def _check_names(cells: Sequence[Cell]) -> None:
    names = [cell.name for cell in cells]
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII) or names.count(name) > 1:
            raise ValueError(f"a cell has the name {name!r}; allowed: letters, digits, - _ and ., each name once")


def _settings(study: Study, task: Task) -> dict[str, str | int | bool | None]:
    return {
        "study": study.name,
        "data": task.name,
        "limit_train": task.limit_train,
        "train_images": len(task.train.labels),
        "threads": task.threads,
        "device": str(task.device),
        "quick": task.quick,
    }


# -- How long ----------------------------------------------------------------------------------------------------------


def _plan(
    study: Study,
    task: Task,
    folder: Folder,
    cells: Sequence[Cell],
    epochs: int | None,
    seeds: int | None,
    budget: float | None,
    start: float,
    clock: Callable[[], float],
    say: Callable[[str], None],
) -> Plan:
    before = folder.plan
    if before is not None:
        return _extended(before, folder, len(cells), seeds, budget, say)
    if budget is None:
        own = 1 if task.quick else study.default_epochs
        usual = 1 if task.quick else DEFAULT_SEEDS
        plan = Plan(epochs or own, seeds or usual, None, seeds is not None)
        say(f"{len(cells)} cells, {_many(plan.epochs, 'epoch')}, {_many(plan.seeds, 'seed')}")
        return plan
    say(f"timing {len(cells)} cells")
    seconds = sum(seconds_per_epoch(study, task, cells, clock).values())
    left = 60 * budget - (clock() - start)
    chosen = choose(seconds, left, epochs, seeds, study.max_epochs)
    if chosen is None:
        needed = (clock() - start + seconds * (epochs or 1) * (seeds or 1)) / 60
        raise ValueError(
            f"budget is {budget:g} minutes; {_many(epochs or 1, 'epoch')} of all {len(cells)} cells with "
            f"{_many(seeds or 1, 'seed')} takes about {needed:.1f}: allow more, or fewer images with --limit-train"
        )
    plan = Plan(*chosen, budget, seeds is not None)
    about = plan.epochs * plan.seeds * seconds / 60
    say(
        f"{len(cells)} cells, {_many(plan.epochs, 'epoch')}, {_many(plan.seeds, 'seed')}: about {about:.1f} minutes of "
        f"training in a budget of {budget:g}"
    )
    return plan


def seconds_per_epoch(
    study: Study, task: Task, cells: Sequence[Cell], clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """An estimate for each cell, from one epoch on a few images; one run before that warms up.

    From a cell with processes the time of a run on very few images is taken away first: that of their start.
    """
    part, few = task.part(TIMED_IMAGES), task.part(study.batch_size)
    seconds = {}
    _run(study, part, cells[0], 0, 1)
    for cell in cells:
        before = clock()
        if cell.has_processes:
            _run(study, few, cell, 0, 1)
        start = clock()
        _run(study, part, cell, 0, 1)
        images = len(part.train.labels) - (len(few.train.labels) if cell.has_processes else 0)
        elapsed = (clock() - start) - (start - before)
        seconds[cell.name] = max(0.0, elapsed) * len(task.train.labels) / max(1, images)
    return seconds


def choose(
    seconds: float, left: float, epochs: int | None, seeds: int | None, max_epochs: int
) -> tuple[int, int] | None:
    """Epochs and seeds that fit into what is left, or None.

    Three seeds come before more epochs, one epoch before more seeds.

    Args:
        seconds: of one epoch with one seed of all cells.
        left: seconds.
        epochs, seeds: where the user chose them.
        max_epochs: of the study.
    """
    units = int(left / max(seconds, 1e-9))  # epochs * seeds
    for count in [seeds] if seeds is not None else range(DEFAULT_SEEDS, 0, -1):
        fitting = min(units // count, max_epochs) if epochs is None else epochs
        if fitting >= 1 and fitting * count <= units:
            return fitting, count
    return None


def _extended(
    before: Plan, folder: Folder, cells: int, seeds: int | None, budget: float | None, say: Callable[[str], None]
) -> Plan:
    """The plan of a folder, with the seeds that are asked for or that more minutes allow."""
    plan = before
    if seeds is not None:
        plan = Plan(before.epochs, seeds, budget, fixed_seeds=True)
    elif budget is not None and budget != before.budget:
        runs = folder.runs()
        per_seed = cells * sum(run.seconds for run in runs) / max(1, len(runs))
        if runs:
            left = 60 * budget - (folder.measured or {}).get("seconds", 0.0)
            plan = Plan(before.epochs, min(MAX_SEEDS, max(1, int(left / max(per_seed, 1e-9)))), budget)
    done = len(folder.runs())
    plan = Plan(plan.epochs, max(plan.seeds, -(-done // cells)), plan.budget, plan.fixed_seeds)
    say(f"going on: {done} of {cells * plan.seeds} runs are done, {_many(plan.epochs, 'epoch')} each")
    return plan


# -- Training ----------------------------------------------------------------------------------------------------------


def _train(
    study: Study,
    task: Task,
    folder: Folder,
    cells: Sequence[Cell],
    plan: Plan,
    facts: Mapping[str, str],
    clock: Callable[[], float],
    say: Callable[[str], None],
) -> None:
    done = {(run.cell, run.seed): run.seconds for run in folder.runs()}
    total = len(cells) * plan.seeds
    for seed in range(plan.seeds):
        missing = [cell for cell in cells if (cell.name, seed) not in done]
        spent = (folder.measured or {}).get("seconds", 0.0) + sum(done.values())
        if missing and seed > 0 and plan.budget is not None and not plan.fixed_seeds:
            expected = spent + _seconds_left(missing, seed + 1, done)
            if expected > TOLERANCE * 60 * plan.budget:
                say(f"seed {seed} is left out: with it the study would take {expected / 60:.1f} minutes")
                return
        for cell in missing:
            start = clock()
            values = _run(study, task, cell, seed, plan.epochs)
            finished = Run(cell.name, seed, plan.epochs, clock() - start, values)
            folder.add_machine(facts)
            folder.add_run(finished)
            done[cell.name, seed] = finished.seconds
            accuracy = values.get("accuracy")
            shown = f", accuracy {accuracy:.4f}" if isinstance(accuracy, float) else ""
            left = ""
            if len(done) < total and len({name for name, _ in done}) == len(cells):
                left = f"; about {_seconds_left(cells, plan.seeds, done) / 60:.1f} minutes left"
            say(f"[{len(done)}/{total}] {cell.name}, seed {seed}: {finished.seconds:.1f} s{shown}{left}")


def _seconds_left(cells: Sequence[Cell], seeds: int, done: Mapping[tuple[str, int], float]) -> float:
    """Of the runs up to ``seeds`` that are not done, from the mean of those of the same cell."""
    total = 0.0
    for cell in cells:
        own = [seconds for (name, _), seconds in done.items() if name == cell.name]
        missing = sum((cell.name, seed) not in done for seed in range(seeds))
        total += missing * sum(own) / max(1, len(own))
    return total


def _run(study: Study, task: Task, cell: Cell, seed: int, epochs: int) -> dict[str, Any]:
    with _seeded(task, seed), _quiet():
        return study.run(task, cell, seed, epochs)


@contextmanager
def _seeded(task: Task, seed: int) -> Iterator[None]:
    """torch's global generators begin with the seed, and are put back."""
    with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the trainers' warnings of losses and collapses, which are results here."""
    logger = logging.getLogger("layerwise_ext.train")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _many(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
