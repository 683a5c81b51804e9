"""``layerwise-ext train``."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from layerwise_ext.cli import config, experiment, processes, run_folder, trainers
from layerwise_ext.cli.common import FAILED, INTERRUPTED, OK, UsageError, installed, set_threads
from layerwise_ext.cli.options import OPTIONS, add_options, flag
from layerwise_ext.cli.run_folder import Keeper, RunFolder

if TYPE_CHECKING:
    from layerwise_ext.cli.common import Commands
    from layerwise_ext.data import MemoryLoader
    from layerwise_ext.models import StagedModel
    from layerwise_ext.train import AutoencoderPretrainer, Trainer
    from layerwise_ext.train.evaluation import Batches


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("train", help="train a network on your data")
    parser.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG",
        help="a YAML or TOML file with the options below as keys, such as config.yaml of a run; flags go over it",
    )  # fmt: skip
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from layerwise_ext import data, nn, train

    arguments = config.complete(arguments)
    _check(arguments)
    processes.check(arguments)
    trainers.check(arguments)
    folder = RunFolder(arguments.output or Path("runs") / run_folder.default_name(arguments))
    folder.check(arguments)
    set_threads(arguments.threads)
    torch.manual_seed(arguments.seed)  # of the noise in pretraining; networks and loaders have their own generators
    try:
        info = data.info(arguments.data, arguments.data_dir, image_size=arguments.image_size)
        images = experiment.load_images(arguments)
        normalization = data.Normalization.of(images.train.images)
        settings: dict[str, Any] = {
            "shuffle": True,
            "drop_last": True,
            "augment": experiment.augmentation(arguments, info, normalization),
            "seed": arguments.seed,
        }
        loader = data.MemoryLoader(
            images.train,
            arguments.batch_size,
            normalization,
            classes_per_batch=arguments.classes_per_batch,
            **settings,
        )
        unlabelled = loader
        if arguments.pretrain_on != "train":
            more = experiment.pretraining_images(arguments, info)
            unlabelled = data.MemoryLoader(more, arguments.batch_size, normalization, **settings)
        test_loader, val_loader = (
            None if split is None else data.MemoryLoader(split, min(512, len(split.labels)), normalization)
            for split in (images.test, images.validation)
        )
        assert test_loader is not None
        network = experiment.network(arguments, info, normalization)
        model = experiment.build_model(network)
        count, size = len(images.train.labels), arguments.batch_size
        spread = torch.arange(size) * count // size  # files may be sorted by class
        experiment.initialize_model(arguments, model, normalization.apply(images.train.images[spread]))
    except (data.DataError, ValueError) as error:
        raise UsageError(str(error)) from error
    batches: Batches = loader
    if arguments.head == "goodness":
        batches = train.LabelledPairs(loader, info.num_classes, seed=arguments.seed)
    table = train.CSVLogger(folder.metrics, val_name="test" if val_loader is None else "validation")
    group = processes.group_of(arguments)
    if group is not None and arguments.sync_batch_norm:
        nn.convert_sync_batchnorm(model)
    trainer = trainers.trainer_of(arguments, model, group)
    texts = run_folder.metadata(arguments, network)
    keeper = Keeper(folder, trainer, val_loader or test_loader, table, texts)
    status = _fit(arguments, keeper, trainers.pretrainer_of(arguments, model, group), unlabelled, batches)
    if status == OK and processes.is_first():
        _test(arguments, keeper, test_loader)
    return status


def _check(arguments: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: options that have no meaning together, packages that are missing.
    """
    if arguments.mode == "joint" and arguments.head != "pooled_linear" and arguments.deep_supervision is None:
        raise UsageError(f"--head is {arguments.head!r}, but --mode joint has no local losses; leave it out")
    experiment.check_limit(arguments.data, arguments.limit_train)
    for name, each in OPTIONS.items():
        if getattr(arguments, name) != each.default and arguments.mode not in each.modes:
            raise UsageError(f"{flag(name)} is for --mode {' or '.join(each.modes)}, not {arguments.mode}")
    for name, has_meaning, where in (
        ("head_depth", arguments.head == "conv", "--head conv"),
        ("beta", arguments.head.startswith("predsim"), "--head predsim and predsim_projected"),
        ("buffer", arguments.asynchronous, "--mode decoupled --asynchronous"),
        ("cache_dir", arguments.cache, "--cache"),
        ("cache_limit", arguments.cache, "--cache"),
        ("pretrain_epochs", arguments.pretrain, "--pretrain"),
        ("pretrain_on", arguments.pretrain, "--pretrain"),
        ("pretrain_noise", arguments.pretrain == "denoising", "--pretrain denoising"),
        ("pretrain_tied", arguments.pretrain, "--pretrain"),
        ("nesterov", arguments.optimizer == "sgd", "--optimizer sgd"),
        ("lr_milestones", arguments.lr_schedule == "constant", "--lr-schedule constant"),
        ("lr_decay", arguments.lr_milestones, "--lr-milestones"),
    ):
        if getattr(arguments, name) != OPTIONS[name].default and not has_meaning:
            raise UsageError(f"{flag(name)} is for {where}; leave it out")
    installed("yaml", "a run folder")
    installed("safetensors", "a run folder")
    if arguments.tensorboard:
        installed("torch.utils.tensorboard", "--tensorboard", "tensorboard")


