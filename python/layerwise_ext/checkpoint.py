"""Files that are either complete or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an error.

    The temporary file exists already, empty, and is locked as long as the block runs: one that is not locked was left
    by a process that was killed, and is removed.
    """
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        _remove_if_abandoned(other)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as lock:
            _lock(lock)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save(path: str | Path, state: dict[str, Any]) -> None:
    """State of tensors, numbers, strings, lists and dictionaries, such as ``trainer.state_dict()``."""
    with replacing(Path(path)) as temporary:
        torch.save(state, temporary)


def load(path: str | Path) -> dict[str, Any]:
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


def _remove_if_abandoned(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("rb+") as file:  # gone meanwhile, or somebody else's
        if _lock(file):
            path.unlink()


def _lock(file: IO[bytes]) -> bool:
    """Whether this process has got the file for itself, until it closes it or ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another one has it, or the file system has no locks
        return False
    return True


def _sync_folder(path: Path) -> None:
    """The new name is on the disk, too."""
    folder = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(folder)
    finally:
        os.close(folder)
