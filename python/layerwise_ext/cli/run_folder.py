"""The folder of a run: its options, its checkpoint, and what follows from that, metrics and weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise_ext.cli import config
from layerwise_ext.cli.common import UsageError, check_folder
from layerwise_ext.cli.options import DEFINING, OPTIONS, flag

if TYPE_CHECKING:
    from layerwise_ext.data import MemoryLoader
    from layerwise_ext.models import StagedModel
    from layerwise_ext.train import CSVLogger, Trainer

# Options that name a run and are no part of what it does.
_OF_CALLS = ("output", "resume")


def default_name(arguments: argparse.Namespace) -> str:
    parts = [arguments.data, arguments.model.replace(",", "_"), arguments.mode]
    for name in ("head", "downsampling", "init"):
        if getattr(arguments, name) != OPTIONS[name].default:
            parts.append(getattr(arguments, name).replace(",", "_"))
    if arguments.augment != "none":
        parts.append("augment")
    if arguments.cutout is not None:
        parts.append(f"cutout{arguments.cutout}")
    if arguments.pretrain is not None:
        parts.append(arguments.pretrain)
    return "-".join(parts)


class RunFolder:
    """Where the files of a run are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoint = path / "checkpoint.pt"
        self.metrics = path / "metrics.csv"
        self.pretraining = path / "pretraining.csv"
        self.last = path / "last.safetensors"
        self.best = path / "best.safetensors"
        self.result = path / "result.json"
        self.tensorboard = path / "tensorboard"

    def check(self, arguments: argparse.Namespace) -> None:
        """
        Raises:
            UsageError: no folder can be there, there is a run already, none to go on with, or another one.
        """
        check_folder(self.path)
        if not arguments.resume:
            if self.checkpoint.exists():
                raise UsageError(
                    f"{self.path} holds a run already; go on with --resume, or name another folder with --output"
                )
            return
        if self.path.is_dir() and not self._files():
            return  # of a run that was killed before it wrote anything
        if not self.path.is_dir() or not (self.config.is_file() or (self.path / "config.json").is_file()):
            raise UsageError(f"--resume: {self.config} does not exist, so there is no run to go on with")
        saved = self.options()
        for name in (*DEFINING, "epochs") if saved.lr_schedule == "cosine" else DEFINING:
            value, found = getattr(arguments, name), getattr(saved, name)
            if found != value:
                raise UsageError(f"--resume: {flag(name)} is {value!r}, but the run in {self.path} has {found!r}")

    def options(self) -> argparse.Namespace:
        """Those of the run; those that it did not know yet have their defaults.

        Raises:
            UsageError: there is no run here, or its options are damaged.
        """
        if not self.config.is_file() and (self.path / "config.json").is_file():
            raise UsageError(
                f"{self.path} holds a run of an earlier version, config.json in place of config.yaml; train it anew"
            )
        if not self.config.is_file():
            raise UsageError(f"{self.config} does not exist; name a run folder of train, or a file in one")
        return config.complete(argparse.Namespace(config=self.config))

    def begin(self, arguments: argparse.Namespace) -> None:
        """Make the folder, clear what a killed process has left half-written, write the options."""
        from layerwise_ext import checkpoint

        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.glob(".*.tmp"):
            path.unlink()
        values = {name: getattr(arguments, name) for name in OPTIONS if name not in _OF_CALLS}
        checkpoint.write_text(self.config, config.dump(values))

    def _files(self) -> list[Path]:
        return [path for path in self.path.iterdir() if path.suffix != ".tmp"]


