"""``layerwise-ext demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise_ext.cli.common import OK, positive, set_threads

if TYPE_CHECKING:
    from layerwise_ext.cli.common import Commands


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="train on scikit-learn's digits in three ways, compare with plain PyTorch",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of the picture and the table")
    parser.add_argument("--threads", type=positive(int), help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch: shows that it runs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from layerwise_ext import demo

    set_threads(arguments.threads)
    demo.run(arguments.output, quick=arguments.quick)
    return OK
