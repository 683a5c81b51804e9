"""Callbacks: when they are called, the table of the history, TensorBoard."""

from __future__ import annotations

import csv
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from layerwise_ext.nn import FunctionHead
from layerwise_ext.train import (
    Callback,
    CSVLogger,
    GreedyTrainer,
    JointTrainer,
    LocalTrainer,
    TensorBoardLogger,
    Trainer,
)
from test_train import TRAINERS, loader, network, trainer_for


class Recorder(Callback):
    def __init__(self, name: str, events: list[Any]) -> None:
        self.name, self.events = name, events

    def on_fit_start(self, trainer: Trainer) -> None:
        self.events.append((self.name, "start", trainer.epoch))

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        assert record is trainer.history[-1] and record["epoch"] == trainer.epoch
        self.events.append((self.name, "epoch", trainer.epoch))

    def on_fit_end(self, trainer: Trainer) -> None:
        self.events.append((self.name, "end", trainer.epoch))


def test_callbacks_are_called_in_turn() -> None:
    events: list[Any] = []
    trainer = trainer_for(JointTrainer, network())
    recorders = [Recorder("a", events), Recorder("b", events), Callback()]
    trainer.fit(loader(), 1, on_epoch_end=lambda *_: events.append("function"), callbacks=recorders)
    first = [("a", "start", 0), ("b", "start", 0), ("a", "epoch", 1), ("b", "epoch", 1), "function"]
    assert events == [*first, ("b", "end", 1), ("a", "end", 1)]
    events.clear()
    trainer.fit(loader(), 2, callbacks=recorders[:1])
    assert events == [("a", "start", 1), ("a", "epoch", 2), ("a", "end", 2)]


def test_the_end_comes_with_an_exception_too() -> None:
    events: list[Any] = []

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_for(JointTrainer, network()).fit(loader(), 2, None, interrupt, [Recorder("a", events)])
    assert events == [("a", "start", 0), ("a", "epoch", 1), ("a", "end", 1)]
    with pytest.raises(TypeError, match=r"callbacks\[0\] is function; a train.Callback is needed"):
        trainer_for(JointTrainer, network()).fit(loader(), 1, callbacks=[interrupt])  # type: ignore[list-item]


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_table_is_the_history(kind: type[Trainer], tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    trainer = trainer_for(kind, network())
    trainer.fit(loader(), 1, loader(), callbacks=[CSVLogger(path)])
    trainer.fit(loader(), 2, loader(), callbacks=[CSVLogger(path)])
    rows = list(csv.DictReader(path.open()))
    expected = [
        (record["epoch"], stage, record["train_loss"][i], record["val_loss"][record["val_loss"].index(loss)])
        for record in trainer.history
        for i, stage in enumerate(record["stages"])
        for loss in [record["val_loss"][-1 if kind is not LocalTrainer else stage]]
    ]
    found = [(int(r["epoch"]), int(r["stage"]), float(r["train_loss"]), float(r["val_loss"])) for r in rows]
    assert found == expected
    assert all(0 <= float(row["val_accuracy"]) <= 1 and float(row["seconds"]) > 0 for row in rows)


def test_the_table_without_evaluation(tmp_path: Path) -> None:
    trainer_for(JointTrainer, network()).fit(loader(), 1, callbacks=[CSVLogger(tmp_path / "a.csv", val_name="test")])
    (row,) = csv.DictReader((tmp_path / "a.csv").open())
    assert row["test_loss"] == row["test_accuracy"] == "" and row["stage"] == "2"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for torch.utils.tensorboard, which needs a package that may not be there."""
    events: list[Any] = []

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int) -> None:
            events.append((log_dir, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            events.append((tag, value, step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            events.append("close")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return events


def test_tensorboard_gets_each_trained_stage(events: list[Any], tmp_path: Path) -> None:
    stages = list(network())
    stages[0].head = FunctionHead(lambda moments, target: moments.mean.square().mean())
    trainer = trainer_for(GreedyTrainer, stages)
    (first, second, _) = trainer.fit(loader(), 1, loader(), callbacks=[TensorBoardLogger(tmp_path)])
    assert math.isnan(first["val_accuracy"][0])
    assert events[:4] == [
        (str(tmp_path), 1),
        ("train_loss/stage0", first["train_loss"][0], 1),
        ("val_loss/stage0", first["val_loss"][0], 1),
        ("train_loss/stage1", second["train_loss"][0], 2),
    ]
    assert ("val_accuracy/stage1", second["val_accuracy"][1], 2) in events
    assert events[-1] == "close" and len(events) == 1 + 2 + 4 + 4 + 1
    trainer = trainer_for(JointTrainer, network())
    trainer.fit(loader(), 1)
    trainer.fit(loader(), 2, callbacks=[TensorBoardLogger(tmp_path)])
    assert (str(tmp_path), 2) in events


def test_tensorboard_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"TensorBoardLogger needs tensorboard .*: pip install tensorboard"):
        TensorBoardLogger(tmp_path)
