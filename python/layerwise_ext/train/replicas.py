"""Data parallel training: processes with copies of the same stages, each of which trains on its part of every batch."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layerwise_ext import _replicas
from layerwise_ext._replicas import neighbour
from layerwise_ext.train import random_state

logger = logging.getLogger(__name__)
Batch = TypeVar("Batch")
_OTHERS = "another replica"


class ReplicaGroup:
    """The processes of ``group``, or with None this one alone, for which nothing here does or costs anything.

    What communicates must be called by all of them, in the same order.

    Attributes:
        rank: of this process among them; 0 reads, decides and writes for all.
        size: how many they are.

    Raises:
        TypeError: ``group`` is no process group.
        LinkError: (of what communicates) another process has ended.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.rank, self.size = 0, 1
        self._own_state: dict[str, Any] = {}
        if group is None:
            return
        _replicas.check(group)
        self.rank, self.size = group.rank(), group.size()
        self._group = self._host = group  # of tensors on the device and on the CPU
        if "cpu:" not in dist.get_backend_config(group):
            ranks = dist.get_process_group_ranks(group)
            self._host = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)

    # -- Batches -------------------------------------------------------------------------------------------------------

    def share(self, batches: Iterable[Batch], *, may_be_empty: bool = False) -> Iterable[Batch]:
        """This process' part of each batch, one tensor or several; the first processes get the larger parts.

        Raises:
            ValueError: (when read) a batch with fewer samples than processes; with ``may_be_empty`` those that get
                nothing of it skip it.
        """
        return batches if self.size == 1 else self._parts(batches, may_be_empty)

    def _parts(self, batches: Iterable[Any], may_be_empty: bool) -> Iterator[Any]:
        for batch in batches:
            tensors = batch if isinstance(batch, (tuple, list)) else [batch]
            if not all(isinstance(t, Tensor) for t in tensors):
                yield batch  # for whoever knows what is wrong with it
                continue
            parts = [t.tensor_split(self.size)[self.rank] for t in tensors]
            if len(tensors[0]) < self.size and not may_be_empty:
                raise ValueError(
                    f"a batch has {len(tensors[0])} samples, which cannot be divided among {self.size} replicas; leave "
                    "out a last small batch (drop_last)"
                )
            if len(parts[0]):
                yield parts[0] if batch is tensors[0] else tuple(parts)

    def updates(self, batches: Iterable[Batch], accumulate: int = 1) -> Iterator[list[tuple[Batch, float]]]:
        """The batches of each update, with the weights that losses need for the mean of all replicas' gradients to be
        that of the mean over all samples. Communicates.

        Raises:
            RuntimeError: the replicas have different numbers of batches.
        """
        iterator = iter(batches)
        while True:
            group = list(itertools.islice(iterator, accumulate))
            samples = [len(cast(Any, batch)[0]) for batch in group]
            total = self._total(samples)
            if not group:
                return
            yield [(batch, count * self.size / total) for batch, count in zip(group, samples, strict=True)]

    def _total(self, samples: list[int]) -> int:
        """Of all batches of an update."""
        if self.size == 1:
            return sum(samples)
        every = torch.zeros(self.size, 2, dtype=torch.int64)
        every[self.rank] = torch.tensor([len(samples), sum(samples)])
        numbers, totals = self.add_up(every).T.tolist()
        if len(set(numbers)) > 1:
            raise RuntimeError(
                f"the replicas got {numbers} batches for an update; loaders must give all the same number"
            )
        return sum(totals)

    # -- Tensors -------------------------------------------------------------------------------------------------------

    def average(self, parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
        """Begins to replace gradients by their mean over the replicas. Communicates.

        Returns:
            What waits for it; the parameters have no gradients until it has been called.
        """
        if self.size == 1:
            return _nothing
        found = [(p, p.grad) for p in parameters if p.grad is not None]
        if not found:
            return _nothing
        flat = torch.cat([gradient.reshape(-1) for _, gradient in found])
        for p, _ in found:
            p.grad = None
        with neighbour(_OTHERS):
            work = dist.all_reduce(flat, group=self._of(flat), async_op=True)

        def finish() -> None:
            with neighbour(_OTHERS):
                cast(dist.Work, work).wait()
            means = flat.div_(self.size).split([gradient.numel() for _, gradient in found])
            for (p, gradient), mean in zip(found, means, strict=True):
                p.grad = gradient.copy_(mean.view(gradient.shape))

        return finish

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over the replicas, in place. Communicates."""
        if self.size > 1:
            with neighbour(_OTHERS):
                dist.all_reduce(values, group=self._of(values))
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give all replicas the first one's values. Communicates."""
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for t in tensors if self.size > 1 else ():
            alike.setdefault((t.dtype, t.device), []).append(t.detach())
        for group in alike.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            with neighbour(_OTHERS):
                dist.broadcast(flat, group=self._of(flat), group_src=0)
            for t, values in zip(group, flat.split([t.numel() for t in group]), strict=True):
                t.copy_(values.view(t.shape))

    def _of(self, t: Tensor) -> dist.ProcessGroup:
        return self._host if t.device.type == "cpu" else self._group

    # -- Decisions -----------------------------------------------------------------------------------------------------

    def all(self, flag: bool) -> bool:
        """Whether it is so in all of them. Communicates."""
        return int(self.add_up(torch.tensor(int(flag)))) == self.size

    def check_same(self, name: str, value: Any) -> None:
        """Communicates.

        Raises:
            ValueError: not all of them have the same ``value``.
        """
        if self.size == 1:
            return
        every: list[Any] = [None] * self.size
        with neighbour(_OTHERS):
            dist.all_gather_object(every, value, group=self._host)
        if any(each != every[0] for each in every):
            raise ValueError(f"{name} is {every} in the replicas; all of them must load the same checkpoint")

    def compare(self, processes: int) -> None:
        """Warn where a checkpoint is of another number of them."""
        if processes != self.size:
            logger.warning(
                "the state is of %d processes, this trainer has %d: training goes on, but parts of batches, rounding "
                "and random numbers are other ones than without the interruption",
                processes,
                self.size,
            )

    # -- Random numbers ------------------------------------------------------------------------------------------------

    def share_random_state(self, loader: Any, generator: torch.Generator, device: torch.device, epoch: int) -> None:
        """All go on with the first one's generators, those of ``loader`` included: they get the same batches.

        What each draws in :meth:`own_randomness` in this epoch, for dropout and the like, follows from that and its
        rank: a checkpoint of the first one is enough. Communicates.
        """
        if self.size == 1:
            return
        states: list[Any] = [random_state.capture(loader, device), generator.get_state()]
        with neighbour(_OTHERS):
            dist.broadcast_object_list(states, group=self._host, group_src=0)
        shared, generator_state = states
        generator.set_state(generator_state)
        key = shared["cpu"].numpy().tobytes() + f"{epoch} {self.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
        self._own_state = random_state.capture(None, device)
        random_state.restore(shared, loader, device)

    @contextmanager
    def own_randomness(self, device: torch.device) -> Iterator[None]:
        """In here torch's global generators are this process' own, outside they are the same in all of them."""
        if self.size == 1:
            yield
            return
        shared = random_state.capture(None, device)
        random_state.restore(self._own_state, None, device)
        try:
            yield
        finally:
            self._own_state = random_state.capture(None, device)
            random_state.restore(shared, None, device)

    def own_generator(self, generator: torch.Generator) -> torch.Generator:
        """One for this process, from ``generator``, which moves alike in all of them."""
        if self.size == 1:
            return generator
        seed = int(torch.randint(1 << 62, (), generator=generator))
        return torch.Generator().manual_seed(seed + self.rank)


def _nothing() -> None:
    pass
