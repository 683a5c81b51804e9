"""Averaged weights: the average, where it is used, and that training itself does not notice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layerwise_ext.train import EarlyStopping, GreedyTrainer, JointTrainer, LocalTrainer, Trainer
from test_train import TOLERANCE, TRAINERS, arrays, loader, network, same, sgd, snapshot, trainer_for
from test_train_resume import resume_after
from torch import Tensor, nn

DECAY = 0.8


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [JointTrainer, LocalTrainer])
def test_the_average_follows_the_updates(kind: type[Trainer], accumulate: int) -> None:
    model = network()
    trainer = trainer_for(kind, model, ema_decay=DECAY, accumulate=accumulate)
    average: dict[str, Tensor] = {}

    def update(*_: Any) -> None:
        for name, p in model.named_parameters():
            average[name] = DECAY * average[name] + (1 - DECAY) * p.detach() if name in average else p.detach().clone()

    # All optimisers have stepped when the last one has.
    trainer.optimizers[-1].register_step_post_hook(update)
    assert all(a is b for a, b in zip(trainer.ema_stages, model, strict=True))
    trainer.fit(loader(), 2)
    averaged = nn.ModuleDict({"stages": nn.ModuleList(trainer.ema_stages)})
    torch.testing.assert_close(dict(averaged.named_parameters()), average, **TOLERANCE)
    torch.testing.assert_close(dict(averaged.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [JointTrainer, LocalTrainer])
def test_evaluation_uses_the_average_and_training_does_not(kind: type[Trainer]) -> None:
    trainer, plain = trainer_for(kind, network(), ema_decay=DECAY), trainer_for(kind, network())
    history = trainer.fit(loader(), 2, loader())
    expected = plain.fit(loader(), 2, loader())
    for ours, theirs in zip(history, expected, strict=True):
        assert ours["train_loss"] == theirs["train_loss"]
        assert ours["val_loss"] != theirs["val_loss"]
    assert all(same(a.state_dict(), b.state_dict()) for a, b in zip(trainer.stages, plain.stages, strict=True))
    peer = trainer_for(kind, copy.deepcopy(trainer.ema_stages))
    assert history[-1]["val_loss"] == peer.evaluate(loader())["loss"]
    assert torch.equal(trainer.predict(arrays()[0]), peer.predict(arrays()[0]))
    assert not torch.equal(trainer.predict(arrays()[0]), plain.predict(arrays()[0]))


def test_greedy_training_builds_on_averaged_stages() -> None:
    """The second stage against a plain loop on what the average of the first one gives."""
    model, peer = network(), network(fused=False)
    trainer = trainer_for(GreedyTrainer, model, ema_decay=DECAY, cache=False)
    averages = []

    def keep(trainer: Trainer, record: dict[str, Any]) -> None:
        averages.append([snapshot(stage) for stage in trainer.ema_stages])

    trainer.fit(loader(), 1, on_epoch_end=keep)
    assert all(same(stage.state_dict(), averages[i][i]) for i, stage in enumerate(model))
    peer[0].load_state_dict(averages[0][0])
    peer[0].eval()
    optimizer = sgd(list(peer[1].parameters()))
    weight = None
    for images, target in loader():
        with torch.no_grad():
            features = peer[0].features(images)
        optimizer.zero_grad()
        F.cross_entropy(peer[1].head.to_modules()(peer[1].body(features)), target).backward()
        optimizer.step()
        new = peer[1].body.conv.weight.detach()
        weight = new.clone() if weight is None else DECAY * weight + (1 - DECAY) * new
    torch.testing.assert_close(model[1].body.conv.weight, nn.Parameter(weight), **TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "stop"), [(JointTrainer, 1), (LocalTrainer, 1), (GreedyTrainer, 1), (GreedyTrainer, 2), (GreedyTrainer, 3)]
)
def test_a_resumed_run_goes_on_with_the_average(kind: type[Trainer], stop: int) -> None:
    second, straight = resume_after(kind, stop, ema_decay=DECAY)
    for ours, theirs in zip(second.ema_stages, straight.ema_stages, strict=True):
        assert same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("kind", TRAINERS)
def test_early_stopping_goes_back_to_the_best_average(kind: type[Trainer]) -> None:
    """Nothing is by 10 better than the first epoch."""
    trainer = trainer_for(kind, network(), ema_decay=DECAY, early_stopping=EarlyStopping(1, min_delta=10))
    averages = []
    evaluate = trainer._evaluate

    def recorded(*args: Any) -> Any:
        averages.append([snapshot(stage) for stage in trainer.ema_stages])
        return evaluate(*args)

    trainer._evaluate = recorded  # type: ignore[method-assign]
    trainer.fit(loader(), 5, loader())
    for index, (stage, average) in enumerate(zip(trainer.stages, trainer.ema_stages, strict=True)):
        best = 2 * index if kind is GreedyTrainer else 0
        assert same(stage.state_dict(), averages[best][index]) and same(average.state_dict(), averages[best][index])


def test_resuming_needs_the_same_options() -> None:
    state = trainer_for(LocalTrainer, network(), ema_decay=DECAY).state_dict()
    with pytest.raises(ValueError, match="the state has ema_decay; this trainer has not"):
        trainer_for(LocalTrainer, network()).load_state_dict(state)
    for decay in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"ema_decay is {decay}; allowed: above 0 and below 1, None"):
            trainer_for(LocalTrainer, network(), ema_decay=decay)
