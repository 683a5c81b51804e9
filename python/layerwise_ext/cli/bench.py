"""``layerwise-ext bench``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise_ext.cli.common import UsageError

if TYPE_CHECKING:
    from layerwise_ext.cli.common import Commands


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("bench", help="benchmark the training step of a stage", add_help=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    script = Path("benchmarks/bench_stage.py")
    if not script.is_file():
        raise UsageError("the benchmarks are not installed with the package: run this in its source folder")
    return subprocess.run([sys.executable, str(script), *arguments.rest], check=False).returncode
