"""The processes of a :class:`~layerwise_ext.train.DecoupledTrainer`: what each does, and how they are started."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from layerwise_ext._replicas import LinkError
from layerwise_ext.nn import LocalStage
from layerwise_ext.train._links import End, Incoming, Outgoing, Replayed
from layerwise_ext.train.evaluation import Batches
from layerwise_ext.train.local import LocalTrainer
from layerwise_ext.train.metrics import Record, StepResult

State = dict[str, Any]
T = TypeVar("T")

# Seconds in which the cause of a failure is looked for: processes that only lost a neighbour may say so first.
_GRACE = 5.0
_LONGEST = 20_000  # characters of a report, which fits into a pipe that nobody reads yet
_HOST = "127.0.0.1"  # where the processes of our own find each other


@dataclass(frozen=True)
class Layout:
    """Which stages are where: rank ``worker * replicas + replica`` has ``partition[worker]`` consecutive stages."""

    partition: tuple[int, ...]
    replicas: int

    @property
    def processes(self) -> int:
        return len(self.partition) * self.replicas

    def worker(self, rank: int) -> int:
        return rank // self.replicas

    def stages(self, rank: int) -> slice:
        worker = self.worker(rank)
        first = sum(self.partition[:worker])
        return slice(first, first + self.partition[worker])

    def name(self, rank: int) -> str:
        stages = self.stages(rank)
        text = (
            f"stage {stages.start}"
            if stages.stop - stages.start == 1
            else f"stages {stages.start} to {stages.stop - 1}"
        )
        return f"worker {self.worker(rank)} ({text}; rank {rank})"


@dataclass(frozen=True)
class Job:
    """All that a process needs to know.

    ``loader`` is None behind the first worker; ``steps`` its length, where it has one. ``images`` says of each stage
    whether it or a later one looks at the image.
    """

    rank: int
    layout: Layout
    stages: list[LocalStage]
    optimizers: list[torch.optim.Optimizer]
    loader: Batches | None
    steps: int | None
    images: list[bool]
    buffer: int | None
    in_flight: int
    device: torch.device
    backend: str
    seed: int
    threads: int | None
    options: dict[str, Any]  # of the trainer


class Part(LocalTrainer):
    """The stages of one process, trained on what the one before sends; sends its features to the one behind.

    The process must be a member of the default process group.
    """

    def __init__(self, job: Job) -> None:
        layout, rank = job.layout, job.rank
        self._first = layout.stages(rank).start
        # In the order in which all processes make them.
        replicas = [dist.new_group(list(ranks), backend=job.backend) for ranks in _replicas(layout)]
        links = {pair: dist.new_group(list(pair), backend=job.backend) for pair in _links(layout)}
        where = job.device if job.backend != "gloo" else torch.device("cpu")
        before, behind = rank - layout.replicas, rank + layout.replicas

        def end(peer: int) -> End:
            group = links[min(rank, peer), max(rank, peer)]
            return End(peer, layout.name(peer), group, where, job.in_flight)

        self.incoming: Incoming | None = None
        if before >= 0 and job.buffer is not None and job.steps is not None:
            self.incoming = Replayed(end(before), job.buffer, job.steps)
        elif before >= 0:
            self.incoming = Incoming(end(before))
        self._outgoing = Outgoing(end(behind)) if behind < layout.processes else None
        self._sends_images = self._outgoing is not None and job.images[layout.stages(behind).start]
        self._length = job.steps
        self._groups = [*replicas, *links.values()]
        self._images: deque[Tensor] = deque()  # of the batches that are on the device
        self._stopped: list[bool] = []

        optimizers = iter(job.optimizers)
        group = replicas[layout.worker(rank)]
        super().__init__(
            job.stages,
            lambda _: next(optimizers),
            device=job.device,
            process_group=group if layout.replicas > 1 else None,
            **job.options,
        )
        norms = [m for stage in self.stages for m in stage.modules() if isinstance(m, nn.SyncBatchNorm)]
        self._groups_before = [(norm, norm.process_group) for norm in norms]
        for norm in norms:
            norm.process_group = group
        if rank > 0:
            torch.manual_seed(job.seed + rank)  # of dropout and the like; the first process has the trainer's own state

    def run(self, loader: Batches | None, state: State) -> State:
        """One epoch from ``state``; the state behind it, in whose history is the epoch's record."""
        self.load_state_dict(state)
        self._stopped = state["stopped"]
        self._images.clear()
        self.fit(loader if self.incoming is None else self.incoming, self.epoch + 1)  # type: ignore[arg-type]
        return self.state_dict()

    def close(self) -> None:
        """Closes the connections to other processes, which have nothing more to send."""
        for norm, group in self._groups_before:
            norm.process_group = group
        for group in self._groups:
            dist.destroy_process_group(group)

    def _train_epoch(self, loader: Batches) -> Record:
        record = super()._train_epoch(loader)
        if self._outgoing is not None:
            self._outgoing.finish()
        return {**record, "classes": self._classes}

    def _epoch_batches(self, loader: Batches) -> tuple[Batches, int | None]:
        return self._replicas.share(loader) if self.incoming is None else loader, self._length

    def _on_device(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        if self.incoming is None:
            yield from super()._on_device(batches)
            return
        copy = self.accumulate > 1  # the next batch may overwrite this one
        for x, target, *images in self.incoming:  # as they are, in the layout in which the stage before made them
            self._images += [t.to(self.device, copy=copy) for t in images]
            yield x.to(self.device, copy=copy), target.to(self.device, copy=copy)

    def _step(self, x: Tensor, target: Tensor, weight: float = 1.0, update: bool = True) -> StepResult:
        image = self._images.popleft() if self._images else x
        features, result = self._pass(x, target, image, weight, update)
        if self._outgoing is not None:
            self._outgoing.send(features, target, *([image] if self._sends_images else []))
        return result

    @property
    def _logs(self) -> bool:
        return False  # the trainer does, in its own process

    def _has_stopped(self, group: int) -> bool:
        return self._stopped[group]  # as the trainer says, who sees the validation data

    def _next_epoch(self, epochs: int) -> bool:
        return self.epoch < epochs  # also where all stages have stopped: the next process needs their features

    def _reported(self) -> list[int]:
        return list(range(self._first, self._first + len(self.stages)))


def _replicas(layout: Layout) -> list[range]:
    return [range(first, first + layout.replicas) for first in range(0, layout.processes, layout.replicas)]


def _links(layout: Layout) -> list[tuple[int, int]]:
    return [(rank, rank + layout.replicas) for rank in range(layout.processes - layout.replicas)]


class Members:
    """Processes that somebody else has started, such as torchrun, during one ``fit``; this one is one of them."""

    def __init__(self, backend: str) -> None:
        if not dist.is_initialized():
            dist.init_process_group(backend)
        self._objects = dist.new_group(backend="gloo")

    def of_rank_0(self, value: T) -> T:
        """What rank 0 gives."""
        values = [value]
        dist.broadcast_object_list(values, 0, self._objects)
        return values[0]

    def start(self, job: Job) -> None:
        self._rank, self._layout, self._loader = job.rank, job.layout, job.loader
        self._part = Part(job)

    def epoch(self, states: Sequence[State]) -> list[State]:
        """Train an epoch from these states, one for each rank; the states behind it."""
        own = _encode(self._part.run(self._loader, states[self._rank]))
        every: list[Any] = [None] * self._layout.processes
        try:
            dist.all_gather_object(every, own, self._objects)
        except RuntimeError as error:
            raise LinkError(f"{self._layout.name(self._rank)} lost the other workers: {error}") from error
        return [_decode(state) for state in every]

    def end(self, at_once: bool) -> None:
        """They belong to whoever has started them; only what connects them for this ``fit`` is given up."""
        if not at_once:  # else they may be waiting for each other
            self._part.close()
            dist.destroy_process_group(self._objects)


class Processes:
    """Processes of our own, one for each job.

    Raises:
        ValueError: something in the jobs cannot be sent to another process.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        try:
            encoded = [_encode(job) for job in jobs]
        except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"stages, optimisers and loader are sent to other processes by pickle, which fails: {error}. Define "
                "classes and functions at the top of a module, make a new DataLoader in place of one that keeps its "
                "workers, or start the processes with torchrun"
            ) from error
        self._layout = jobs[0].layout
        # In memory: a file would outlive a process that is killed.
        listener = socket.create_server((_HOST, 0))
        port: int = listener.getsockname()[1]
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            _HOST, port, is_master=True, master_listen_fd=listener.detach()
        )
        self._reports: dict[int, State] = {}
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        context = multiprocessing.get_context("spawn")
        try:
            for _ in jobs:
                ours, theirs = context.Pipe()
                process = context.Process(target=_main, args=(theirs, port))
                process.start()
                theirs.close()  # reading ours then ends with the process
                self._processes.append(process)
                self._connections.append(ours)
            self._send(encoded)
            # Until all have found each other, one that waits for another reads nothing: sending it its state would
            # take as long, for ever where the other one was killed.
            self._reports_of_all()
        except BaseException:
            self.end(at_once=True)
            raise

    def epoch(self, states: Sequence[State]) -> list[State]:
        """Train an epoch from these states, one for each rank; the states behind it.

        Raises:
            RuntimeError: a process was killed or failed; all others are ended.
        """
        self._send([_encode(state) for state in states])
        return self._reports_of_all()

    def _reports_of_all(self) -> list[State]:
        results: dict[int, State] = {}
        sentinels = [process.sentinel for process in self._processes]
        while len(results) < len(self._processes):
            waiting = {c: rank for rank, c in enumerate(self._connections) if rank not in results}
            for ready in multiprocessing.connection.wait([*waiting, *sentinels]):
                report = self._report(waiting[ready]) if ready in waiting else None
                if report is None or "error" in report:
                    raise self._failure()
                results[waiting[ready]] = report
                del self._reports[waiting[ready]]
        return [results[rank] for rank in range(len(self._processes))]

    def end(self, at_once: bool) -> None:
        """Ends the processes, with ``at_once`` in the middle of what they do."""
        for connection in self._connections if not at_once else ():
            with contextlib.suppress(OSError):  # one that was killed since the last epoch has nothing more to do
                connection.send_bytes(_encode(None))
        deadline = time.monotonic() + (0 if at_once else _GRACE)
        for process in self._processes:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()

    def _send(self, messages: Sequence[bytes]) -> None:
        for connection, message in zip(self._connections, messages, strict=True):
            try:
                connection.send_bytes(message)
            except OSError:
                raise self._failure() from None

    def _report(self, rank: int) -> State | None:
        """What the process has said, None where it has ended without a word or not said anything yet."""
        connection = self._connections[rank]
        if rank not in self._reports:
            try:
                if connection.poll():
                    self._reports[rank] = _decode(connection.recv_bytes())
            except (EOFError, OSError):
                return None
        return self._reports.get(rank)

    def _failure(self) -> RuntimeError:
        """Names the process that was killed or has failed, rather than those that lost their neighbour by that."""
        deadline = time.monotonic() + _GRACE
        names = [self._layout.name(rank) for rank in range(self._layout.processes)]
        lost = None
        while time.monotonic() < deadline:
            for name, process in zip(names, self._processes, strict=True):
                if process.exitcode is not None and process.exitcode < 0:
                    return RuntimeError(f"{name} was ended by {_signal(-process.exitcode)}; {_KEPT}")
            for rank, (name, process) in enumerate(zip(names, self._processes, strict=True)):
                report = self._report(rank)
                if report is None and process.exitcode is not None:
                    return RuntimeError(f"{name} ended with exit status {process.exitcode}; {_KEPT}")
                if report is not None and "error" in report:
                    error = RuntimeError(f"{name} failed; {_KEPT}\n{report['error']}")
                    if not report["lost"]:
                        return error
                    lost = error
            time.sleep(0.02)
        return lost or RuntimeError(f"a worker has ended without a message; {_KEPT}")


_KEPT = "the others were ended, and the trainer and its checkpoints are as they were after the last finished epoch"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _main(connection: Any, port: int) -> None:
    """A process of :class:`Processes`: gets its job, says when it is ready, gets a state for each epoch, then None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C goes to all of them; the parent ends these
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that outlives a process that is killed
    try:
        job: Job = _decode(connection.recv_bytes())
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        if job.device.type == "cuda":
            torch.cuda.set_device(job.device)
        store = dist.TCPStore(_HOST, port, is_master=False)  # type: ignore[attr-defined]
        dist.init_process_group(job.backend, store=store, rank=job.rank, world_size=job.layout.processes)
        part = Part(job)
        connection.send_bytes(_encode({}))
        while (state := _decode(connection.recv_bytes())) is not None:
            connection.send_bytes(_encode(part.run(job.loader, state)))
        dist.destroy_process_group()
    except BaseException as error:
        report = {"error": traceback.format_exc()[-_LONGEST:], "lost": isinstance(error, LinkError)}
        with contextlib.suppress(OSError):
            connection.send_bytes(_encode(report))
        sys.stderr.flush()
        os._exit(1)  # threads may still wait for a neighbour


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode(value: Any) -> bytes:
    """Through a file's bytes: a queue or pipe of torch would put each tensor into shared memory of its own."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _decode(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False, map_location="cpu")
