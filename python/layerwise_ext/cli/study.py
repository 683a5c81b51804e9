"""``layerwise-ext study``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise_ext.cli.common import OK, UsageError, check_folder, device_of, installed, positive, set_threads
from layerwise_ext.cli.options import DATA

if TYPE_CHECKING:
    from layerwise_ext.cli.common import Commands

# Of studies.NAMES, which is not imported for --help.
STUDIES = ("layerwise", "trainability", "pretraining", "scaling")


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "study",
        help="answer a question about layer-wise training with runs, plots and a report",
        description="The same command goes on with a study that was interrupted; more --seeds or --budget extend it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("name", choices=STUDIES, help="which question")
    parser.add_argument("--data", choices=[name for name in DATA if name != "image-folder"], default="digits")
    parser.add_argument("--data-dir", type=Path, help="folder of the data files; default: $LAYERWISE_DATA")
    parser.add_argument(
        "--limit-train", type=positive(int), metavar="N", help="train on N images, as many of each class"
    )
    parser.add_argument("--budget", type=positive(float), metavar="MINUTES",
                        help="choose epochs and seeds so that all of it takes about so long")  # fmt: skip
    parser.add_argument("--epochs", type=positive(int), help="of each run; default: the study's own, or by --budget")
    parser.add_argument("--seeds", type=positive(int), metavar="N", help="default: 3, or by --budget")
    parser.add_argument("--output", type=Path, help="folder of the results; default: studies/NAME-DATA")
    parser.add_argument("--threads", type=positive(int), help="default: all cores")
    parser.add_argument("--device", help="default: cuda where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="few cells, small networks: shows that it runs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    for package in ("jinja2", "matplotlib"):
        installed(package, "a study")
    set_threads(arguments.threads)
    device = device_of(arguments.device)

    from layerwise_ext import data, studies

    suffix = "-quick" if arguments.quick else ""
    output = arguments.output or Path("studies") / f"{arguments.name}-{arguments.data}{suffix}"
    check_folder(output)
    try:
        task = studies.Task.load(
            arguments.data, arguments.data_dir, limit_train=arguments.limit_train, device=device, quick=arguments.quick
        )
        studies.run(
            studies.NAMES[arguments.name](),
            task,
            output,
            epochs=arguments.epochs,
            seeds=arguments.seeds,
            budget=arguments.budget,
        )
    except (data.DataError, ValueError) as error:
        raise UsageError(str(error)) from error
    return OK
