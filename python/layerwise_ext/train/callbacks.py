"""What is called while a trainer fits: base class, CSV file, TensorBoard."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise_ext import checkpoint
from layerwise_ext.train.metrics import Record

if TYPE_CHECKING:
    from layerwise_ext.train.common import Trainer


class Callback:
    """Base class; each method does nothing unless it is overridden. An exception ends ``fit``."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first epoch of a ``fit``, which may go on from an earlier one: ``trainer.epoch`` are done."""

    def on_epoch_end(self, trainer: Trainer, record: Record) -> None:
        """With everything up to date: a checkpoint of ``trainer.state_dict()`` written here continues with the next
        epoch. ``record`` is the last one of ``trainer.history``."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Behind the last epoch, and where ``fit`` ends in an exception."""


class FunctionCallback(Callback):
    """``function(trainer, record)`` at the end of each epoch."""

    def __init__(self, function: Callable[[Trainer, Record], None]) -> None:
        self._function = function

    def on_epoch_end(self, trainer: Trainer, record: Record) -> None:
        self._function(trainer, record)


class CSVLogger(Callback):
    """The history as a table: one row per epoch and trained stage.

    Columns ``epoch``, ``stage``, ``train_loss``, ``train_accuracy``, ``val_loss``, ``val_accuracy`` (of the stage's own
    head; ``nan`` of one without a classifier, empty without a ``val_loader``), ``seconds``. The file is replaced as a
    whole at the end of each epoch, epochs before a resumed run's included.

    Args:
        path: of the file, in a folder that exists.
        val_name: what stands for ``val`` in the names of the columns.
    """

    def __init__(self, path: str | Path, *, val_name: str = "val") -> None:
        self.path = Path(path)
        self.val_name = val_name

    def on_epoch_end(self, trainer: Trainer, record: Record) -> None:
        self.write(trainer.history)

    def write(self, history: Sequence[Record]) -> None:
        """The table of a whole history, such as that of a trainer which goes on from a checkpoint."""
        names = ["train_loss", "train_accuracy", f"{self.val_name}_loss", f"{self.val_name}_accuracy"]
        with checkpoint.replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", "stage", *names, "seconds"])
            for each in history:
                for stage, values in _by_stage(each):
                    columns = [values.get(name, "") for name in _METRICS]
                    writer.writerow([each["epoch"], stage, *columns, each["seconds"]])


class TensorBoardLogger(Callback):
    """Losses and accuracies of each trained stage for TensorBoard: ``val_loss/stage0`` and so on, by epoch.

    A resumed run hides what was logged of the epochs that it trains again.

    Args:
        folder: of the event files.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"TensorBoardLogger needs tensorboard ({error}): pip install tensorboard") from error
        self._make_writer = SummaryWriter
        self.folder = Path(folder)
        self._writer: Any = None

    def on_fit_start(self, trainer: Trainer) -> None:
        self._writer = self._make_writer(str(self.folder), purge_step=trainer.epoch + 1)

    def on_epoch_end(self, trainer: Trainer, record: Record) -> None:
        for stage, values in _by_stage(record):
            for name, value in values.items():
                if not math.isnan(value):
                    self._writer.add_scalar(f"{name}/stage{stage}", value, record["epoch"])
        self._writer.flush()

    def on_fit_end(self, trainer: Trainer) -> None:
        self._writer.close()


_METRICS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")


def _by_stage(record: Record) -> Iterator[tuple[int, dict[str, float]]]:
    """The metrics of each trained stage."""
    stages = record["stages"]
    for i, stage in enumerate(stages):
        # Greedy training evaluates the frozen stages, too, in front of those that are trained.
        yield stage, {name: record[name][i - len(stages)] for name in _METRICS if name in record}
