"""Configuration files: options of ``train`` in YAML or TOML, checked like those of the command line."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layerwise_ext.cli.common import UsageError, installed
from layerwise_ext.cli.options import MODEL, OPTIONS, SMALL_MODEL, add_options, flag


def complete(given: argparse.Namespace) -> argparse.Namespace:
    """All options: the defaults, over them those of the file ``given.config``, over those what is given."""
    values = {name: each.default for name, each in OPTIONS.items()}
    if given.config is not None:
        values |= read(given.config)
    values |= vars(given)
    if values["model"] is None:
        values["model"] = SMALL_MODEL if values["data"] == "digits" else MODEL
    return argparse.Namespace(**values)


def read(path: Path) -> dict[str, Any]:
    """The options in a file.

    Raises:
        UsageError: what cannot be read, is no table of options, or holds one that is unknown or has a wrong value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if path.suffix in (".yaml", ".yml"):
        keys, values = _yaml(path, text)
    elif path.suffix == ".toml":
        keys, values = _toml(path, text)
    else:
        raise UsageError(f"{path}: the name of a configuration file must end in .yaml, .yml or .toml")
    names = [str(key).replace("-", "_") for key in keys]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{path}: {name!r} is there twice")
    return convert(str(path), values)


def convert(source: str, values: Mapping[Any, Any]) -> dict[str, Any]:
    """Values by key as options by name; null stands for an option that is not given.

    Raises:
        UsageError: an unknown key, or a value that the command line would not take, either.
    """
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser)
    options: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in OPTIONS:
            close = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "layerwise-ext train --help names those there are"
            raise UsageError(f"{source}: unknown key {key!r}; {hint}")
        if value is None:
            continue
        try:
            options |= vars(parser.parse_args([_argument(source, name, value)]))
        except argparse.ArgumentError as error:
            raise UsageError(f"{source}: {name}: {error.message}") from error
    return options


def dump(values: Mapping[str, Any]) -> str:
    """Options as YAML, which :func:`read` reads; what is None is left out."""
    import yaml

    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return yaml.safe_dump({name: value for name, value in plain.items() if value is not None}, sort_keys=False)


def _argument(source: str, name: str, value: Any) -> str:
    """As it would be written on the command line."""
    if OPTIONS[name].kind is bool:
        if not isinstance(value, bool):
            raise UsageError(f"{source}: {name} is {value!r}; allowed: true, false")
        return flag(name) if value else flag(f"no_{name}")
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, (int, float, str)) and not isinstance(item, bool) for item in items):
        raise UsageError(f"{source}: {name} is {value!r}; allowed: a number, a text, or a list of them")
    return f"{flag(name)}={','.join(map(str, items))}"


def _yaml(path: Path, text: str) -> tuple[Iterable[Any], dict[Any, Any]]:
    """The keys as they are written, and what they stand for."""
    yaml = installed("yaml", f"{path}, YAML,")
    try:
        node, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds a {type(values).__name__}; a table of options such as 'epochs: 10' is needed")
    return [key.value for key, _ in node.value], values


def _toml(path: Path, text: str) -> tuple[Iterable[Any], dict[Any, Any]]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = installed("tomli", f"{path}, TOML,")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML ({error})") from error
    return list(values), values
