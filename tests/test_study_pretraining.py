"""Question 3: paired runs, balanced and nested subsets, findings."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from layerwise_ext import data
from layerwise_ext.studies import Results, Summary, Task, plots, pretraining, words
from layerwise_ext.studies.pretraining import NETWORKS, Pretraining
from study_results import made_up
from torch import Tensor

STUDY = Pretraining()


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.load(quick=True)


# -- Runs --------------------------------------------------------------------------------------------------------------


def test_subsets_are_balanced_and_nested() -> None:
    task = Task.load()
    for seed in (0, 1):
        subsets = pretraining.label_subsets(task, seed)
        assert [len(s.labels) for s in subsets] == [10, 50, 100, 500, 1437]
        for smaller, larger in itertools.pairwise(subsets):
            rows = {image.numpy().tobytes() for image in larger.images}
            assert all(image.numpy().tobytes() in rows for image in smaller.images)
        for subset in subsets[:-1]:
            assert len(set(torch.bincount(subset.labels).tolist())) == 1
    first, second = (pretraining.label_subsets(task, seed)[0].images for seed in (0, 1))
    assert not torch.equal(first, second)


def test_a_class_with_few_images_makes_subsets_smaller() -> None:
    labels = torch.arange(10).repeat(30)[:-8]  # 29 images of eight classes, 30 of two
    images = torch.randint(0, 256, (len(labels), 1, 8, 8), dtype=torch.uint8)
    split = data.Split(images, labels)
    task = Task("digits", split, split, data.Normalization.of(images), 10)
    assert [len(s.labels) for s in pretraining.label_subsets(task, 0)] == [10, 50, 100, 290, 292]


class Recorder:
    """Stands for fine_tune."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Tensor]] = []
        self.subsets: list[data.Split] = []
        self.rest: list[tuple[Any, ...]] = []

    def __call__(self, task: Task, model: Any, labelled: data.Split, *rest: Any) -> float:
        self.starts.append(copy.deepcopy(model.state_dict()))
        self.subsets.append(labelled)
        self.rest.append(rest)
        for p in model.parameters():  # as training does
            p.data.zero_()
        return 0.5


