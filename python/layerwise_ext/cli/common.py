"""What the commands share: exit statuses, errors of the user, options of the machine."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

    Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(Exception):
    """Something that the user can mend; shown without a traceback."""


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of argparse: a finite number above 0."""
    return _number(f"positive {kind.__name__}", kind, lambda value: 0 < value < float("inf"))


def not_negative(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of argparse: a finite number, 0 or more."""
    return _number(f"{kind.__name__} (0 or more)", kind, lambda value: 0 <= value < float("inf"))


def _number(name: str, kind: Callable[[str], Any], is_allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not is_allowed(value):
            raise ValueError
        return value

    parse.__name__ = name  # argparse names it: "invalid positive int value"
    return parse


fraction = _number("fraction (above 0, below 1)", float, lambda value: 0 < value < 1)


def installed(module: str, what: str, package: str = "'layerwise_ext[cli]'") -> Any:
    """A module that ``what`` needs, and ``package`` brings.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{what} needs a package ({error}): pip install {package}") from error


def check_folder(path: Path) -> None:
    """Of ``--output``: one that is there, or can be made.

    Raises:
        UsageError: it is a file or in one, or must not be written to.
    """
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise UsageError(f"--output: {there} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise UsageError(f"--output: {there} must not be written to; name another folder")


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def device_of(name: str | None) -> torch.device:
    import torch

    available = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if available else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device is {name!r}; allowed: cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= available):
        raise UsageError(f"--device is {name!r}; allowed here: cpu, and cuda:N for N below {available}")
    return device
