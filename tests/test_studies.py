"""Studies: the runner, what is said about results, the report, and each study once."""

from __future__ import annotations

import csv
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from layerwise_ext import cli, data, studies
from layerwise_ext.cli import study as command
from layerwise_ext.studies import layerwise, measure, plots, report, runner, trainability
from layerwise_ext.studies.study import Cell, Figure, Finding, Results, Run, Study, Summary, Table, Task


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


# -- The runner --------------------------------------------------------------------------------------------------------


def test_seed_after_seed_and_what_is_written(tmp_path: Path) -> None:
    toy = Toy(draws=True)
    before = torch.get_rng_state()
    results, lines = run(toy, tmp_path, seeds=2, epochs=3)
    assert torch.equal(before, torch.get_rng_state())
    assert [call[:3] for call in toy.ran] == [("a", 0, 3), ("b", 0, 3), ("a", 1, 3), ("b", 1, 3)]
    assert [r.seconds for r in results.runs] == [30, 60, 30, 60]
    assert results.values("a", "drawn") == results.values("b", "drawn") and len(set(results.values("a", "drawn"))) == 2
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(row["cell"], row["number"], row["seed"], row["epochs"]) for row in rows] == [
        ("a", "1", "0", "3"), ("b", "2", "0", "3"), ("a", "1", "1", "3"), ("b", "2", "1", "3")
    ]  # fmt: skip
    assert [json.loads(row["layers"]) for row in rows] == [[1, 2], [1, 2], [1, 3], [1, 3]]
    assert (tmp_path / "table.md").read_text() == (
        "| cell | accuracy \\| % |\n| --- | ---: |\n| a | 60.5 ± 0.5 |\n| b | 70.5 ± 0.5 |\n\nA caption.\n"
    )
    assert (tmp_path / "plots" / "line.png").read_bytes().startswith(b"\x89PNG")
    assert "about 1.5 minutes left" in lines[2]
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_killed_study_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    whole, _ = run(Toy(), tmp_path / "whole", seeds=2)
    with pytest.raises(KeyboardInterrupt):
        run(Toy(fail_at=3), tmp_path / "parts", seeds=2)
    toy = Toy()
    parts, lines = run(toy, tmp_path / "parts", seeds=2)
    assert ran(toy) == [("b", 1)]
    assert "3 of 4 runs are done" in lines[0]
    assert parts.runs == whole.runs
    assert run(again := Toy(), tmp_path / "parts")[0].runs == whole.runs and not again.ran


def test_more_seeds_extend_a_study(tmp_path: Path) -> None:
    run(Toy(), tmp_path, seeds=1)
    toy = Toy()
    results, _ = run(toy, tmp_path, seeds=3)
    assert ran(toy) == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert results.seeds == [0, 1, 2]
    results, _ = run(Toy(), tmp_path, seeds=2)  # what is there stays
    assert results.seeds == [0, 1, 2]


