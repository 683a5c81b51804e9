"""Batches on their way from one process to the next, sent and received while both train."""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise_ext._replicas import neighbour
from layerwise_ext.train.replay import ReplayBuffer

# Before each batch goes its header of so many int64: the number of tensors, and of each one the index of its dtype, the
# number of its dimensions, its shape and its strides (the layout decides which kernels run). No tensors: the end of the
# epoch.
_HEADER = 64
_ALIGNMENT = 64  # bytes; each tensor begins at a multiple
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


class End(NamedTuple):
    """One end of the connection of two processes.

    ``peer`` is the other one's rank in the whole job and ``name`` what messages call it, ``group`` the process group of
    the two, ``device`` where the batches lie (that of the processes with NCCL, else the CPU), ``in_flight`` how many of
    them may be on the way.
    """

    peer: int
    name: str
    group: Any
    device: torch.device
    in_flight: int


class Outgoing:
    """Sends batches. A sender that is ahead of the receiver by ``in_flight`` batches waits for it."""

    def __init__(self, end: End) -> None:
        self._end = end
        self._on_the_way: deque[tuple[list[dist.Work | None], Tensor, Tensor]] = deque()  # requests, header, payload

    def send(self, *tensors: Tensor) -> None:
        """Copies the tensors and returns before they have arrived."""
        header = _describe(tensors)
        payload = self._memory(_size(header))
        for view, tensor in zip(_views(header, payload), tensors, strict=True):
            view.copy_(tensor)
        self._post(header, payload)

    def finish(self) -> None:
        """Says that the epoch is over and waits until everything has arrived."""
        self._post([0] * _HEADER, torch.empty(0, dtype=torch.uint8, device=self._end.device))
        while self._on_the_way:
            self._wait_for_oldest()

    def _memory(self, size: int) -> Tensor:
        if len(self._on_the_way) < self._end.in_flight:
            return self._empty(size)
        memory = self._wait_for_oldest()
        return memory[:size] if memory.numel() >= size else self._empty(size)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._end.device)

    def _wait_for_oldest(self) -> Tensor:
        requests, _, payload = self._on_the_way.popleft()
        with neighbour(self._end.name):
            for request in requests:
                _wait(request)
        return payload

    def _post(self, header: list[int], payload: Tensor) -> None:
        numbers = torch.tensor(header)
        with neighbour(self._end.name):
            requests = [dist.isend(numbers, self._end.peer, self._end.group, tag=0)]
            if payload.numel():
                requests.append(dist.isend(payload, self._end.peer, self._end.group, tag=1))
        self._on_the_way.append((requests, numbers, payload))


class _Batch(NamedTuple):
    memory: Tensor  # uint8
    tensors: tuple[Tensor, ...]  # views of it


class Incoming:
    """Iterating gives the batches of one epoch, in order, each a tuple of tensors that the next one may overwrite.

    A thread receives them; with ``in_flight`` batches that nobody has taken it waits.
    """

    def __init__(self, end: End) -> None:
        self._end = end
        self._free: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        received: queue.Queue[_Batch | Exception | None] = queue.Queue(self._end.in_flight)
        self._start(received.put)
        while (batch := received.get()) is not None:
            if isinstance(batch, Exception):
                raise batch
            yield batch.tensors
            self._free.append(batch.memory)

    def _start(self, put: Callable[[_Batch | Exception | None], None]) -> None:
        """Receive an epoch in the background: every batch, then None, or an error in its place."""

        def run() -> None:
            try:
                for batch in self._receive():
                    put(batch)
                put(None)
            except Exception as error:  # also one of this process, such as a lack of memory: somebody waits for a batch
                put(error)

        threading.Thread(target=run, daemon=True).start()

    def _receive(self) -> Iterator[_Batch]:
        end = self._end
        stream = torch.cuda.Stream(end.device) if end.device.type == "cuda" else None
        header = torch.empty(_HEADER, dtype=torch.int64)
        while True:
            with neighbour(end.name):
                _wait(dist.irecv(header, end.peer, end.group, tag=0))
            numbers = header.tolist()
            if numbers[0] == 0:
                return
            memory = self._memory(_size(numbers))
            with torch.cuda.stream(stream), neighbour(end.name):
                if stream is not None:  # what still reads this memory was launched there
                    stream.wait_stream(torch.cuda.default_stream(end.device))
                _wait(dist.irecv(memory, end.peer, end.group, tag=1))
                if stream is not None:
                    stream.synchronize()
            yield _Batch(memory, tuple(_views(numbers, memory)))

    def _memory(self, size: int) -> Tensor:
        memory = self._free.pop() if self._free else None
        if memory is None or memory.numel() != size:
            return torch.empty(size, dtype=torch.uint8, device=self._end.device)
        return memory


class Replayed(Incoming):
    """Iterating gives ``steps`` batches out of a :class:`ReplayBuffer`, which keeps what has come last over all epochs.

    It waits for the sender while the buffer is empty, that is for the very first batch, and at the end of an epoch for
    the rest of it.
    """

    def __init__(self, end: End, capacity: int, steps: int) -> None:
        super().__init__(end)
        self.buffer: ReplayBuffer[_Batch] = ReplayBuffer(capacity)
        self.steps = steps
        self._changed = threading.Condition()
        self._in_use: _Batch | None = None
        self._outcome: list[Exception | None] = []  # of the epoch, once it is over

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        self._outcome.clear()
        self._start(self._put)
        for _ in range(self.steps):
            with self._changed:
                self._changed.wait_for(lambda: len(self.buffer) or self._outcome)
                self._check()
                self._in_use = self.buffer.sample()
            yield self._in_use.tensors
        with self._changed:
            self._in_use = None
            self._changed.wait_for(lambda: self._outcome)
            self._check()

    def _put(self, batch: _Batch | Exception | None) -> None:
        with self._changed:
            if isinstance(batch, _Batch):
                oldest = self.buffer.add(batch)
                if oldest is not None and oldest is not self._in_use:
                    self._free.append(oldest.memory)
            else:
                self._outcome.append(batch)
            self._changed.notify()

    def _check(self) -> None:
        if self._outcome and self._outcome[0] is not None:
            raise self._outcome[0]


def _wait(request: dist.Work | None) -> None:
    assert request is not None  # as it is outside of the group
    request.wait()


def _describe(tensors: tuple[Tensor, ...]) -> list[int]:
    header = [len(tensors)]
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"a batch has a tensor of {tensor.dtype}; allowed: {', '.join(map(str, _DTYPES))}")
        strides = torch.empty_like(tensor, device="meta").stride()  # its own, where it has no gaps
        header += [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape, *strides]
    if len(header) > _HEADER:
        raise ValueError(f"a batch has tensors of {[t.dim() for t in tensors]} dimensions, more than can be described")
    return header + [0] * (_HEADER - len(header))


def _layouts(header: list[int]) -> Iterator[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]]:
    numbers = iter(header)
    for _ in range(next(numbers)):
        dtype, dim = _DTYPES[next(numbers)], next(numbers)
        shape, strides = (tuple(islice(numbers, dim)) for _ in range(2))
        yield dtype, shape, strides


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _size(header: list[int]) -> int:
    return sum(_bytes(dtype, shape) for dtype, shape, _ in _layouts(header))


def _views(header: list[int], memory: Tensor) -> Iterator[Tensor]:
    offset = 0
    for dtype, shape, strides in _layouts(header):
        size = _bytes(dtype, shape)
        yield memory[offset : offset + size].view(dtype).as_strided(shape, strides)
        offset += size
