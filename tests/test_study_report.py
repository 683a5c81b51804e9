"""Studies: the report."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layerwise_ext.studies import plots, report, runner
from layerwise_ext.studies.study import Figure, Summary
from study_pages import check_report
from study_toy import Toy, run, task


def test_the_report_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    run(Toy(draws=True), tmp_path, seeds=2, epochs=3)
    page = check_report(tmp_path)
    for expected in (
        "A <b>toy</b> & its title",
        "Is a better than b?",
        "The test accuracy of b is 10 points higher than that of a (70.5 against 60.5; seed by seed +10 to +10)",
        "<script>alert(1)</script>",
        "60.5 ± 0.5",
        "A caption.",
        "none & <none>",
        "1000 training and 1000 test images of 1x4x4, 10 classes",
        "3.0 minutes for 4 runs",
        f"torch {torch.__version__}",
        "layerwise-ext study toy --data digits --epochs 3 --seeds 2",
    ):
        assert expected in page.text
    found, not_found = page.text.index("What was found"), page.text.index("What was not found")
    assert found < page.text.index("10 points higher") < not_found < page.text.index("<script>")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html and "overflow-x: auto" in html


def test_machines_are_those_that_finished_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def machines(name: str, fail_at: int | None = None, **options: Any) -> list[str]:
        monkeypatch.setattr(runner, "machine", lambda task: {"machine": name})
        with nullcontext() if fail_at is None else pytest.raises(KeyboardInterrupt):
            run(Toy(fail_at), tmp_path, **options)
        return [facts["machine"] for facts in json.loads((tmp_path / "study.json").read_text())["machines"]]

    assert machines("first", seeds=1) == ["first"]
    assert machines("that writes the report again") == ["first"]
    assert machines("that is stopped in its first run", fail_at=0, seeds=2) == ["first"]
    assert machines("of another seed", seeds=2) == ["first", "of another seed"]


def test_the_report_in_markdown_says_the_same(tmp_path: Path) -> None:
    run(Toy(draws=True), tmp_path, seeds=2, epochs=3)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# A &lt;b>toy&lt;/b> & its title\n\nIs a better than b?\n")
    parts = [part.partition("\n\n") for part in text.split("\n## ")[1:]]
    sections = {title: body for title, _, body in parts}
    assert list(sections) == [
        "What was found", "What was not found", "Results", "Figures", "Setup", "How to repeat it"
    ]  # fmt: skip
    found, not_found = (sections[f"What was {which}found"].splitlines() for which in ("", "not "))
    assert found[0].startswith("- The test accuracy of b is 10 points higher than that of a")
    assert any("&lt;script>" in line for line in not_found) and "<script" not in text
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert sections["Results"].strip() == table.strip().replace("<", "&lt;")
    pictures = re.findall(r"!\[.+\]\((.+)\)", sections["Figures"])
    assert pictures and all((tmp_path / picture).is_file() for picture in pictures)
    assert all(each in sections["Setup"] for each in ("- **epochs**: 3\n", "\n### Machine\n", "- **versions**: "))
    assert sections["How to repeat it"].startswith("    layerwise-ext study toy --data digits --epochs 3 --seeds 2")


def test_a_study_with_few_seeds_says_so(tmp_path: Path) -> None:
    run(Toy(draws=True), tmp_path, seeds=1, epochs=1)
    assert "Everything was trained with one seed: there is no spread" in check_report(tmp_path).text
    run(Toy(draws=True), tmp_path, seeds=2, epochs=1)
    assert "with two seeds: about one in four comparisons of equal things" in check_report(tmp_path).text
    run(Toy(draws=True), tmp_path, seeds=3, epochs=1)
    assert "Everything was trained with" not in check_report(tmp_path).text


def test_the_command_in_the_report_names_what_decides_the_numbers(tmp_path: Path) -> None:
    toy, plan = Toy(), runner.Plan(2, 3)
    line = runner.command(toy, replace(task(), name="mnist", limit_train=50, quick=True), plan, tmp_path / "x y")
    for part in ("--data mnist --data-dir DIR", "--limit-train 50", "--epochs 2 --seeds 3", "--quick", "x y'"):
        assert part in line


def test_figures_have_an_ink_for_dark_grounds(tmp_path: Path) -> None:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        plots.line(axis, [1, 2], [Summary(1, 0.5, 2), Summary(2, math.nan, 1)], "one", 0)
        for kind in (plots.bars, plots.points):
            kind(figure.subplots(), ["x", "y"], [Summary(1, 0.5, 2), Summary(2, math.nan, 1)])
        plots.legend_above(figure)

    figure = Figure("both", "title", "alt", draw)
    plots.save(figure, tmp_path)
    first = (tmp_path / "both.svg").read_bytes()
    plots.save(figure, tmp_path)
    assert (tmp_path / "both.svg").read_bytes() == first
    text = first.decode()
    assert "prefers-color-scheme: dark" in text and plots.DARK_INK in text and text.count(plots.INK) > 3
    styles = [plots.style(number) for number in range(len(plots.COLOURS) * len(plots.LINES))]
    assert len({tuple(style.values()) for style in styles}) == len(styles)


def test_durations_are_readable() -> None:
    assert [report.duration(seconds) for seconds in (5, 120, 7200)] == ["5.0 s", "2.0 minutes", "2.0 hours"]
