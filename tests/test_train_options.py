"""Options of the trainers against plain PyTorch: accumulation, clipping, optimisers and schedules for each stage."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layerwise_ext import checkpoint
from layerwise_ext.nn import FunctionHead, LocalStage, PooledLinearHead
from layerwise_ext.train import GreedyTrainer, JointTrainer, LocalTrainer, Trainer
from layerwise_ext.train.metrics import collapses
from test_train import TOLERANCE, TRAINERS, arrays, loader, network, same, sgd, snapshot, trainer_for
from torch import Tensor, nn


def smooth_stages(**options: Any) -> list[LocalStage]:
    """Two stages in float64 without batch norm: the gradient of a batch is the mean of its samples' gradients."""
    torch.manual_seed(5)
    bodies = [nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.Tanh()) for c in (1, 6)]
    heads = [PooledLinearHead(6, 4, bins=2, zero_init=False) for _ in bodies]
    return [LocalStage(body, head, **options).double() for body, head in zip(bodies, heads, strict=True)]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return snapshot(nn.ModuleList(trainer.stages))


# -- Accumulation and clipping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulate", "updates"), [(2, [24, 16]), (3, [36, 4]), (9, [40])])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("kind", TRAINERS)
def test_accumulated_batches_are_one_batch(
    kind: type[Trainer], clip_norm: float | None, accumulate: int, updates: list[int]
) -> None:
    """40 samples in batches of 12, 12, 12 and 4: groups of unlike batches, and one that is not full."""
    options = {"clip_norm": clip_norm, "cache": False} if kind is GreedyTrainer else {"clip_norm": clip_norm}
    parts = trainer_for(kind, smooth_stages(), accumulate=accumulate, **options)
    whole = trainer_for(kind, smooth_stages(), **options)
    images, target = arrays()
    batches = list(zip(images.split(updates), target.split(updates), strict=True))
    history, expected = parts.fit(loader(batch_size=12), 3), whole.fit(batches, 3)
    torch.testing.assert_close(weights(parts), weights(whole), **TOLERANCE)
    for ours, theirs in zip(history, expected, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-10)
        assert ours["train_accuracy"] == theirs["train_accuracy"]


def test_clipping_is_that_of_each_optimizer() -> None:
    stages, peers = smooth_stages(), smooth_stages()
    trainer = trainer_for(LocalTrainer, stages, clip_norm=0.1)
    optimizers = [sgd(list(peer.parameters())) for peer in peers]
    norms = []
    for images, target in loader():
        trainer.step(images, target)
        x = images
        for peer, optimizer in zip(peers, optimizers, strict=True):
            x, loss, _ = peer(x, target)
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(peer.parameters(), 0.1)))
            optimizer.step()
            optimizer.zero_grad()
    assert max(norms) > 0.1
    torch.testing.assert_close(weights(trainer), snapshot(nn.ModuleList(peers)), **TOLERANCE)


def test_gradients_of_an_interrupted_update_are_dropped() -> None:
    interrupted, peer = (trainer_for(JointTrainer, smooth_stages(), accumulate=4) for _ in range(2))
    images, target = next(iter(loader()))
    interrupted.step(images, target, update=False)
    interrupted.fit(loader(), 1)
    peer.fit(loader(), 1)
    torch.testing.assert_close(weights(interrupted), weights(peer), rtol=0, atol=0)


# -- Optimisers and schedules ------------------------------------------------------------------------------------------


def sgd_of(rate: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


@pytest.mark.parametrize("kind", [LocalTrainer, GreedyTrainer])
def test_each_stage_has_its_optimizer_and_its_schedule(kind: type[Trainer]) -> None:
    factors = [0.5, 0.1, 1.0]
    schedules = [lambda o, f=f: torch.optim.lr_scheduler.StepLR(o, 1, gamma=f) for f in factors]
    trainer = trainer_for(kind, network(), [sgd_of(0.1), sgd_of(0.2), sgd_of(0.0)], scheduler=schedules)
    frozen = snapshot(trainer.stages[2].body)
    trainer.fit(loader(), 2)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert rates == pytest.approx([0.1 * 0.25, 0.2 * 0.01, 0.0])
    after = trainer.stages[2].body.state_dict()
    assert all(torch.equal(frozen[name], after[name]) for name in frozen if "running" not in name and "num" not in name)
    before = network()
    assert not torch.equal(before[1].body.conv.weight, trainer.stages[1].body.conv.weight)


# -- Predictions -------------------------------------------------------------------------------------------------------


def logits_of_heads(model: Any, images: Tensor) -> list[Tensor]:
    peer, logits = copy.deepcopy(model).eval(), []
    for stage in peer:
        output = stage.body(images)
        logits.append(stage.head.to_modules()(output).detach())
        images = output if stage.downsample is None else F.max_pool2d(output, 2)
    return logits


@pytest.mark.parametrize("kind", TRAINERS)
def test_predictions_are_those_of_the_last_head(kind: type[Trainer]) -> None:
    model = network()
    trainer = trainer_for(kind, model)
    trainer.fit(loader(), 1)
    before, modes = snapshot(model), [module.training for module in model.modules()]
    images, target = arrays()
    expected = logits_of_heads(model, images)[-1]
    for data in (images, images.split(7), loader(batch_size=7)):
        logits = trainer.predict(data)
        torch.testing.assert_close(logits, expected, **TOLERANCE)
        torch.testing.assert_close(trainer.predict(data, probabilities=True), expected.softmax(1), **TOLERANCE)
    assert not logits.requires_grad and not logits.is_inference()
    assert float((logits.argmax(1) == target).double().mean()) == trainer.evaluate(loader())["final"]
    assert same(before, model.state_dict())
    assert modes == [module.training for module in model.modules()]


def test_greedy_training_predicts_with_the_stage_that_was_trained_last() -> None:
    model = network()
    trainer = trainer_for(GreedyTrainer, model)

    def stop(trainer: Trainer, record: dict[str, Any]) -> None:
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loader(), 1, on_epoch_end=stop)
    torch.testing.assert_close(trainer.predict(arrays()[0]), logits_of_heads(model, arrays()[0])[1], **TOLERANCE)


