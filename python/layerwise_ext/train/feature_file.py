"""A file of features and targets that is memory, too: a page of header, rows, targets."""

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
    """Room for ``rows [capacity, ...]`` and ``targets [capacity]`` (int64), on the CPU, as the system sees fit.

    The header is written last, by :meth:`finish`: a file without one is not read.

    Attributes:
        header: what :meth:`finish` was given, with dtype, sizes and checksums (CRC-32).
    """

    def __init__(self, path: Path, header: dict[str, Any], *, reserve: bool = False) -> None:
        self.path = path
        self.header = header
        row_bytes = math.prod(header["row"]) * _dtype(header).itemsize
        rows_end = _HEADER_BYTES + header["capacity"] * row_bytes
        start = -(-rows_end // 8) * 8  # of int64
        self.size = start + header["capacity"] * 8
        if reserve:
            _reserve(path, self.size)
        elif path.stat().st_size != self.size:
            raise FeatureFileError(f"{path} has {path.stat().st_size} bytes instead of {self.size}")
        self._map = np.memmap(path, np.uint8, "r+")
        data = torch.from_numpy(self._map)
        self.rows = data[_HEADER_BYTES:rows_end].view(_dtype(header)).view(header["capacity"], *header["row"])
        self.targets = data[start:].view(torch.int64)

    @classmethod
    def create(cls, path: Path, capacity: int, row: tuple[int, ...], dtype: torch.dtype) -> FeatureFile:
        """In place of what is there.

        Raises:
            FeatureFileError: no room, or no access.
        """
        name = str(dtype).removeprefix("torch.")
        return cls(path, {"dtype": name, "row": list(row), "capacity": capacity}, reserve=True)

    def finish(self, samples: int, **facts: Any) -> None:
        """Make it readable: the first ``samples`` rows are there."""
        self.header.update(facts, samples=samples, checksums=self._checksums(samples))
        text = _MAGIC + json.dumps(self.header).encode()
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
            header = json.loads(text.removeprefix(_MAGIC))
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


def _dtype(header: dict[str, Any]) -> torch.dtype:
    dtype = getattr(torch, header["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{header['dtype']} is no dtype")
    return dtype


def _reserve(path: Path, size: int) -> None:
    """Room on the disk for all of it: writing to a mapped page without any would end the process."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise FeatureFileError(f"{path} cannot get {size / 2**20:.1f} MiB ({error})") from error
