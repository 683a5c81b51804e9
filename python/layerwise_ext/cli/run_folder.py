"""The folder of a run: its options and its weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise_ext.cli.common import UsageError
from layerwise_ext.cli.options import add_options, option

if TYPE_CHECKING:
    from layerwise_ext.models import StagedModel


def default_name(arguments: argparse.Namespace) -> str:
    parts = [arguments.data, arguments.model.replace(",", "_"), arguments.mode]
    for name, usual in (("head", "pooled_linear"), ("downsampling", "standard"), ("init", "default")):
        if getattr(arguments, name) != usual:
            parts.append(getattr(arguments, name).replace(",", "_"))
    if arguments.augment != "none":
        parts.append("augment")
    if arguments.cutout is not None:
        parts.append(f"cutout{arguments.cutout}")
    return "-".join(parts)


def check(output: Path, settings: dict[str, Any], resume: bool) -> None:
    config_path, checkpoint_path = output / "config.json", output / "checkpoint.pt"
    if not resume:
        if checkpoint_path.exists():
            raise UsageError(f"{output} holds a run already; go on with --resume, or name another folder with --output")
        return
    if not config_path.is_file():
        raise UsageError(f"--resume: {config_path} does not exist, so there is no run to go on with")
    saved = settings_of(output)
    for name, value in settings.items():
        found = getattr(saved, name)
        if found != value:
            raise UsageError(f"--resume: {option(name)} is {value!r}, but the run in {output} has {found!r}")


def settings_of(folder: Path) -> argparse.Namespace:
    """Options of `train` in a run folder; those that the run did not know yet have their defaults."""
    config_path = folder / "config.json"
    parser = argparse.ArgumentParser()
    add_options(parser)
    settings = parser.parse_args([])
    try:
        vars(settings).update(json.loads(config_path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{config_path}: cannot be read ({error.strerror}); name a run folder of train") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{config_path} is not a JSON object ({error})") from error
    return settings


def load_weights(model: StagedModel, path: Path) -> None:
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
