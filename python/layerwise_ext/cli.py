"""The command ``layerwise-ext``: demo, train, probe, bench, info."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    import torch

    from layerwise_ext.data import Augment, Info, Normalization, Split
    from layerwise_ext.models import StagedModel
    from layerwise_ext.train import Trainer

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
MODES = ("joint", "local", "greedy", "decoupled")
INITS = ("default", "lsuv", "data_dependent")
# Options of `train` that decide what is computed: a resumed run must have the same ones.
DEFINING = ("data", "model", "width_multiplier", "downsampling", "head", "activation", "init", "mode", "batch_size",
            "lr", "optimizer", "dtype", "seed", "limit_train", "plain", "image_size", "augment", "cutout",
            "classes_per_batch", "accumulate", "clip_norm", "ema_decay", "patience", "blocks", "deep_supervision",
            "workers", "asynchronous", "buffer")  # fmt: skip
# Options of `train` that only some modes have.
OF_MODES = {"blocks": ("local",), "deep_supervision": ("joint", "local"), "checkpointing": ("joint",),
            "workers": ("decoupled",), "asynchronous": ("decoupled",), "buffer": ("decoupled",)}  # fmt: skip
# Of data.NAMES, which is not imported for --help.
DATA = (
    "digits",
    "mnist",
    "fashion-mnist",
    "kmnist",
    "cifar10",
    "cifar10-jpeg",
    "cifar100",
    "cifar100-coarse",
    "svhn",
    "stl10",
    "image-folder",
)
# Of models.vgg, which is not imported for --help.
HEADS = (
    "pooled_linear",
    "similarity",
    "similarity_projected",
    "predsim",
    "predsim_projected",
    "contrastive",
    "conv",
    "mlp_sr",
    "auglocal",
)


class UsageError(Exception):
    """Something that the user can mend; shown without a traceback."""


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it: "invalid positive int value"
    return parse


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="layerwise-ext",
        description="Layer-wise and joint training of convolutional networks with fused operators.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,train,probe,bench,info}")
    defaults = argparse.ArgumentDefaultsHelpFormatter

    demo = commands.add_parser("demo", help="train on scikit-learn's digits in three ways, compare with plain PyTorch",
                               formatter_class=defaults)  # fmt: skip
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of the picture and the table")
    demo.add_argument("--threads", type=_positive(int), help="default: all cores")
    demo.add_argument("--quick", action="store_true", help="one seed, one epoch: shows that it runs")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train a network on your data", formatter_class=defaults)
    train.add_argument("--data", choices=DATA, default="digits")
    train.add_argument("--data-dir", type=Path, help="folder of the data files; default: $LAYERWISE_DATA")
    train.add_argument("--image-size", type=_positive(int), metavar="N",
                       help="of image-folder: its images are cut and resized to NxN")  # fmt: skip
    train.add_argument("--model", default="vgg8b",
                       help="vgg8b, vgg11b, vgg11 to vgg19, resnet18 to resnet152, resnet20 to resnet110, cnn, or "
                       "widths and pools such as 32,M,64,M")  # fmt: skip
    train.add_argument("--width-multiplier", type=_positive(float), default=1.0)
    train.add_argument("--downsampling", default="standard",
                       help="where the resolution halves: standard, accelerated, or units such as 1,3,4,5")  # fmt: skip
    train.add_argument("--mode", choices=MODES, default="local")
    train.add_argument("--head", choices=HEADS, default="pooled_linear", help="the local loss of the stages")
    train.add_argument("--activation", choices=("relu", "leaky_relu"), default="relu")
    train.add_argument("--init", choices=INITS, default="default",
                       help="initial weights: as usual, or from BATCH_SIZE images")  # fmt: skip
    train.add_argument("--epochs", type=_positive(int), default=10, help="in all; for greedy, per stage")
    train.add_argument("--batch-size", type=_positive(int), default=128)
    train.add_argument("--lr", type=_positive(float), default=5e-4)
    train.add_argument("--optimizer", choices=("adam", "sgd"), default="adam")
    train.add_argument("--accumulate", type=_positive(int), default=1, metavar="N", help="batches to an update")
    train.add_argument("--clip-norm", type=_positive(float), help="largest norm of the gradients of an optimiser")
    train.add_argument("--ema-decay", type=_positive(float), help="test and keep averaged weights, with this decay")
    train.add_argument("--patience", type=_positive(int), metavar="N",
                       help="end a stage after N epochs without a smaller test loss, and go back to the best one; "
                       "accuracies are then those of weights that were chosen on the test images")  # fmt: skip
    train.add_argument("--blocks", help="local: stages that are trained jointly, such as 2,2,1")
    train.add_argument("--deep-supervision", type=_positive(float), metavar="WEIGHT",
                       help="joint, or local with --blocks: of the hidden heads' losses")  # fmt: skip
    train.add_argument("--checkpointing", action="store_true", help="joint: run stages again in the backward pass")
    train.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    train.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    train.add_argument("--cuda-graph", action="store_true", help="run each step as a CUDA graph (see Trainer)")
    train.add_argument("--threads", type=_positive(int), help="default: all cores")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--limit-train", type=_positive(int), metavar="N", help="use the first N training images")
    train.add_argument("--augment", choices=("none", "standard"), default="none",
                       help="standard: random crops and flips as usual for the data set")  # fmt: skip
    train.add_argument("--cutout", type=_positive(int), metavar="N", help="cover a random square of NxN pixels")
    train.add_argument("--classes-per-batch", type=_positive(int), metavar="K",
                       help="images of exactly K classes in each batch")  # fmt: skip
    train.add_argument("--workers", type=_positive(int), metavar="K", help="processes of --mode decoupled; default: 2")
    train.add_argument("--asynchronous", action="store_true", default=None, help="for decoupled: from replay buffers")
    train.add_argument("--buffer", type=_positive(int), metavar="N", help="batches in such a buffer; default: 16")
    train.add_argument("--plain", action="store_true", help="plain PyTorch layers instead of the fused ones")
    train.add_argument("--output", type=Path, help="run folder; default: runs/DATA-MODEL-MODE")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in the run folder")
    train.set_defaults(run=_train)

    probe = commands.add_parser("probe", help="how well each stage of a trained network separates the classes",
                                formatter_class=defaults)  # fmt: skip
    probe.add_argument("checkpoint", type=Path, help="run folder of `train`, or its checkpoint.pt or backbone.pt")
    probe.add_argument("--data-dir", type=Path, help="folder of the data files; default: $LAYERWISE_DATA")
    probe.add_argument("--limit-train", type=_positive(int), metavar="N", help="use the first N training images")
    probe.add_argument("--dim", type=_positive(int), default=1024, help="features of a stage, after pooling")
    probe.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    probe.add_argument("--threads", type=_positive(int), help="default: all cores")
    probe.add_argument("--output", type=Path, help="table as CSV; default: separability.csv in the run folder")
    probe.set_defaults(run=_probe)

    bench = commands.add_parser("bench", help="benchmark the training step of a stage", add_help=False)
    bench.set_defaults(run=_bench)
    info = commands.add_parser("info", help="what was built, for what, and why CUDA is or is not in")
    info.set_defaults(run=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when a worker is lost, 2 for bad arguments or data, 130 when interrupted."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        status: int = arguments.run(arguments)
        return status
    except UsageError as error:
        print(f"layerwise-ext: error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("layerwise-ext: interrupted", file=sys.stderr)
        return INTERRUPTED


def _info(arguments: argparse.Namespace) -> int:
    from layerwise_ext import _info

    print(_info.report())
    return OK


def _bench(arguments: argparse.Namespace) -> int:
    script = Path("benchmarks/bench_stage.py")
    if not script.is_file():
        raise UsageError("the benchmarks are not installed with the package: run this in its source folder")
    return subprocess.run([sys.executable, str(script), *arguments.rest], check=False).returncode


def _demo(arguments: argparse.Namespace) -> int:
    from layerwise_ext import demo

    _set_threads(arguments.threads)
    demo.run(arguments.output, quick=arguments.quick)
    return OK


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


# -- train -------------------------------------------------------------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    import torch

    from layerwise_ext import data

    if arguments.mode == "joint" and arguments.head != "pooled_linear" and arguments.deep_supervision is None:
        raise UsageError(f"--head is {arguments.head!r}, but --mode joint has no local losses; leave it out")
    _check_limit(arguments.data, arguments.limit_train)
    for name, modes in OF_MODES.items():
        if getattr(arguments, name) and arguments.mode not in modes:
            raise UsageError(f"{_option(name)} is for --mode {' or '.join(modes)}, not {arguments.mode}")
    if arguments.buffer is not None and not arguments.asynchronous:
        raise UsageError("--buffer is for --mode decoupled --asynchronous; leave it out")
    output = arguments.output or Path("runs") / _run_name(arguments)
    settings = {name: getattr(arguments, name) for name in DEFINING}
    _check_run_folder(output, settings, arguments.resume)
    _set_threads(arguments.threads)
    try:
        info = data.info(arguments.data, arguments.data_dir, image_size=arguments.image_size)
        train_split, test_split = _splits(arguments)
        normalization = data.Normalization.of(train_split.images)
        loader = data.MemoryLoader(
            train_split,
            arguments.batch_size,
            normalization,
            shuffle=True,
            drop_last=True,
            augment=_augment(arguments, info, normalization),
            classes_per_batch=arguments.classes_per_batch,
            seed=arguments.seed,
        )
        test_loader = data.MemoryLoader(test_split, min(512, len(test_split.labels)), normalization)
        model = _model(arguments, tuple(train_split.images.shape[1:]), info.num_classes)
        count, size = len(train_split.labels), arguments.batch_size
        spread = torch.arange(size) * count // size  # files may be sorted by class
        _initialize(arguments, model, normalization.apply(train_split.images[spread]))
    except (data.DataError, ValueError) as error:
        raise UsageError(str(error)) from error
    return _fit(arguments, output, settings, model, loader, test_loader)


def _augment(arguments: argparse.Namespace, info: Info, normalization: Normalization) -> Augment | None:
    from layerwise_ext import data

    if arguments.augment == "none" and arguments.cutout is None:
        return None
    options = {"cutout": arguments.cutout, "cutout_fill": tuple((255 * normalization.mean).tolist())}
    if arguments.augment == "none":
        return data.Augment(0, False, **options)
    return data.standard_augment(info, **options)


def _splits(arguments: argparse.Namespace) -> tuple[Split, Split]:
    from layerwise_ext import data

    train_split, test_split = (
        data.load(arguments.data, arguments.data_dir, split, image_size=arguments.image_size)
        for split in ("train", "test")
    )
    return _first(train_split, arguments.limit_train), test_split


def _first(split: Split, count: int | None) -> Split:
    return split if count is None else type(split)(*(part[:count] for part in split))


def _check_limit(name: str, limit: int | None) -> None:
    if name == "image-folder" and limit is not None:
        raise UsageError("--limit-train takes the first images, which in an image-folder are all of the first classes")


def _run_name(arguments: argparse.Namespace) -> str:
    parts = [arguments.data, arguments.model.replace(",", "_"), arguments.mode]
    for name, usual in (("head", "pooled_linear"), ("downsampling", "standard"), ("init", "default")):
        if getattr(arguments, name) != usual:
            parts.append(getattr(arguments, name).replace(",", "_"))
    if arguments.augment != "none":
        parts.append("augment")
    if arguments.cutout is not None:
        parts.append(f"cutout{arguments.cutout}")
    return "-".join(parts)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_run_folder(output: Path, settings: dict[str, Any], resume: bool) -> None:
    config_path, checkpoint_path = output / "config.json", output / "checkpoint.pt"
    if not resume:
        if checkpoint_path.exists():
            raise UsageError(f"{output} holds a run already; go on with --resume, or name another folder with --output")
        return
    if not config_path.is_file():
        raise UsageError(f"--resume: {config_path} does not exist, so there is no run to go on with")
    saved = _settings_of(output)
    for name, value in settings.items():
        found = getattr(saved, name)
        if found != value:
            raise UsageError(f"--resume: {_option(name)} is {value!r}, but the run in {output} has {found!r}")


def _model(arguments: argparse.Namespace, shape: tuple[int, ...], num_classes: int) -> StagedModel:
    from layerwise_ext import models

    downsampling: str | list[int] = arguments.downsampling
    if arguments.downsampling not in ("standard", "accelerated"):
        try:
            downsampling = [int(unit) for unit in arguments.downsampling.split(",")]
        except ValueError as error:
            raise ValueError(
                f"downsampling is {arguments.downsampling!r}; allowed: standard, accelerated, or units such as 1,3,4,5"
            ) from error
    config: str | list[int | str] = arguments.model
    if "," in arguments.model or arguments.model.isdigit():
        try:
            config = [item if item == "M" else int(item) for item in arguments.model.split(",")]
        except ValueError as error:
            raise ValueError(f"model is {arguments.model!r}; widths and M, such as 32,M,64, are allowed") from error
    channels, *size = shape
    options: dict[str, Any] = {
        "in_channels": channels,
        "num_classes": num_classes,
        "image_size": (size[0], size[1]),
        "width_multiplier": arguments.width_multiplier,
        "downsampling": downsampling,
        "fused": not arguments.plain,
        "head": arguments.head,
        "activation": arguments.activation,
        "seed": arguments.seed,
    }
    if arguments.model == "cnn":
        return models.cnn(**options)
    if arguments.model in models.RESNET_CONFIGS:
        return models.resnet(arguments.model, **options)
    if isinstance(config, str) and config not in models.VGG_CONFIGS:
        names = ", ".join([*models.VGG_CONFIGS, *models.RESNET_CONFIGS])
        raise ValueError(f"model is {config!r}; allowed: {names}, cnn, or widths and pools such as 32,M,64")
    return models.vgg(config, **options)


def _initialize(arguments: argparse.Namespace, model: StagedModel, images: torch.Tensor) -> None:
    import torch

    from layerwise_ext import init

    if arguments.init != "default":
        initialize = init.lsuv_ if arguments.init == "lsuv" else init.data_dependent_
        initialize(model, images, generator=torch.Generator().manual_seed(arguments.seed))


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
            device=_device(arguments.device),
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


def _device(name: str | None) -> torch.device:
    import torch

    available = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if available else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device is {name!r}; allowed: cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= available):
        raise UsageError(f"--device is {name!r}; allowed here: cpu, and cuda:N for N below {available}")
    return device


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


# -- probe -------------------------------------------------------------------------------------------------------------


def _probe(arguments: argparse.Namespace) -> int:
    from layerwise_ext import data, probe

    path: Path = arguments.checkpoint
    folder, file = (path, path / "checkpoint.pt") if path.is_dir() else (path.parent, path)
    settings = _settings_of(folder)
    settings.data_dir = arguments.data_dir
    _check_limit(settings.data, arguments.limit_train)
    device = _device(arguments.device)
    output: Path = arguments.output or folder / "separability.csv"
    if output.is_dir():
        raise UsageError(f"--output: {output} is a folder; name a file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: {output.parent} cannot be made ({error.strerror})") from error
    _set_threads(arguments.threads)
    try:
        train_split, test_split = _splits(settings)
        normalization = data.Normalization.of(train_split.images)  # as in training
        train_split = _first(train_split, arguments.limit_train)
        loaders = [data.MemoryLoader(s, min(512, len(s.labels)), normalization) for s in (train_split, test_split)]
        info = data.info(settings.data, settings.data_dir, image_size=settings.image_size)
        model = _model(settings, tuple(train_split.images.shape[1:]), info.num_classes)
        _load(model, file)
        found = probe.separability(model.to(device), *loaders, dim=arguments.dim)
    except (data.DataError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(found)
    print(f"{found.samples} training images, {found.test_samples} test images")
    try:
        _write_table(output, found.to_dict()["layers"])
    except OSError as error:
        raise UsageError(f"--output: {output} cannot be written ({error.strerror})") from error
    print(f"written to {output}")
    return OK


def _settings_of(folder: Path) -> argparse.Namespace:
    """Options of `train` in a run folder; those that the run did not know yet have their defaults."""
    config_path = folder / "config.json"
    settings = build_parser().parse_args(["train"])
    try:
        vars(settings).update(json.loads(config_path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{config_path}: cannot be read ({error.strerror}); name a run folder of train") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{config_path} is not a JSON object ({error})") from error
    return settings


def _load(model: StagedModel, path: Path) -> None:
    """Weights of a checkpoint of `train`, with the local heads or without."""
    from layerwise_ext import checkpoint

    try:
        state = checkpoint.load(path)
        if "stages" not in state:
            model.backbone().load_state_dict(state)
            return
        for stage, stage_state in zip(model, state["stages"], strict=True):
            stage.load_state_dict(stage_state)
    except Exception as error:  # torch.load has no error type of its own for a damaged file
        raise UsageError(f"{path} cannot be used ({error})") from error


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    from layerwise_ext import checkpoint

    with checkpoint.replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