@pytest.mark.parametrize("kind", [GreedyTrainer, LocalTrainer])
def test_the_ensemble_weighs_stage_n_with_2_to_the_n(kind: type[Trainer]) -> None:
    model = network()
    trainer = trainer_for(kind, model)
    trainer.fit(loader(), 1)
    images, target = arrays()
    first, second, third = (logits.softmax(1) for logits in logits_of_heads(model, images))
    expected = (first + 2 * second + 4 * third) / 7
    torch.testing.assert_close(trainer.predict(images, probabilities=True, ensemble=True), expected, **TOLERANCE)
    torch.testing.assert_close(trainer.predict(images, ensemble=True), expected.log(), **TOLERANCE)
    scores = trainer.evaluate(loader(), ensemble=True)
    assert scores["ensemble"] == float((expected.argmax(1) == target).double().mean())
    assert "ensemble" not in trainer.evaluate(loader())


def test_an_ensemble_is_of_the_heads_that_classify() -> None:
    stages = smooth_stages()
    stages[0].head = FunctionHead(lambda moments, target: moments.mean.square().mean())
    trainer = trainer_for(LocalTrainer, stages)
    images = arrays()[0]
    torch.testing.assert_close(
        trainer.predict(images, ensemble=True, probabilities=True), trainer.predict(images, probabilities=True)
    )
    with pytest.raises(ValueError, match=r"stages\[0\] predicts nothing: its head has no classifier"):
        trainer_for(GreedyTrainer, stages).predict(images)
    with pytest.raises(RuntimeError, match="data gave no batches"):
        trainer.predict([])


# -- Warnings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "accuracies", "epochs"),
    [
        (10, [0.1], []),
        (10, [0.9, 0.7, 0.51, 0.49, 0.2, 0.1], [4]),  # half of 0.8 above 0.1; once
        (10, [0.9, 0.1, 0.8, 0.1, 0.1], [2, 4]),  # it had recovered
        (10, [0.29, 0.1, 0.1], []),  # never clearly above chance
        (10, [0.1, 0.12, 0.31, 0.2], [4]),
        (2, [0.7, 0.5], []),
        (2, [0.95, 0.73, 0.72], [3]),
        (100, [0.04, 0.02], [2]),
    ],
)
def test_what_a_collapse_is(classes: int, accuracies: list[float], epochs: list[int]) -> None:
    assert [n for n in range(1, len(accuracies) + 1) if collapses(accuracies[:n], classes)] == epochs


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_stage_that_collapses_is_named(kind: type[Trainer], caplog: pytest.LogCaptureFixture) -> None:
    """Stage 2 learns, then its head is put to zero and its learning rate, too."""
    model = network()

    def spoil(trainer: Trainer, record: dict[str, Any]) -> None:
        if trainer.epoch == (28 if kind is GreedyTrainer else 8):
            with torch.no_grad():
                model[2].head.linear.weight.zero_()
            trainer.optimizers[-1].param_groups[0]["lr"] = 0.0

    trainer = trainer_for(kind, model, lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    with caplog.at_level(logging.WARNING):
        history = trainer.fit(loader(200), 10, on_epoch_end=spoil)
    (warning,) = [record.getMessage() for record in caplog.records]
    accuracies = [record["train_accuracy"][-1] for record in history if record["stages"][-1] == 2]
    assert max(accuracies) > 0.7 and accuracies[-1] < 0.4
    expected = f"its training accuracy is {accuracies[-2]:.4f}, it was {max(accuracies):.4f}"
    assert warning.endswith(f"stage 2 has collapsed: {expected}")


# -- Bad arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate is 0; allowed: 1 or more"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; allowed: a positive number, None"),
        ({"clip_norm": float("nan")}, "clip_norm is nan"),
        ({"cuda_graph": True, "accumulate": 2}, "cuda_graph=True needs accumulate=1, got 2"),
        ({"optimizer": [sgd]}, "optimizer is a sequence of 1; this trainer has 3 optimisers"),
        ({"scheduler": []}, "scheduler is a sequence of 0; this trainer has 3 optimisers"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalTrainer(network(), **options)


@pytest.mark.parametrize("kind", TRAINERS)
def test_optimizers_and_schedules_are_functions(kind: type[Trainer]) -> None:
    model = network()
    made = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(made, 1)
    for options, message in [
        (
            {"optimizer": made},
            "optimizer is Adam; allowed: a function that makes an optimiser from a list of parameters",
        ),
        ({"optimizer": [sgd, sgd, made]}, r"optimizer\[2\] is Adam; allowed: a function"),
        ({"scheduler": schedule}, "scheduler is StepLR; allowed: a function that makes a learning-rate scheduler from"),
    ]:
        with pytest.raises(TypeError, match=message):
            kind(model, device="meta", **options)
    assert all(p.device.type == "cpu" for p in model.parameters())  # nothing was done before


# -- The documentation -------------------------------------------------------------------------------------------------


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parent.parent / "docs" / "training.md"
    if not page.is_file():
        pytest.skip("docs/ is not beside tests/")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    assert names["trainer"].epoch == 2
    resumed = LocalTrainer(names["model"])
    resumed.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt"))
    assert resumed.epoch == 2
