"""Early stopping: of the network, of the stages one after another, of each stage while the others go on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layerwise_ext.train import EarlyStopping, GreedyTrainer, JointTrainer, LocalTrainer, Trainer
from test_train import TOLERANCE, TRAINERS, loader, network, same, sgd, snapshot, trainer_for
from test_train_resume import resume_after
from torch import Tensor


def scripted(kind: type[Trainer], script: dict[int, list[float]], **options: Any) -> tuple[Trainer, list[Any]]:
    """A trainer whose stages have these values of the metric, epoch for epoch, and the weights after each epoch."""
    model = network()
    trainer = trainer_for(kind, model, **options)
    remaining = {stage: iter(values) for stage, values in script.items()}

    def evaluate(*_: Any) -> dict[str, Any]:
        stages = trainer._reported()
        active = {trainer._stages_of(group)[-1] for group in trainer._active_groups()}
        values = [next(remaining[stage]) if stage in active else math.inf for stage in stages]
        return {"stages": stages, "loss": values, "accuracy": values}

    trainer._evaluate = evaluate  # type: ignore[method-assign, assignment]
    seen: list[Any] = []
    # Before early stopping may put them back: when the epoch has been evaluated.
    stop_early = trainer._stop_early
    trainer._stop_early = lambda values: (seen.append([snapshot(s) for s in model]), stop_early(values))[1]  # type: ignore
    return trainer, seen


@pytest.mark.parametrize("restore_best", [True, False])
@pytest.mark.parametrize(
    ("metric", "values", "epochs", "best"),
    [
        ("val_loss", [1.0, 0.8, 0.9, 0.85], 4, 2),
        ("val_loss", [1.0, 0.95, 0.85, 0.9, 0.8, 0.86], 5, 3),  # 0.95 and 0.8 are not by more than 0.1 better
        ("val_loss", [math.nan, 1.0, math.inf, math.nan], 4, 2),
        ("val_accuracy", [0.2, 0.5, 0.4, 0.55], 4, 2),
    ],
)
def test_joint_training_stops_and_goes_back(
    metric: str, values: list[float], epochs: int, best: int, restore_best: bool
) -> None:
    stopping = EarlyStopping(2, min_delta=0.1, metric=metric, restore_best=restore_best)
    trainer, seen = scripted(JointTrainer, {2: values}, early_stopping=stopping)
    assert len(trainer.fit(loader(), 9, loader())) == epochs
    expected = seen[(best if restore_best else epochs) - 1]
    assert all(same(stage.state_dict(), state) for stage, state in zip(trainer.stages, expected, strict=True))
    assert not same(seen[best - 1][0], seen[epochs - 1][0])
    assert len(trainer.fit(loader(), 9, loader())) == epochs  # it has ended


def test_greedy_training_goes_on_with_the_next_stage() -> None:
    script = {0: [3.0, 2.0, 2.0], 1: [3.0, 2.0, 1.0, 0.5], 2: [1.0, 2.0]}
    trainer, seen = scripted(GreedyTrainer, script, early_stopping=EarlyStopping(1))
    history = trainer.fit(loader(), 4, loader())
    assert [record["stages"] for record in history] == [[0]] * 3 + [[1]] * 4 + [[2]] * 2
    for stage, epoch in ((0, 2), (1, 7), (2, 8)):  # stage 1 came to its last epoch
        assert same(trainer.stages[stage].state_dict(), seen[epoch - 1][stage])
    assert same(seen[3][0], seen[1][0])  # stage 1 was trained on what stage 0 was put back to
    assert [watch["best_state"] for watch in trainer.state_dict()["early_stopping"]] == [[]] * 3


def test_a_stage_that_has_stopped_is_frozen_while_the_others_go_on() -> None:
    script = {0: [2.0, 1.0, 0.5, 0.4, 0.3], 1: [1.0, 2.0], 2: [3.0, 2.0, 1.0, 2.0]}
    trainer, seen = scripted(LocalTrainer, script, early_stopping=EarlyStopping(1))
    peers = network(fused=False)
    optimizers = [sgd(list(peer.parameters())) for peer in peers]
    after: list[dict[str, Tensor]] = []
    for epoch in range(5):
        stopped = {1: epoch > 1, 2: epoch > 3}
        for index, peer in enumerate(peers):
            peer.train(not stopped.get(index))
        for images, target in loader():
            x = images
            for index, (peer, optimizer) in enumerate(zip(peers, optimizers, strict=True)):
                y = peer.body(x.detach())
                if not stopped.get(index):
                    optimizer.zero_grad()
                    F.cross_entropy(peer.head.to_modules()(y), target).backward()
                    optimizer.step()
                x = y if peer.downsample is None else F.max_pool2d(y, 2)
        if epoch == 0:
            after.append(snapshot(peers[1]))
        if epoch == 1:
            peers[1].load_state_dict(after[0])
        if epoch == 2:
            after.append(snapshot(peers[2]))
        if epoch == 3:
            peers[2].load_state_dict(after[1])
    with_graph: list[bool] = []
    trainer.stages[1].register_forward_hook(lambda *_: with_graph.append(torch.is_grad_enabled()))
    history = trainer.fit(loader(), 5, loader())
    assert with_graph == [True] * 2 * 3 + [False] * 3 * 3
    assert len(history) == 5 and all(record["stages"] == [0, 1, 2] for record in history)
    for stage, peer in zip(trainer.stages, peers, strict=True):
        torch.testing.assert_close(dict(stage.state_dict()), dict(peer.state_dict()), **TOLERANCE)
    assert same(seen[0][1], trainer.stages[1].state_dict()) and same(seen[2][2], trainer.stages[2].state_dict())


def test_local_training_ends_with_its_last_stage() -> None:
    script = {0: [1.0, 2.0], 1: [2.0, 1.0, 2.0], 2: [1.0, 2.0]}
    trainer, _ = scripted(LocalTrainer, script, early_stopping=EarlyStopping(1))
    assert len(trainer.fit(loader(), 9, loader())) == 3


def test_gradients_pass_through_a_stage_that_has_stopped() -> None:
    script = {0: [3.0, 2.0, 1.0], 1: [1.0, 2.0], 2: [3.0, 2.0, 1.0]}
    trainer, seen = scripted(LocalTrainer, script, early_stopping=EarlyStopping(1), detach=False)
    trainer.fit(loader(), 3, loader())
    assert same(seen[0][1], trainer.stages[1].state_dict())
    assert all(not same(seen[1][i], trainer.stages[i].state_dict()) for i in (0, 2))
    assert all(p.grad is None for stage in trainer.stages for p in stage.parameters())


@pytest.mark.parametrize(
    ("kind", "stop"), [(JointTrainer, 1), (JointTrainer, 2), (LocalTrainer, 1), (GreedyTrainer, 1), (GreedyTrainer, 3)]
)
def test_a_resumed_run_stops_where_it_would_have_stopped(kind: type[Trainer], stop: int) -> None:
    """No epoch is by 10 better than the first one: each stage has 3 of them and goes back to its first."""
    second, straight = resume_after(kind, stop, epochs=5, early_stopping=EarlyStopping(2, min_delta=10))
    assert straight.epoch == second.epoch == (9 if kind is GreedyTrainer else 3)
    assert second._has_stopped(0)


def test_bad_arguments() -> None:
    for options, message in [
        ({"patience": 0}, "patience is 0; allowed: 1 or more epochs"),
        ({"patience": 1, "min_delta": -0.1}, "min_delta is -0.1; allowed: 0 or more"),
        ({"patience": 1, "metric": "loss"}, "metric is 'loss'; allowed: 'val_loss', 'val_accuracy'"),
    ]:
        with pytest.raises(ValueError, match=message):
            EarlyStopping(**options)  # type: ignore[arg-type]
    trainer = trainer_for(JointTrainer, network(), early_stopping=EarlyStopping(1))
    with pytest.raises(ValueError, match="early_stopping looks at val_loss: val_loader must be given"):
        trainer.fit(loader(), 1)
    trainer, _ = scripted(JointTrainer, {2: [math.nan]}, early_stopping=EarlyStopping(1, metric="val_accuracy"))
    with pytest.raises(ValueError, match=r"stages\[2\] has no val_accuracy, as its head has no classifier or"):
        trainer.fit(loader(), 1, loader())
    trainer = trainer_for(JointTrainer, network(), early_stopping=EarlyStopping(1, metric="val_accuracy"))
    unlabelled = [(images, torch.full_like(target, -100)) for images, target in loader()]
    with pytest.raises(ValueError, match=r"or val_loader has no labels; use metric='val_loss'"):
        trainer.fit(loader(), 1, unlabelled)
    with pytest.raises(ValueError, match="the state has early_stopping; this trainer has not"):
        trainer_for(JointTrainer, network()).load_state_dict(trainer.state_dict())


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_that_improves_goes_on(kind: type[Trainer]) -> None:
    model = network()
    trainer = trainer_for(kind, model, lambda p: torch.optim.SGD(p, lr=1e-3), early_stopping=EarlyStopping(1))
    trainer.fit(loader(), 2, loader())
    assert trainer.epoch == (6 if kind is GreedyTrainer else 2)