class Keeper:
    """Writes the files of a run at the end of each epoch: the checkpoint, then what follows from it.

    A run that was killed between two of them writes those again when it goes on; what is in them is then the same.
    ``last`` and ``best`` are the epoch and the accuracy of the network on ``loader``, None before its output was
    trained: in greedy training that is the last stage's turn.
    """

    def __init__(
        self, folder: RunFolder, trainer: Trainer, loader: MemoryLoader, table: CSVLogger, metadata: dict[str, str]
    ) -> None:
        self.folder = folder
        self.trainer = trainer
        self.loader = loader
        self.table = table
        self.metadata = metadata
        self.last: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None

    def load(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)
        self.last, self.best = state["last"], state["best"]

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        from layerwise_ext import checkpoint

        if record["stages"][-1] == len(trainer.stages) - 1:
            accuracy = record["val_accuracy"][-1]
            if trainer.early_stopping is not None:  # it may have put weights back since
                accuracy = trainer.evaluate(self.loader)["final"]
            self.last = {"epoch": trainer.epoch, "accuracy": accuracy}
            if self.best is None or accuracy > self.best["accuracy"]:
                self.best = self.last
        checkpoint.save(self.folder.checkpoint, {**trainer.state_dict(), "last": self.last, "best": self.best})
        self.write()

    def write(self) -> None:
        """What follows from the checkpoint; the best weights are those of its epoch, or were written before it."""
        self.table.write(self.trainer.history)
        if self.last is not None:
            self._write_weights(self.folder.last, self.last)
        if self.best is not None and self.best == self.last:
            self._write_weights(self.folder.best, self.best)

    def _write_weights(self, path: Path, score: dict[str, Any]) -> None:
        """Of the network that was tested: with --ema-decay the averages."""
        from layerwise_ext import checkpoint
        from layerwise_ext.models import StagedModel

        tensors = StagedModel(self.trainer.ema_stages).backbone_state_dict()
        checkpoint.save_weights(path, tensors, {**{name: repr(n) for name, n in score.items()}, **self.metadata})


def metadata(arguments: argparse.Namespace, network: dict[str, Any]) -> dict[str, str]:
    """What a file of weights says besides epoch and accuracy: what that is the accuracy on, the arguments of the
    network, the options of the run."""
    options = {name: getattr(arguments, name) for name in DEFINING}
    return {
        "accuracy_on": "test images" if arguments.validation is None else "held-out training images",
        "network": json.dumps(network),
        "options": json.dumps({name: value for name, value in options.items() if value is not None}),
    }


def options_of(path: Path) -> argparse.Namespace:
    """Those of the run that a file is from: a file of weights has them itself, a checkpoint beside it.

    Raises:
        UsageError: there are none, or the file cannot be read.
    """
    from layerwise_ext import checkpoint

    if not path.exists():
        raise UsageError(f"{path} does not exist; name a run folder of train, or a file in one")
    if path.suffix != ".safetensors":
        return RunFolder(path.parent).options()
    try:
        _, texts = checkpoint.load_weights(path)
        values = json.loads(texts["options"])
    except Exception as error:  # safetensors has errors of several types
        raise UsageError(f"{path} cannot be used ({error})") from error
    options = config.complete(argparse.Namespace(config=None))
    vars(options).update(config.convert(str(path), values))
    return options


def load_into(model: StagedModel, path: Path) -> None:
    """Weights of a file of a run.

    Raises:
        UsageError: it is damaged, or of another network.
    """
    from layerwise_ext import checkpoint

    try:
        if path.suffix == ".safetensors":
            model.backbone().load_state_dict(checkpoint.load_weights(path)[0])
            return
        state = checkpoint.load(path)
        pretrains = state["trainer"] == "AutoencoderPretrainer"  # the layers so far; its heads are decoders
        averages = state["averages"] or [None] * len(state["stages"])
        for stage, values, average in zip(model, state["stages"], averages, strict=True):
            if average is not None and average["n_averaged"] > 0:  # what is evaluated
                values = _part(average, "module")
            if pretrains:
                stage.body.load_state_dict(_part(values, "body"))
            else:
                stage.load_state_dict(values)
    except Exception as error:  # torch.load has no error type of its own for a damaged file
        raise UsageError(f"{path} cannot be used ({error})") from error


def _part(state: dict[str, Any], name: str) -> dict[str, Any]:
    """Of a submodule."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