def test_a_folder_of_another_study(tmp_path: Path) -> None:
    run(Toy(), tmp_path, seeds=1, epochs=2)
    with pytest.raises(ValueError, match=r"epochs is 3, but the study in .* has 2"):
        run(Toy(), tmp_path, epochs=3)
    with pytest.raises(ValueError, match=r"limit_train is 10, but the study in .* has None"):
        run(Toy(), tmp_path, task=replace(task(), limit_train=10))
    (tmp_path / "runs" / "a-0.json").write_text('{"cell": "a",')
    with pytest.raises(ValueError, match=r"a-0.json is damaged .*; remove it"):
        run(Toy(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; allowed: 1 or more"),
        ({"seeds": -1}, "seeds is -1; allowed: 1 or more"),
        ({"budget": 0.0}, "budget is 0.0; allowed: a positive number"),
        ({"budget": math.nan}, "budget is nan; allowed: a positive number"),
        ({"budget": 1.0, "epochs": 1, "seeds": 1}, "leave nothing for budget to choose"),
    ],
)
def test_refused_lengths(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(Toy(), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("names", [("a", "a"), ("a/b",), ("ä",), ("",)])
def test_refused_names_of_cells(tmp_path: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "cells", lambda self, task: [Cell(name) for name in names])
    with pytest.raises(ValueError, match="a cell has the name"):
        run(Toy(), tmp_path / "new")


# -- Budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "epochs", "seeds", "chosen"),
    [
        (95, None, None, (3, 3)),  # 9 units of 10 seconds
        (10_000, None, None, (9, 3)),  # never more than the study's
        (29, None, None, (1, 2)),  # one epoch before more seeds
        (19, None, None, (1, 1)),
        (9, None, None, None),
        (95, None, 1, (9, 1)),
        (95, None, 5, (1, 5)),
        (45, None, 5, None),
        (95, 4, None, (4, 2)),
        (95, 10, None, None),
    ],
)
def test_epochs_and_seeds_of_a_budget(
    left: float, epochs: int | None, seeds: int | None, chosen: tuple[int, int] | None
) -> None:
    assert runner.choose(10, left, epochs, seeds, max_epochs=9) == chosen


def test_a_budget_is_chosen_for_by_timing(tmp_path: Path) -> None:
    toy = Toy()
    # An epoch of both cells takes 30 s on 1000 images; the timing trains on 512: 5.12 + 5.12 + 10.24 s.
    results, lines = run(toy, tmp_path, budget=7.0)
    assert [images for *_, images in toy.ran[:3]] == [512] * 3 and all(call[3] == 1000 for call in toy.ran[3:])
    assert {r.epochs for r in results.runs} == {4} and results.seeds == [0, 1, 2]  # 399 s: 13 units
    assert toy.now == pytest.approx(20.48 + 3 * 4 * 30)
    assert any("4 epochs, 3 seeds: about 6.0 minutes" in line for line in lines)
    again = Toy()
    run(again, tmp_path, budget=7.0)
    assert not again.ran


def test_the_start_of_processes_does_not_grow_with_the_images() -> None:
    class WithProcesses(Toy):
        def cells(self, task: Task) -> list[Cell]:
            return [Cell("a", {"number": 1}), Cell("b", {"number": 2}, has_processes=True)]

        def run(self, task: Task, cell: Cell, seed: int, epochs: int) -> dict[str, Any]:
            self.now += 20.0 if cell.has_processes else 0.0
            return super().run(task, cell, seed, epochs)

    toy = WithProcesses()
    seconds = runner.seconds_per_epoch(toy, task(), toy.cells(task()), toy.clock)
    assert seconds == {"a": pytest.approx(10), "b": pytest.approx(20)}


def test_a_budget_that_is_too_small_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"budget is 0.5 minutes; 1 epoch of all 2 cells .* takes about 0.8"):
        run(Toy(), tmp_path, budget=0.5)
    results, _ = run(Toy(), tmp_path, budget=0.9)
    assert results.seeds == [0]


def test_more_minutes_extend_a_study(tmp_path: Path) -> None:
    run(Toy(), tmp_path, epochs=1, seeds=1)  # 30 s
    toy = Toy()
    results, _ = run(toy, tmp_path, budget=2.2)
    assert results.seeds == [0, 1, 2, 3] and all(call[2] == 1 for call in toy.ran)


def test_a_seed_that_would_take_too_long_is_left_out(tmp_path: Path) -> None:
    toy, lines = Toy(), list[str]()

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("[1/"):
            toy.costs = {"a": 2.5, "b": 5.0}  # the machine is slower from now on

    results = runner.run(toy, task(), tmp_path, budget=2.2, clock=toy.clock, say=say)
    assert results.seeds == [0, 1]  # planned were three, of 30 s each; the second one took 75 s
    assert any(line.startswith("seed 2 is left out: with it the study would take") for line in lines)


# -- Findings ----------------------------------------------------------------------------------------------------------


def made_up(values: dict[str, list[float]], test_images: int = 1000, **more: Any) -> Results:
    runs = [Run(name, seed, 1, 1.0, {"accuracy": v}) for name, own in values.items() for seed, v in enumerate(own)]
    return Results([Cell(name) for name in values], runs, test_images=test_images, **more)


def test_a_difference_larger_than_the_spread() -> None:
    found = studies.compare(made_up({"a": [0.90, 0.91], "b": [0.80, 0.82]}), "a", "b")
    assert found == Finding(
        "The test accuracy of a is 9.5 points higher than that of b (90.5 against 81; seed by seed +9 to +10), more "
        "than the spread over seeds (2 points).",
        True,
    )