@pytest.mark.parametrize("network", NETWORKS)
def test_both_arms_share_subset_weights_and_batches(task: Task, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {c.options["pretrained"]: c for c in STUDY.cells(task) if c.options["network"] == network}
    before: list[dict[str, Tensor]] = []
    recorders = {}
    for pretrained, cell in cells.items():
        recorders[pretrained] = recorder = Recorder()
        monkeypatch.setattr(pretraining, "fine_tune", recorder)
        with monkeypatch.context() as patch:
            pretrain = pretraining.pretrain

            def keep(task: Task, model: Any, *rest: Any, pretrain: Any = pretrain) -> list[float]:
                before.append(copy.deepcopy(model.state_dict()))
                errors: list[float] = pretrain(task, model, *rest)
                return errors

            patch.setattr(pretraining, "pretrain", keep)
            STUDY.run(task, cell, 3, 1)
    (given,) = before  # one pretraining serves all numbers of labels
    random, pretrained = recorders[False], recorders[True]
    assert len(random.starts) == len(pretrained.starts) == 3
    for start in random.starts:
        assert start.keys() == given.keys() and all(torch.equal(start[k], given[k]) for k in given)
    head = [key for key in given if ".head." in key]
    bodies = [key for key in given if key.endswith("conv.weight")]
    assert head and bodies
    for start in pretrained.starts:
        assert all(torch.equal(start[k], pretrained.starts[0][k]) for k in given)
        assert all(torch.equal(start[k], given[k]) for k in head)
        assert not any(torch.equal(start[k], given[k]) for k in bodies)
    for a, b in zip(random.subsets, pretrained.subsets, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert random.rest == pretrained.rest


def test_updates_do_not_depend_on_the_number_of_labels(task: Task) -> None:
    seen = []
    for split in pretraining.label_subsets(task, 0):
        loader = task.loader(64, 0, split)
        batches = list(pretraining._Updates(loader, 5))
        seen.append(len(batches))
        assert {len(target) for _, target in batches} == {min(64, len(split.labels))}
        labels = torch.cat([target for _, target in batches])
        assert labels.bincount(minlength=10).min() > 0  # more than one pass
    assert seen == [5, 5, 5]


def test_fine_tuning_trains_every_layer(task: Task) -> None:
    model = pretraining.initial_network(task, "now", 0)
    before = copy.deepcopy(model.state_dict())
    assert 0 <= pretraining.fine_tune(task, model, task.train, 0, 1, 64) <= 1
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    bodies = {k for k in before if ".body." in k and k.endswith("weight")}
    assert moved >= {*bodies, f"stages.{len(model) - 1}.head.linear.weight"}


def test_networks(task: Task) -> None:
    now, before = (pretraining.initial_network(task, network, 0) for network in ("now", "before"))
    count = [sum(p.numel() for k, p in m.named_parameters() if "conv" in k or "head" in k) for m in (now, before)]
    assert count[0] == count[1]
    assert not any("bn" in key for key in before.state_dict())
    weights = torch.cat([p.detach().flatten() for k, p in before.named_parameters() if k.endswith("conv.weight")])
    assert float(weights.std()) == pytest.approx(0.01, rel=0.05)
    again = pretraining.initial_network(task, "now", 0)
    other = pretraining.initial_network(task, "now", 1)
    key = "stages.0.body.conv.weight"
    assert torch.equal(now.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(now.state_dict()[key], other.state_dict()[key])


# -- Findings ----------------------------------------------------------------------------------------------------------


def results_of(task: Task, accuracy: dict[str, Sequence[Sequence[float]]]) -> Results:
    """``accuracy[cell]``: of each seed, with 10, 50 and 250 labels."""
    values = {
        name: [
            {"accuracy": list(a), "labels": [10, 50, 250], "tuning_seconds": 2.0}
            | ({"pretraining_seconds": 5.0} if name.endswith("pretrained") else {})
            for a in seeds
        ]
        for name, seeds in accuracy.items()
    }
    return made_up(STUDY.cells(task), values)


RANDOM = [[0.50, 0.80, 0.95], [0.40, 0.78, 0.94]]
FOUND = {
    "now-random": RANDOM,
    "now-pretrained": [[0.55, 0.80, 0.949], [0.46, 0.77, 0.943]],  # +5 and +6, 0 and -1, -0.1 and +0.3
    "before-random": [[0.10, 0.10, 0.10]] * 2,
    "before-pretrained": [[0.45, 0.60, 0.80], [0.40, 0.62, 0.80]],
}


def test_a_gain_with_few_labels_is_found_although_seeds_differ(task: Task) -> None:
    results = results_of(task, FOUND)
    # Unpaired, ten points between the seeds would hide the gain.
    effect, old, claim, contrast, successor, failure, cost, _ = STUDY.findings(results)
    assert effect.found and "helped by more than the spread over seeds with 10 labels (+5.5 ± 0.5 points)" in (
        effect.text
    )
    assert "no difference was found with 50 labels" in effect.text and "250 labels (+0.1 ± 0.2 points" in effect.text
    assert old.found and "250 labels (+70.0 ± 0.0 points" in old.text
    assert claim.found and "held here: they helped with 10 labels and not with 250 labels" in claim.text
    assert contrast.found and "gained more" in contrast.text and "lost less" not in contrast.text
    assert failure.found and "without pretraining was below twice chance with 10 labels (10.0 ± 0.0 %)" in failure.text
    assert successor.found and "50 labels" in successor.text and "with 10 labels" not in successor.text
    assert "5 s, 2.5 times a fine-tuning (2 s)" in cost.text


def test_no_gain(task: Task) -> None:
    results = results_of(task, FOUND | {"now-pretrained": RANDOM, "before-pretrained": FOUND["before-random"]})
    effect, old, claim, contrast, successor, *_ = STUDY.findings(results)
    assert not effect.found and not old.found and "helped" not in effect.text
    assert not claim.found and "not confirmed" in claim.text
    assert not contrast.found and "was not found" in contrast.text
    assert successor.found


def test_a_network_that_gains_nothing_did_not_gain_more(task: Task) -> None:
    pretrained = [[a, b, c - 0.04] for a, b, c in RANDOM]
    failed = FOUND["before-random"]
    results = results_of(task, FOUND | {"now-pretrained": pretrained, "before-pretrained": failed})
    contrast = STUDY.findings(results)[3]
    assert contrast.found and "gained more" not in contrast.text
    assert "did not gain, but lost less by it than that of now" in contrast.text
    assert "with 250 labels (+4.0 ± 0.0 points)" in contrast.text


@pytest.mark.parametrize(("change", "text"), [(0.02, "with 250 labels, too"), (-0.02, "held here")])
def test_claim_with_all_labels(task: Task, change: float, text: str) -> None:
    pretrained = [[a + 0.05, b, c + change] for a, b, c in RANDOM]
    effect, _, claim, *_ = STUDY.findings(results_of(task, FOUND | {"now-pretrained": pretrained}))
    assert text in claim.text and claim.found == (change < 0)
    assert ("lowered the accuracy with 250 labels (-2.0 ± 0.0 points" in effect.text) == (change < 0)


def test_one_seed_finds_nothing(task: Task) -> None:
    results = results_of(task, {name: seeds[:1] for name, seeds in FOUND.items()})
    effect, old, failure, *costs = STUDY.findings(results)
    assert failure.found and "250 labels (10.0 %)" in failure.text
    assert not effect.found and "one seed" in effect.text and "+5.0 points" in effect.text
    assert not old.found
    assert all("fine-tuning" in finding.text for finding in costs)


def test_figures_and_table(task: Task, tmp_path: Path) -> None:
    results = results_of(task, FOUND)
    figures = STUDY.figures(results)
    assert "+5.5 ± 0.5 points" in figures[1].alt and figures[0].alt.endswith(".")
    for figure in figures:
        plots.save(figure, tmp_path)
        assert (tmp_path / f"{figure.name}.png").stat().st_size > 5000
    table = STUDY.table(results)
    expected = ["10", "45.0 ± 5.0", "50.5 ± 4.5", "5.5 ± 0.5", "10.0 ± 0.0", "42.5 ± 2.5", "32.5 ± 2.5"]
    assert list(table.rows[0]) == expected


# -- What Results gives ------------------------------------------------------------------------------------------------


def test_pairs_are_of_the_same_seed(task: Task) -> None:
    results = results_of(task, FOUND)
    pairs = results.paired("now-pretrained", "now-random", "accuracy")
    assert pairs == [pytest.approx([0.05, 0.0, -0.001]), pytest.approx([0.06, -0.01, 0.003])]
    shuffled = Results(results.cells, results.runs[::-1])
    assert shuffled.paired("now-pretrained", "now-random", "accuracy") == pairs
    missing = Results(results.cells, [r for r in results.runs if (r.cell, r.seed) != ("now-random", 0)])
    assert missing.paired("now-pretrained", "now-random", "accuracy") == pairs[1:]


@pytest.mark.parametrize(("values", "resolution", "expected"), [
    ([0.02, 0.03], 0.0, True),
    ([0.02, 0.03], 0.03, False),
    ([-0.02, -0.03], 0.0, True),
    ([0.01, 0.04], 0.0, False),
    ([0.02], 0.0, False),
    ([float("nan"), 0.02], 0.0, False),
])  # fmt: skip
def test_differs(values: list[float], resolution: float, expected: bool) -> None:
    assert Summary.of(values).differs(resolution) is expected


def test_words() -> None:
    assert [words.listed("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert [words.points(Summary.of(v)) for v in ([0.01], [-0.01, -0.03])] == ["+1.0 points", "-2.0 ± 1.0 points"]
    names = ("cifar10", "digits", "kmnist")
    expected = ["random crops (padding 4) and flips", "random crops (padding 1)", "no augmentation"]
    assert [words.augmentation(name) for name in names] == expected
