"""What a study leaves in its folder: results.csv, table.md, plots, report.html and report.md."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from layerwise_ext import checkpoint
from layerwise_ext.studies import plots
from layerwise_ext.studies.folder import Folder
from layerwise_ext.studies.study import Finding, Results, Study, Table, Task


def write(study: Study, task: Task, folder: Folder, results: Results, command: str) -> None:
    """Write all of it; every file is replaced as a whole."""
    write_results(folder.path / "results.csv", results)
    table = study.table(results)
    checkpoint.write_text(folder.path / "table.md", markdown(table))
    figures = study.figures(results)
    pictures = folder.path / "plots"
    pictures.mkdir(exist_ok=True)
    for figure in figures:
        plots.save(figure, pictures)
    images = [
        {
            "name": figure.name,
            "title": figure.title,
            "alt": figure.alt,
            "source": data_uri(pictures / f"{figure.name}.svg"),
        }
        for figure in figures
    ]
    findings = [*_about_seeds(results), *study.findings(results)]
    context = {
        "title": study.title,
        "data": task.name,
        "question": study.question,
        "found": [finding.text for finding in findings if finding.found],
        "not_found": [finding.text for finding in findings if not finding.found],
        "figures": images,
        "setup": setup(study, task, folder, results),
        "machines": folder.machines,
        "command": command,
    }
    checkpoint.write_text(folder.path / "report.html", render("report.html", table=table, **context))
    checkpoint.write_text(folder.path / "report.md", render("report.md", table=markdown(table), **context))


def render(name: str, **context: Any) -> str:
    """The report as ``report.html``, which needs no other file, or as ``report.md`` beside the plots."""
    import jinja2

    is_html = name.endswith(".html")
    environment = jinja2.Environment(
        autoescape=is_html,
        finalize=None if is_html else lambda text: str(text).replace("<", "&lt;"),  # tags are tags in Markdown, too
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    source = resources.files(__package__).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(**context)


def setup(study: Study, task: Task, folder: Folder, results: Results) -> dict[str, str]:
    """Names and values of what a reader has to know to repeat the study."""
    channels, height, width = task.image_shape
    plan = folder.plan
    assert plan is not None
    measured = folder.measured or {}
    is_measured = bool(measured.get("cells"))
    training, measuring = sum(run.seconds for run in results.runs), measured.get("seconds", 0.0)
    seeds = ", ".join(map(str, results.seeds)) or "none that all cells have"
    facts = {
        "data": f"{task.name}: {len(task.train.labels)} training and {len(task.test.labels)} test images of "
        f"{channels}x{height}x{width}, {task.num_classes} classes",
        **study.setup(task),
        "batch size": str(study.batch_size) + (f"; measured steps {study.step_batch(task)}" if is_measured else ""),
        "epochs": str(plan.epochs),
        "seeds": seeds,
        "length": "as given" if plan.budget is None else f"chosen for a budget of {plan.budget:g} minutes",
        "wall time": f"{duration(training)} for {len(results.runs)} runs, {duration(measuring)} for measuring steps",
        "spread": "± is half of the spread, which is the largest minus the smallest value over seeds. A difference "
        "counts as found where it is larger than the spread of either side or, where it is taken seed by seed, than "
        "its own. With few seeds and many comparisons a difference can be found by chance, and all of them are about "
        "this one set of test images.",
    }
    if measured.get("note"):
        facts["memory"] = f"not measured: {measured['note']}"
    return facts


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def write_results(path: Path, results: Results) -> None:
    """One row per run; lists as JSON."""
    options = list(dict.fromkeys(name for cell in results.cells for name in cell.options))
    keys = list(dict.fromkeys(key for run in results.runs for key in run.values))
    of_cells = {cell.name: cell.options for cell in results.cells}
    with checkpoint.replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", *options, "seed", "epochs", "seconds", *keys])
        for run in results.runs:
            own: Mapping[str, Any] = of_cells[run.cell]
            row = [run.cell, *(own.get(name) for name in options), run.seed, run.epochs, round(run.seconds, 3)]
            writer.writerow([*map(_text, row), *(_text(run.values.get(key)) for key in keys)])


def _text(value: Any) -> str:
    return "" if value is None else json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def markdown(table: Table) -> str:
    """As a Markdown table with its caption."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    ruler = "| --- |" + " ---: |" * (len(table.header) - 1)
    lines = [line(table.header), ruler, *map(line, table.rows)]
    return "\n".join(lines) + (f"\n\n{table.caption}\n" if table.caption else "\n")


def data_uri(svg: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode("ascii")


def _about_seeds(results: Results) -> list[Finding]:
    if len(results.seeds) == 1:
        text = "Everything was trained with one seed: there is no spread, so no difference in accuracy counts as found."
        return [Finding(text, False)]
    if len(results.seeds) == 2:
        text = (
            "Everything was trained with two seeds: about one in four comparisons of equal things counts as found by "
            "chance, with three seeds one in fifteen. A difference of several times the spread is beyond that."
        )
        return [Finding(text, False)]
    return []
