"""Studies: what is said about results."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from layerwise_ext import studies
from layerwise_ext.studies import layerwise, trainability
from layerwise_ext.studies.study import Cell, Finding, Results, Run, Summary, Task
from study_toy import task


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
