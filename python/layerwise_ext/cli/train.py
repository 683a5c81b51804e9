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

from layerwise_ext.cli import experiment, run_folder
from layerwise_ext.cli.common import FAILED, INTERRUPTED, OK, UsageError, device_of, set_threads
from layerwise_ext.cli.options import DEFINING, OF_MODES, add_options, option

if TYPE_CHECKING:
    from layerwise_ext.cli.common import Commands
    from layerwise_ext.models import StagedModel
    from layerwise_ext.train import Trainer


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "train", help="train a network on your data", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from layerwise_ext import data, train

    if arguments.mode == "joint" and arguments.head != "pooled_linear" and arguments.deep_supervision is None:
        raise UsageError(f"--head is {arguments.head!r}, but --mode joint has no local losses; leave it out")
    experiment.check_limit(arguments.data, arguments.limit_train)
    for name, modes in OF_MODES.items():
        if getattr(arguments, name) and arguments.mode not in modes:
            raise UsageError(f"{option(name)} is for --mode {' or '.join(modes)}, not {arguments.mode}")
    if arguments.buffer is not None and not arguments.asynchronous:
        raise UsageError("--buffer is for --mode decoupled --asynchronous; leave it out")
    output = arguments.output or Path("runs") / run_folder.default_name(arguments)
    settings = {name: getattr(arguments, name) for name in DEFINING}
    run_folder.check(output, settings, arguments.resume)
    set_threads(arguments.threads)
    try:
        info = data.info(arguments.data, arguments.data_dir, image_size=arguments.image_size)
        train_split, test_split = experiment.splits(arguments)
        normalization = data.Normalization.of(train_split.images)
        loader = data.MemoryLoader(
            train_split,
            arguments.batch_size,
            normalization,
            shuffle=True,
            drop_last=True,
            augment=experiment.augmentation(arguments, info, normalization),
            classes_per_batch=arguments.classes_per_batch,
            seed=arguments.seed,
        )
        test_loader = data.MemoryLoader(test_split, min(512, len(test_split.labels)), normalization)
        model = experiment.build_model(arguments, tuple(train_split.images.shape[1:]), info.num_classes, normalization)
        count, size = len(train_split.labels), arguments.batch_size
        spread = torch.arange(size) * count // size  # files may be sorted by class
        experiment.initialize_model(arguments, model, normalization.apply(train_split.images[spread]))
    except (data.DataError, ValueError) as error:
        raise UsageError(str(error)) from error
    if arguments.head == "goodness":
        pairs = train.LabelledPairs(loader, info.num_classes, seed=arguments.seed)
        return _fit(arguments, output, settings, model, pairs, test_loader)
    return _fit(arguments, output, settings, model, loader, test_loader)


def _trainer(arguments: argparse.Namespace, model: StagedModel) -> Trainer:
    import torch

    from layerwise_ext import train

    optimizers = {
        "adam": lambda parameters: torch.optim.Adam(parameters, lr=arguments.lr),
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=arguments.lr, momentum=0.9),
    }
    kinds = {
        "joint": train.JointTrainer,
        "local": train.LocalTrainer,
        "greedy": train.GreedyTrainer,
        "decoupled": train.DecoupledTrainer,
    }
    options: dict[str, Any] = {name: getattr(arguments, name) for name in OF_MODES if getattr(arguments, name)}
    if arguments.mode == "decoupled":
        options.setdefault("workers", 2)
    try:
        if "blocks" in options:
            options["blocks"] = [int(size) for size in arguments.blocks.split(",")]
    except ValueError as error:
        raise UsageError(f"--blocks is {arguments.blocks!r}; numbers of stages such as 2,2,1 are allowed") from error
    if arguments.patience is not None:
        options["early_stopping"] = train.EarlyStopping(arguments.patience)
    try:
        return kinds[arguments.mode](
            model,
            optimizers[arguments.optimizer],
            device=device_of(arguments.device),
            autocast_dtype=torch.bfloat16 if arguments.dtype == "bfloat16" else None,
            seed=arguments.seed,
            cuda_graph=arguments.cuda_graph,
            accumulate=arguments.accumulate,
            clip_norm=arguments.clip_norm,
            ema_decay=arguments.ema_decay,
            **options,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _fit(
    arguments: argparse.Namespace,
    output: Path,
    settings: dict[str, Any],
    model: StagedModel,
    loader: Any,
    test_loader: Any,
) -> int:
    from layerwise_ext import checkpoint
    from layerwise_ext.models import StagedModel
    from layerwise_ext.train import CSVLogger

    trainer = _trainer(arguments, model)
    checkpoint_path = output / "checkpoint.pt"
    if arguments.resume and checkpoint_path.is_file():
        try:
            trainer.load_state_dict(checkpoint.load(checkpoint_path))
        except Exception as error:  # torch.load has no error type of its own for a damaged file
            raise UsageError(f"--resume: {checkpoint_path} cannot be used ({error})") from error
        print(f"resumed after epoch {trainer.epoch} of {output}")
    output.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(output / "config.json", json.dumps(settings, indent=2) + "\n")

    def on_epoch_end(trainer: Trainer, record: dict[str, Any]) -> None:
        checkpoint.save(checkpoint_path, trainer.state_dict())
        print(_describe(record), flush=True)

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        table = CSVLogger(output / "metrics.csv", val_name="test")
        trainer.fit(loader, arguments.epochs, test_loader, on_epoch_end, [table])
    except KeyboardInterrupt:
        print(f"\ninterrupted after epoch {trainer.epoch}; go on with the same command and --resume", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        if arguments.mode != "decoupled":
            raise
        print(f"layerwise-ext: error: {error}", file=sys.stderr)  # of a worker, with its traceback if it has one
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, before)
    tested = StagedModel(trainer.ema_stages)  # with --ema-decay the averages, otherwise the model
    checkpoint.save(output / "backbone.pt", tested.backbone_state_dict())
    scores = trainer.evaluate(test_loader)
    stages = " ".join(map(_number, scores["accuracy"]))
    print(f"test accuracy {scores['final']:.4f} ({scores['samples']} images; by stage: {stages}); written to {output}")
    return OK


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _describe(record: dict[str, Any]) -> str:
    return (
        f"epoch {record['epoch']}: stage {record['stages'][-1]}, train loss {record['train_loss'][-1]:.4f}, "
        f"accuracy {_number(record['train_accuracy'][-1])}, test accuracy {_number(record['val_accuracy'][-1])}, "
        f"{record['seconds']:.1f} s"
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