def test_differences_that_are_not_found() -> None:
    within = studies.compare(made_up({"a": [0.90, 0.94], "b": [0.89, 0.90]}), "a", "b")
    assert not within.found
    assert within.text.startswith("No difference in test accuracy between a and b was found: 2.5 points")
    assert "2.5 points (92 against 89.5; seed by seed +1 to +4) is not more than" in within.text
    assert "is not more than the spread over seeds (4 points)" in within.text
    one_image = studies.compare(made_up({"a": [0.91, 0.91], "b": [0.90, 0.90]}, test_images=50), "a", "b")
    assert not one_image.found and "what can be told (2 points)" in one_image.text
    one_seed = studies.compare(made_up({"a": [0.9], "b": [0.1]}), "a", "b")
    assert not one_seed.found and "with one seed there is no spread" in one_seed.text
    one_point = studies.compare(made_up({"a": [0.90, 0.91], "b": [0.80, 0.80]}), "a", "b")
    assert one_point.text.endswith("more than the spread over seeds (1 point).")
    equal = studies.compare(made_up({"a": [0.9, 0.8], "b": [0.8, 0.9]}), "a", "b")
    assert equal == Finding("The test accuracy of a and that of b are the same (85).", False)
    lost = studies.compare(made_up({"a": [math.nan, 0.9], "b": [0.1, 0.1]}), "a", "b", names=("A", "B"))
    assert lost == Finding("The test accuracy of A is not finite; A and B cannot be compared.", False)


def test_steps_are_compared_by_rounds() -> None:
    results = replace(
        made_up({"a": [1], "b": [1]}),
        measured={
            "a": {"step_ms": 20.0, "rounds_ms": [19.0, 20.0, 21.0], "peak_mib": 30.0},
            "b": {"step_ms": 10.0, "rounds_ms": [10.0, 10.0, 10.0], "peak_mib": 29.8},
            "c": {"step_ms": 10.0, "rounds_ms": [9.0, 10.0, 12.0]},
        },
    )
    time, memory = studies.compare_steps(results, "a", "b", names=("A", "B"))
    assert time.found and time.text.startswith("A step of A takes 2.00 times as long as one of B (20 against 10 ms")
    assert not memory.found and memory.text.startswith("No difference in memory")
    (time,) = studies.compare_steps(results, "b", "c", names=("B", "C"))
    assert not time.found and time.text.startswith("No difference in time")
    assert not studies.compare_steps(results, "a", "not measured", names=("A", "D"))


def test_summaries() -> None:
    assert Summary.of([1.0, 3.0]) == Summary(2.0, 2.0, 2) and Summary.of([1.0, 3.0]).text() == "2.0 ± 1.0"
    assert math.isnan(Summary.of([1.0]).spread) and Summary.of([0.5]).text(100) == "50.0"
    assert math.isnan(Summary.of([1.0, math.inf]).mean)
    with pytest.raises(ValueError, match="values is empty"):
        Summary.of([])
    results = Results([Cell("a")], [Run("a", seed, 1, 1.0, {"layers": [seed, 5]}) for seed in (1, 0)])
    assert results.values("a", "layers") == [[0, 5], [1, 5]]
    assert [s.mean for s in results.per_layer("a", "layers")] == [0.5, 5.0]


def texts(findings: list[Finding], found: bool) -> str:
    return "\n".join(finding.text for finding in findings if finding.found == found)


def of_layerwise(accuracy: dict[str, list[float]]) -> Results:
    cells = [Cell(name, {"method": name}, name != "checkpointed") for name in layerwise.LABELS]
    values = {cell.name: accuracy.get(cell.name, [0.9, 0.9]) for cell in cells if cell.trained}
    measured = {name: {"step_ms": 1.0, "rounds_ms": [1.0] * 3, "peak_mib": 10.0} for name in ("joint", "checkpointed")}
    measured["checkpointed"] = {"step_ms": 1.3, "rounds_ms": [1.3] * 3, "peak_mib": 6.0}
    return replace(made_up(values), cells=cells, measured=measured)


def test_what_is_said_about_layerwise_training() -> None:
    study = layerwise.Layerwise()
    accuracy = {"joint": [0.95, 0.96], "pred": [0.90, 0.91], "predsim": [0.94, 0.96], "greedy-split": [0.1, 0.9]}
    findings = study.findings(of_layerwise(accuracy))
    yes, no = texts(findings, True), texts(findings, False)
    assert "of joint training is 5 points higher than that of local training (pred)" in yes
    assert "between joint training and local training (predsim) was found" in no
    assert "of local training (predsim) is 4.5 points higher than that of local training (pred)" in yes
    assert "Greedy training with split epochs did not learn with 1 of 2 seeds." in yes
    assert "checkpointed joint training takes 1.30 times as long as one of joint training" in yes
    assert "checkpointed joint training needs 0.60 times the memory" in yes
    assert "of local training (projected predsim) is 5 points lower than that of local training (predsim)" in yes
    one = of_layerwise({name: [0.9] for name in layerwise.LABELS})
    assert "higher" not in texts([f for f in study.findings(one) if "step" not in f.text], True)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("joint", (0, 8)), ("greedy", (0, 8)), ("greedy-split", (0, 2)), ("autoencoder", (4, 8)),
     ("autoencoder-split", (4, 4))],
)  # fmt: skip
def test_accounts_of_epochs(method: str, expected: tuple[int, int]) -> None:
    assert layerwise.schedule(method, 8, stages=4) == expected
    assert min(layerwise.schedule(method, 1, stages=4)[1:]) == 1


