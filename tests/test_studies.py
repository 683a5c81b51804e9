"""Studies: the runner, and each study once."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layerwise_ext import cli, studies
from layerwise_ext.cli import study as command
from layerwise_ext.studies import measure, runner, trainability
from layerwise_ext.studies.study import Cell, Task
from study_pages import check_report
from study_toy import Toy, ran, run, task

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

    # One run of the seed is there, of an attempt on a faster machine: means over other seeds are not compared with it.
    first = (tmp_path / "runs" / "a-0.json").read_text()
    (tmp_path / "runs" / "a-2.json").write_text(first.replace('"seed": 0', '"seed": 2'))
    results = runner.run(toy, task(), tmp_path, budget=2.2, clock=toy.clock, say=say)
    assert results.seeds == [0, 1] and {each.seed for each in results.runs} == {0, 1}
    assert (tmp_path / "runs" / "a-2.json").exists()


# -- Tasks and measurements --------------------------------------------------------------------------------------------


def test_a_limit_takes_as_many_images_of_each_class() -> None:
    limited = Task.load("digits", limit_train=100)
    assert torch.bincount(limited.train.labels).tolist() == [10] * 10
    assert len(limited.test.labels) == len(Task.load("digits").test.labels)
    assert len(Task.load("digits", quick=True).train.labels) == 10 * (256 // 10)
    assert limited.image_shape == (1, 8, 8) and limited.chance == 0.1
    with pytest.raises(ValueError, match="limit_train is 9; allowed: 10 or more"):
        Task.load("digits", limit_train=9)
    with pytest.raises(ValueError, match=r"1400, 140 images of each class, .* digits has 139; allowed: 10 to 1399"):
        Task.load("digits", limit_train=1400)
    assert len(Task.load("digits", limit_train=1399).train.labels) == 1390
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
