"""Trainers: state, going on after an interruption, and what is said of runs that cannot."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layerwise_ext.train import GreedyTrainer, JointTrainer, LocalTrainer, Trainer
from test_train import TRAINERS, adam, arrays, loader, network, same, snapshot, trainer_for
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Noisy(Dataset):
    """Random augmentation: a run can only be repeated if the generators are."""

    def __init__(self) -> None:
        self.images, self.target = arrays()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index] + 0.1 * torch.randn(1, 8, 8), self.target[index]


def resumable(kind: type[Trainer], own_generator: bool, **options: Any) -> tuple[Trainer, DataLoader]:
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(4) if own_generator else None
    data = DataLoader(Noisy(), 16, shuffle=True, generator=generator)
    schedule = lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.5)  # noqa: E731
    return trainer_for(kind, network(), adam, scheduler=schedule, **options), data


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize(
    ("kind", "stop", "options"),
    [
        (LocalTrainer, 1, {}),
        (JointTrainer, 1, {}),
        (GreedyTrainer, 1, {}),  # in the middle of stage 0
        (GreedyTrainer, 2, {}),  # between two stages
        (GreedyTrainer, 5, {}),  # in the middle of stage 2
        (GreedyTrainer, 3, {"cache": False}),
        (GreedyTrainer, 3, {"cache_limit_bytes": 1}),
        (LocalTrainer, 1, {"blocks": [1, 2], "deep_supervision": 0.5, "accumulate": 2, "clip_norm": 0.1}),
        (JointTrainer, 1, {"deep_supervision": 0.5, "checkpointing": True, "ema_decay": 0.9}),
    ],
)
def test_a_resumed_run_is_bit_identical(
    kind: type[Trainer], stop: int, options: dict[str, Any], own_generator: bool
) -> None:
    second, _ = resume_after(kind, stop, own_generator, **options)
    assert second.optimizers[-1].param_groups[0]["lr"] == pytest.approx(5e-3)


def resume_after(
    kind: type[Trainer], stop: int, own_generator: bool = False, epochs: int = 2, **options: Any
) -> tuple[Trainer, Trainer]:
    """Two trainers that end alike: one that went on from a checkpoint in a file, and one that was never stopped."""
    straight, data = resumable(kind, own_generator, **options)
    expected = straight.fit(data, epochs, loader())

    class Stop(Exception):
        pass

    file = io.BytesIO()

    def interrupt(trainer: Trainer, record: dict[str, Any]) -> None:
        if trainer.epoch == stop:
            torch.save(trainer.state_dict(), file)
            raise Stop

    first, data = resumable(kind, own_generator, **options)
    with pytest.raises(Stop):
        first.fit(data, epochs, loader(), on_epoch_end=interrupt)

    second, data = resumable(kind, own_generator, **options)
    torch.manual_seed(99)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.epoch == stop
    history = second.fit(data, epochs, loader())

    def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in record.items() if key != "seconds"} for record in records]

    assert timeless(history) == timeless(expected)
    for mine, theirs in zip(second.stages, straight.stages, strict=True):
        assert same(mine.state_dict(), theirs.state_dict())
    return second, straight


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_interrupted_fit_goes_on_and_a_finished_one_stays(kind: type[Trainer]) -> None:
    straight = trainer_for(kind, network())
    expected = straight.fit(loader(), 2)

    def interrupt(trainer: Trainer, record: dict[str, Any]) -> None:
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    trainer = trainer_for(kind, network())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loader(), 2, on_epoch_end=interrupt)
    history = trainer.fit(loader(), 2)
    assert [record["train_loss"] for record in history] == [record["train_loss"] for record in expected]
    before = snapshot(nn.ModuleList(trainer.stages))
    assert len(trainer.fit(loader(), 2)) == len(expected)
    assert same(before, nn.ModuleList(trainer.stages).state_dict())


def test_greedy_training_that_is_over_says_so(caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_for(GreedyTrainer, network())
    with caplog.at_level(logging.WARNING):
        trainer.fit(loader(), 1)
        assert not caplog.records
        assert len(trainer.fit(loader(), 5)) == 3  # stages that are done keep their epochs
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == "all 3 stages are trained; nothing is left to do"
    with pytest.raises(RuntimeError, match="all 3 stages are trained; there is none that a step could train"):
        trainer.step(*arrays())


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_loader_that_cannot_be_resumed_exactly_is_named(
    persistent: bool, wrapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data: Any = loader(num_workers=1, persistent_workers=persistent)
    trainer = trainer_for(LocalTrainer, network())
    with caplog.at_level(logging.WARNING):
        trainer.fit(Around(data) if wrapped else data, 2)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("persistent_workers=True" in message for message in messages) == persistent


class Around:
    """A loader around another one."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def test_records_of_greedy_training_evaluate_the_stages_before() -> None:
    for record in trainer_for(GreedyTrainer, network()).fit(loader(), 1, loader()):
        (stage,) = record["stages"]
        lengths = [len(record[f"{part}_{name}"]) for part in ("train", "val") for name in ("loss", "accuracy")]
        assert lengths == [1, 1, stage + 1, stage + 1]


def test_a_loaded_trainer_shares_nothing_with_the_saved_one() -> None:
    first, second = trainer_for(LocalTrainer, network(), adam), trainer_for(LocalTrainer, network(), adam)
    first.fit(loader(), 1)
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.optimizers[0].state_dict()["state"])
    second.fit(loader(), 2)
    after = first.optimizers[0].state_dict()["state"]
    assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])
    assert len(first.history) == 1


def test_states_of_something_else_are_refused() -> None:
    state = trainer_for(LocalTrainer, network()).state_dict()
    with pytest.raises(ValueError, match="the state is of a LocalTrainer; this is a JointTrainer"):
        trainer_for(JointTrainer, network()).load_state_dict(state)
    with pytest.raises(ValueError, match="the state has 3 stages; this trainer has 2"):
        trainer_for(LocalTrainer, list(network())[:2]).load_state_dict(state)
    constant = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer)  # noqa: E731
    with pytest.raises(ValueError, match="the state has 0 schedulers; this trainer has 3"):
        trainer_for(LocalTrainer, network(), scheduler=constant).load_state_dict(state)
    trained, data = resumable(LocalTrainer, own_generator=True)
    trained.fit(data, 1)
    other, _ = resumable(LocalTrainer, own_generator=True)
    other.load_state_dict(trained.state_dict())
    with pytest.raises(ValueError, match="loader has 0 generators of its own but the saved state has 1"):
        other.fit(loader(), 2)
