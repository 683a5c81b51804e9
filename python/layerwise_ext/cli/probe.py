"""``layerwise-ext probe``."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise_ext.cli import experiment, run_folder
from layerwise_ext.cli.common import OK, UsageError, check_folder, device_of, positive, set_threads

if TYPE_CHECKING:
    from layerwise_ext.cli.common import Commands


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "probe",
        help="how well each stage of a trained network separates the classes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="run folder of `train`, its checkpoint.pt, or last.safetensors or best.safetensors of a run",
    )
    parser.add_argument("--data-dir", type=Path, help="folder of the data files; default: $LAYERWISE_DATA")
    parser.add_argument("--limit-train", type=positive(int), metavar="N", help="use the first N training images")
    parser.add_argument("--dim", type=positive(int), default=1024, help="features of a stage, after pooling")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--threads", type=positive(int), help="default: all cores")
    parser.add_argument("--output", type=Path, help="table as CSV; default: separability.csv in the run folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from layerwise_ext import data, probe

    path: Path = arguments.checkpoint
    file = run_folder.RunFolder(path).checkpoint if path.is_dir() else path
    folder = file.parent
    settings = run_folder.options_of(file)
    settings.data_dir = arguments.data_dir
    experiment.check_limit(settings.data, arguments.limit_train)
    device = device_of(arguments.device)
    output: Path = arguments.output or folder / "separability.csv"
    if output.is_dir():
        raise UsageError(f"--output: {output} is a folder; name a file")
    check_folder(output.parent)
    set_threads(arguments.threads)
    try:
        info = data.info(settings.data, settings.data_dir, image_size=settings.image_size)
        images = experiment.load_images(settings)
        normalization = data.Normalization.of(images.train.images)  # as in training
        splits = (experiment.first(images.train, arguments.limit_train), images.test)
        loaders = [data.MemoryLoader(split, min(512, len(split.labels)), normalization) for split in splits]
        model = experiment.build_model(experiment.network(settings, info, normalization))
        run_folder.load_into(model, file)
        found = probe.separability(model.to(device), *loaders, dim=arguments.dim)
    except (data.DataError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(found)
    print(f"{found.samples} training images, {found.test_samples} test images")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _write_table(output, found.to_dict()["layers"])
    except OSError as error:
        raise UsageError(f"--output: {output} cannot be written ({error.strerror})") from error
    print(f"written to {output}")
    return OK


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    from layerwise_ext import checkpoint

    with checkpoint.replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
