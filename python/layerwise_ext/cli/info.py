"""``layerwise-ext info``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from layerwise_ext.cli.common import OK

if TYPE_CHECKING:
    from layerwise_ext.cli.common import Commands


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("info", help="what was built, for what, and why CUDA is or is not in")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from layerwise_ext import _info

    print(_info.report())
    return OK
