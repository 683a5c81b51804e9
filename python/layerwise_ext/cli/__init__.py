"""The command ``layerwise-ext``.

Each of its commands is a module with ``add_parser(commands)`` and ``run(arguments)``, which gives the exit status. None
of them imports torch, or what needs it, before it runs.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import re
import sys
from collections.abc import Sequence

from layerwise_ext.cli import bench, demo, info, probe, processes, study, train
from layerwise_ext.cli.common import FAILED, INTERRUPTED, OK, USAGE, UsageError
from layerwise_ext.cli.options import DATA, HEADS, INITS, MODES

__all__ = [
    "DATA",
    "FAILED",
    "HEADS",
    "INITS",
    "INTERRUPTED",
    "MODES",
    "OK",
    "USAGE",
    "UsageError",
    "build_parser",
    "main",
]

COMMANDS = (demo, train, study, probe, bench, info)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="layerwise-ext",
        description="Layer-wise and joint training of convolutional networks with fused operators.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    for each in commands.choices.values():
        each.allow_abbrev = False  # otherwise --no-pretrain would stand for --no-pretrain-tied
        each.set_defaults(flags=re.findall(r"--[\w-]+", each.format_usage()))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when a process is lost, 2 for bad arguments or data, 130 when interrupted."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "bench":
        close = difflib.get_close_matches(rest[0].partition("=")[0], arguments.flags, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    arguments.rest = rest
    level = logging.WARNING if processes.is_first() else logging.ERROR
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    try:
        status: int = arguments.run(arguments)
        return status
    except UsageError as error:
        print(f"layerwise-ext: error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("layerwise-ext: interrupted", file=sys.stderr)
        return INTERRUPTED
