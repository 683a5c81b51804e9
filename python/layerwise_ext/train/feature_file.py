"""A file of features and targets that is memory, too: a page of header, rows, targets.

The header is a line that says what the file is, a line with the checksum of the rest, and that rest, in JSON.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

_MAGIC = b"layerwise_ext features 1\n"
_HEADER_BYTES = 4096
_CHUNK_BYTES = 1 << 24


class FeatureFileError(Exception):
    """The file cannot be written, or is not what was asked for; the message says why."""


class FeatureFile:
    """Room for ``rows [capacity, ...]`` and ``targets [capacity]``, on the CPU, as the system sees fit.

    The header is written last, by :meth:`finish`: a file without one is not read.

    Attributes:
        header: what :meth:`finish` was given, with dtypes, sizes and checksums (CRC-32).
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        rows_end, targets_start, size = _places(header)
        if path.stat().st_size != size:
            raise FeatureFileError(f"{path} has {path.stat().st_size} bytes instead of {size}")
        self._map = np.memmap(path, np.uint8, "r+")
        data = torch.from_numpy(self._map)
        rows = data[_HEADER_BYTES:rows_end].view(_dtype(header["dtype"]))
        self.rows = rows.view(header["capacity"], *header["row"])
        self.targets = data[targets_start:].view(_dtype(header["target_dtype"]))

    @classmethod
    def create(
        cls, path: Path, capacity: int, row: tuple[int, ...], dtype: torch.dtype, target_dtype: torch.dtype
    ) -> FeatureFile:
        """In place of whatever is there.

        Raises:
            FeatureFileError: no room, or no access.
        """
        header = {"row": list(row), "capacity": capacity, "dtype": _name(dtype), "target_dtype": _name(target_dtype)}
        _reserve(path, _places(header)[-1])
        return cls(path, header)

    def finish(self, samples: int, **facts: Any) -> None:
        """Make it readable: the first ``samples`` rows are there."""
        self.header.update(facts, samples=samples, checksums=self._checksums(samples))
        content = json.dumps(self.header).encode()
        text = b"%b%08x\n%b" % (_MAGIC, zlib.crc32(content), content)
        if len(text) > _HEADER_BYTES:
            raise FeatureFileError(f"the header of {self.path} takes {len(text)} bytes; there are {_HEADER_BYTES}")
        self._map[: len(text)] = np.frombuffer(text, np.uint8)
        self._map.flush()

    @classmethod
    def open(cls, path: Path, **facts: Any) -> FeatureFile:
        """
        Raises:
            FeatureFileError: no file, another file, one with other ``facts``, a truncated or a damaged one.
        """
        try:
            with path.open("rb") as stream:
                text = stream.read(_HEADER_BYTES).rstrip(b"\0")
        except OSError as error:
            raise FeatureFileError(f"{path} cannot be read ({error})") from error
        if not text.startswith(_MAGIC):
            raise FeatureFileError(f"{path} is not a finished file of features")
        try:
            checksum, content = text.removeprefix(_MAGIC).split(b"\n")
            if int(checksum, 16) != zlib.crc32(content):
                raise ValueError("its checksum is another one")
            header = json.loads(content)
            differing = [name for name, value in facts.items() if header[name] != value]
            file = cls(path, header)
            samples, checksums = header["samples"], header["checksums"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FeatureFileError(f"{path} has a damaged header ({error!r})") from error
        if differing:
            raise FeatureFileError(f"{path} is of something else: it has another {', '.join(differing)}")
        if file._checksums(samples) != checksums:
            raise FeatureFileError(f"{path} is damaged: its checksum is another one")
        return file

    def _checksums(self, samples: int) -> list[int]:
        sums = []
        for part in (self.rows[:samples], self.targets[:samples]):
            checksum = 0
            for chunk in part.reshape(-1).view(torch.uint8).split(_CHUNK_BYTES):
                checksum = zlib.crc32(chunk.numpy(), checksum)
            sums.append(checksum)
        return sums


def _places(header: dict[str, Any]) -> tuple[int, int, int]:
    """Where rows end, where targets begin, and where they end, the size of the file."""
    capacity = header["capacity"]
    rows_end = _HEADER_BYTES + capacity * math.prod(header["row"]) * _dtype(header["dtype"]).itemsize
    targets_start = -(-rows_end // 8) * 8  # a multiple of the size of their elements
    return rows_end, targets_start, targets_start + capacity * _dtype(header["target_dtype"]).itemsize


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    return dtype


def _reserve(path: Path, size: int) -> None:
    """Room on the disk for all of it: writing to a mapped page without any would end the process."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise FeatureFileError(f"{path} cannot get {size / 2**20:.1f} MiB ({error})") from error