def test_published_accuracies_stand_beside_the_paper_s_data_sets() -> None:
    def published(name: str, **options: Any) -> str | None:
        return layerwise.Layerwise().setup(replace(task(), name=name, **options)).get("published")

    text = published("fashion-mnist")
    assert text is not None and "200 epochs" in text
    assert text.endswith(": joint 95.47; local, pred 94.34; local, projected predsim 95.35")
    assert published("digits") is published("cifar10-jpeg") is published("mnist", quick=True) is None


def test_decoupled_cells_are_local_training_on_pred() -> None:
    quick = Task.load("digits", quick=True)
    study = layerwise.Layerwise()
    pred, *decoupled = (study.run(quick, Cell(name, {"method": name}), 0, 1) for name in ("pred", *layerwise.DECOUPLED))
    assert decoupled[0]["train_loss"] == pytest.approx(pred["train_loss"], rel=1e-5)
    assert len(decoupled[1]["accuracy_by_stage"]) == pred["stages"]
    full = {cell.name: cell for cell in study.cells(replace(quick, quick=False))}
    assert [name for name, cell in full.items() if cell.has_processes] == list(layerwise.DECOUPLED)


def of_trainability(learns: Any, ratio: Any) -> Results:
    """Settings of the quick study; those of ``learns(options)`` have 90 %, others 10 %."""
    cells = trainability.Trainability().cells(replace(task(), quick=True))
    runs = []
    for cell in cells:
        for seed in range(2):
            values = {"accuracy": 0.9 if learns(cell.options) else 0.1, "first_over_last": ratio(cell.options)}
            runs.append(Run(cell.name, seed, 1, 1.0, values))
    return Results(cells, runs, test_images=1000)


def test_what_is_said_about_trainability() -> None:
    study = trainability.Trainability()

    def learns(options: dict[str, Any]) -> bool:
        return options["batch_norm"] or (options["activation"] == "relu" and options["init"] == "he")

    findings = study.findings(of_trainability(learns, lambda options: 1.0 if learns(options) else 1e-9))
    yes, no = texts(findings, True), texts(findings, False)
    assert "Without batch norm learned: 1 of 4 with 2 layers, 1 of 4 with 6 layers." in yes
    assert "With batch norm learned: 4 of 4 with 2 layers, 4 of 4 with 6 layers." in yes
    assert "no batch norm) did not learn: test accuracy 10.0 ± 0.0 %, chance is 10.0 %" in yes
    assert "first convolution is 1.0e-09 of that at its last one" in yes
    assert re.search(r"network with batch norm alone is 80 points higher .* It learned\.", yes)
    assert "with ReLU alone and that of the network of old are the same (10). It did not learn." in no
    assert "10 of 10 settings learned whose gradients keep their size" in yes and "0 of 6 others" in yes


def test_gradients_that_tell_nothing_and_settings_that_learn_nothing() -> None:
    study = trainability.Trainability()
    findings = study.findings(of_trainability(lambda o: o["batch_norm"], lambda o: 1.0 if o["init"] == "he" else 1e-9))
    assert "did not tell which settings learn: 4 of 8 settings learned" in texts(findings, False)
    findings = study.findings(of_trainability(lambda o: True, lambda o: 1.0))
    assert "in all settings, so whether that tells which of them learn cannot be said" in texts(findings, False)
    findings = study.findings(of_trainability(lambda o: False, lambda o: 1.0))
    assert [finding.found for finding in findings] == [False] and "No setting learned" in findings[0].text


