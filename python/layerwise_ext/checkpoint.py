"""Files that are either complete or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save(path: Path, state: dict[str, Any]) -> None:
    """State of tensors, numbers, strings, lists and dictionaries."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote; executes nothing from the file."""
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A file of safetensors: tensors, and texts about them.

    Raises:
        ImportError: safetensors is not installed.
    """
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(contiguous, dict(metadata)))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What :func:`save_weights` wrote.

    Raises:
        ImportError: safetensors is not installed.
        safetensors.SafetensorError: a damaged file.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