def _fit(
    arguments: argparse.Namespace,
    keeper: Keeper,
    pretrainer: AutoencoderPretrainer | None,
    unlabelled: MemoryLoader,
    batches: Batches,
) -> int:
    """Pretraining on ``unlabelled``, then training on ``batches``, or what is left of them."""
    from layerwise_ext._replicas import LinkError
    from layerwise_ext.train import TensorBoardLogger

    folder, trainer = keeper.folder, keeper.trainer
    if arguments.resume and folder.checkpoint.is_file():
        pretrainer = _resume(keeper, pretrainer)
        _check_epochs(arguments, keeper)
    if processes.is_first():
        folder.begin(arguments)
        if keeper.trainer.epoch > 0:
            keeper.write()
    name = "test" if arguments.validation is None else "validation"

    def on_epoch_end(trainer: Trainer, record: dict[str, Any]) -> None:
        keeper.on_epoch_end(trainer, record)
        print(_describe(record, name), flush=True)

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        if pretrainer is not None:
            _pretrain(arguments, folder, pretrainer, unlabelled)
        callbacks = [TensorBoardLogger(folder.tensorboard)] if arguments.tensorboard else []
        trainer.fit(batches, arguments.epochs, keeper.loader, on_epoch_end, callbacks)
    except KeyboardInterrupt:
        epoch = f"epoch {trainer.epoch}"
        if pretrainer is not None and trainer.epoch == 0:
            epoch = f"epoch {pretrainer.epoch} of pretraining"
        if processes.is_first():
            print(f"\ninterrupted after {epoch}; go on with the same command and --resume", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        if arguments.mode != "decoupled" and not isinstance(error, LinkError):
            raise
        print(f"layerwise-ext: error: {error}", file=sys.stderr)  # of a worker, with its traceback if it has one
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, before)
    return OK


def _resume(keeper: Keeper, pretrainer: AutoencoderPretrainer | None) -> AutoencoderPretrainer | None:
    """Load the checkpoint; with what is left to pretrain, if anything is."""
    from layerwise_ext import checkpoint

    path = keeper.folder.checkpoint
    try:
        state = checkpoint.load(path)
        if pretrainer is not None and state["trainer"] == type(pretrainer).__name__:
            pretrainer.load_state_dict(state)
            _say(f"resumed after epoch {pretrainer.epoch} of pretraining, of {keeper.folder.path}")
            return pretrainer
        keeper.load(state)
    except Exception as error:  # torch.load has no error type of its own for a damaged file
        raise UsageError(f"--resume: {path} cannot be used ({error})") from error
    _say(f"resumed after epoch {keeper.trainer.epoch} of {keeper.folder.path}")
    return None