# -- The report --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Insists on closed elements, alternative texts and a page that loads nothing; collects the text."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert tag not in ("script", "link", "iframe", "object", "b")
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href"):
                assert value and value.startswith("data:image/svg+xml;base64,")
        if tag == "img":
            assert dict(attrs)["alt"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text


def check_report(folder: Path) -> Page:
    text = (folder / "report.html").read_text(encoding="utf-8")
    own = re.sub(r"base64,[\w+/=]*", "", text)
    assert "http" not in own and "url(" not in own and "@import" not in own
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    figures = sorted(path.stem for path in (folder / "plots").glob("*.svg"))
    assert figures == sorted(path.stem for path in (folder / "plots").glob("*.png"))
    assert page.seen.count("img") == len(figures) > 0
    for path in (folder / "plots").glob("*.svg"):
        ET.parse(path)
    return page


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


def test_machines_are_those_that_something_ran_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def machines(name: str, **options: Any) -> list[str]:
        monkeypatch.setattr(runner, "machine", lambda task: {"machine": name})
        run(Toy(), tmp_path, **options)
        return [facts["machine"] for facts in json.loads((tmp_path / "study.json").read_text())["machines"]]

    assert machines("first", seeds=1) == ["first"]
    assert machines("that writes the report again") == ["first"]
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


def test_a_study_with_one_seed_says_so(tmp_path: Path) -> None:
    run(Toy(draws=True), tmp_path, seeds=1, epochs=1)
    assert "Everything was trained with one seed: there is no spread" in check_report(tmp_path).text


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


# -- Tasks and measurements --------------------------------------------------------------------------------------------


def test_a_limit_takes_as_many_images_of_each_class() -> None:
    limited = Task.load("digits", limit_train=100)
    assert torch.bincount(limited.train.labels).tolist() == [10] * 10
    assert len(limited.test.labels) == len(Task.load("digits").test.labels)
    assert len(Task.load("digits", quick=True).train.labels) == 10 * (256 // 10)
    assert limited.image_shape == (1, 8, 8) and limited.chance == 0.1
    with pytest.raises(ValueError, match="limit_train is 9; allowed: 10 or more"):
        Task.load("digits", limit_train=9)
    images, labels = next(iter(limited.loader(1000, seed=0)))
    assert images.shape == (100, 1, 8, 8) and len(labels) == 100
    assert len(limited.part(7).train.labels) == len(limited.part(7).test.labels) == 7


def test_steps_take_turns() -> None:
    calls: list[str] = []
    now = iter(range(1000))
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.interleaved_times(steps, 2, clock=lambda: float(next(now)))
    assert calls == ["a", "b"] * (measure.WARMUP_ROUNDS + 2)
    assert times == {"a": [1e3, 1e3], "b": [1e3, 1e3]}


def test_a_failed_measurement_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"measuring the memory of no-such-file failed:\n[\s\S]*No such file"):
        measure.peak_in_fresh_process("json.tool", "no-such-file")


# -- The studies and the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", studies.NAMES)
def test_each_study_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["study", name, "--quick", "--threads", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert f"open {tmp_path / 'report.html'}" in capsys.readouterr().out
    page = check_report(tmp_path)
    assert studies.NAMES[name].question in page.text
    runs = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")]
    quick = replace(task(), quick=True)
    assert {r["cell"] for r in runs} == {c.name for c in studies.NAMES[name]().cells(quick) if c.trained}
    assert (tmp_path / "table.md").read_text().count("\n") > 3


def test_runs_repeat() -> None:
    quick = Task.load("digits", quick=True)
    for name in ("layerwise", "trainability"):
        study = studies.NAMES[name]()
        cell = study.cells(quick)[-1]
        first, second = (runner._run(study, quick, cell, 1, 1) for _ in range(2))
        kept = [key for key in first if "seconds" not in key]
        assert [first[key] for key in kept] == [second[key] for key in kept]


def test_trainability_has_a_gradient_for_each_convolution() -> None:
    quick = Task.load("digits", quick=True)
    study = trainability.Trainability()
    for cell in study.cells(quick):
        if cell.options["depth"] == 6 and cell.options["activation"] == "logistic":
            values = study.run(quick, cell, 0, 1)
            assert len(values["activation_gradient"]) == len(values["weight_gradient"]) == 6
            gradients = values["activation_gradient"]
            assert values["first_over_last"] == pytest.approx(gradients[0] / gradients[-1])
            if cell.name == "logistic-plain-gaussian-6":
                assert 0 < values["first_over_last"] < 1e-5  # a factor of about 0.25 * 0.12 for each of 5 layers


def test_the_names_of_the_command_are_those_of_the_package() -> None:
    assert list(studies.NAMES) == list(command.STUDIES)
    assert [study().name for study in studies.NAMES.values()] == list(studies.NAMES)


def test_refusals_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*options: str) -> str:
        assert cli.main(["study", "trainability", "--quick", "--output", str(tmp_path), *options]) == 2
        return capsys.readouterr().err

    assert "mnist is read from files" in refused("--data", "mnist")
    assert "limit_train is 5; allowed: 10 or more" in refused("--limit-train", "5")
    assert "leave nothing for budget to choose" in refused("--budget", "1", "--epochs", "1", "--seeds", "1")
    assert "--device is 'tpu'" in refused("--device", "tpu")
    assert not list(tmp_path.iterdir())
    for options in (["no-such-study"], ["layerwise", "--budget", "0"], ["layerwise", "--data", "image-folder"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["study", *options])