def _check_epochs(arguments: argparse.Namespace, keeper: Keeper) -> None:
    """
    Raises:
        UsageError: fewer epochs than are done, or others than the stages had that are done.
    """
    folder, trainer = keeper.folder, keeper.trainer
    if getattr(trainer, "stage", 0) > 0:  # of greedy training
        epochs = folder.options().epochs
        if arguments.epochs != epochs:
            raise UsageError(
                f"--resume: --epochs is {arguments.epochs}, but the run in {folder.path} has stages with {epochs}"
            )
    elif arguments.epochs < trainer.epoch:
        raise UsageError(
            f"--resume: --epochs is {arguments.epochs}, but {trainer.epoch} of the run in {folder.path} are done"
        )


def _pretrain(
    arguments: argparse.Namespace, folder: RunFolder, pretrainer: AutoencoderPretrainer, loader: MemoryLoader
) -> None:
    from layerwise_ext import checkpoint
    from layerwise_ext.train import CSVLogger

    table = CSVLogger(folder.pretraining)

    def on_epoch_end(pretrainer: Trainer, record: dict[str, Any]) -> None:
        checkpoint.save(folder.checkpoint, pretrainer.state_dict())
        table.write(pretrainer.history)
        loss, seconds = record["train_loss"][0], record["seconds"]
        layer = record["stages"][0]
        print(f"pretraining, epoch {record['epoch']}: layer {layer}, loss {loss:.4f}, {seconds:.1f} s", flush=True)

    epochs = arguments.pretrain_epochs or trainers.PRETRAIN_EPOCHS
    pretrainer.fit(loader, epochs, on_epoch_end=on_epoch_end)
    if processes.is_first():
        table.write(pretrainer.history)  # of a run that was killed before it did


def _test(arguments: argparse.Namespace, keeper: Keeper, loader: MemoryLoader) -> None:
    """The only look at the test images, if there are others to choose by."""
    from layerwise_ext import checkpoint

    folder, trainer = keeper.folder, keeper.trainer
    scores = trainer.evaluate(loader, ensemble=arguments.ensemble)
    best: dict[str, Any] = {**(keeper.best or {}), "accuracy_on": keeper.metadata["accuracy_on"]}
    if arguments.validation is None:
        best["test_accuracy"] = best["accuracy"]
    else:
        run_folder.load_into(_tested(trainer), folder.best)
        best["test_accuracy"] = trainer.evaluate(loader)["final"]
    accuracies = [None if math.isnan(value) else value for value in scores["accuracy"]]
    result = {"epoch": trainer.epoch, **scores, "accuracy": accuracies, "best": best}
    checkpoint.write_text(folder.result, json.dumps(result, indent=2) + "\n")
    together = f"; all heads together: {scores['ensemble']:.4f}" if arguments.ensemble else ""
    stages = " ".join(map(_number, scores["accuracy"]))
    print(f"test accuracy {scores['final']:.4f} ({scores['samples']} images; by stage: {stages}{together})")
    chosen = f"{best['accuracy']:.4f} of the {best['accuracy_on']}"
    print(f"best epoch {best['epoch']}, chosen by {chosen}: test accuracy {best['test_accuracy']:.4f}")
    print(f"written to {folder.path}")


def _say(text: str) -> None:
    if processes.is_first():
        print(text)


def _tested(trainer: Trainer) -> StagedModel:
    """What is evaluated: with --ema-decay the averages."""
    from layerwise_ext.models import StagedModel

    return StagedModel(trainer.ema_stages)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _describe(record: dict[str, Any], name: str) -> str:
    return (
        f"epoch {record['epoch']}: stage {record['stages'][-1]}, train loss {record['train_loss'][-1]:.4f}, "
        f"accuracy {_number(record['train_accuracy'][-1])}, {name} accuracy {_number(record['val_accuracy'][-1])}, "
        f"{record['seconds']:.1f} s"
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
