"""Decoupled training: the stages in several processes, each on its own loss."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from layerwise_ext.models.split import balanced
from layerwise_ext.models.summary import summary
from layerwise_ext.nn import LocalStage
from layerwise_ext.train import precision, random_state
from layerwise_ext.train._workers import Job, Layout, Members, Part, Processes, State
from layerwise_ext.train.callbacks import Callback
from layerwise_ext.train.common import Trainer, keeps_workers, length
from layerwise_ext.train.evaluation import Batches
from layerwise_ext.train.local import LocalTrainer
from layerwise_ext.train.metrics import Record
from layerwise_ext.train.optimizers import OptimizerFactory, adam

logger = logging.getLogger(__name__)


class DecoupledTrainer(LocalTrainer):
    """Local training in parallel: groups of consecutive stages in processes of their own, which pass batches on.

    Decoupled greedy learning (Belilovsky et al. 2019, arXiv 1901.08164). No stage waits for a gradient of a later one,
    so the second worker trains on batch t while the first one is at batch t + 1. As a rule every batch goes through
    every worker once, in order, and the results are those of a :class:`LocalTrainer`: bit for bit on CPUs with the same
    number of threads, as long as the stages draw no random numbers. With ``asynchronous`` no worker waits for the one
    before it: each keeps the newest batches that it was sent in a :class:`ReplayBuffer` and trains on the least used.

    :meth:`fit` starts the processes and ends them. The trainer in the calling process holds everything after each
    epoch: evaluation, schedulers, ``history``, ``on_epoch_end``, checkpoints work as in other trainers. In a script the
    call must be below ``if __name__ == "__main__":``. Started by torchrun (or in any initialised process group) it
    starts none: the ranks, one per worker and replica, all make the same trainer and call :meth:`fit`.

    Args:
        stages, optimizer: see :class:`Trainer`.
        workers: the number of groups. The first :meth:`fit` cuts the stages where the slowest worker has least to
            compute, by the multiply-adds of a step on images of the size of the loader's first batch, which it looks
            at before the training; where these cannot be counted, into numbers that are as even as possible.
        partition: instead of ``workers`` the number of stages of each group.
        replicas: processes per group that share each batch, with the gradients of all its samples. For batch norm
            over all of them convert it by :func:`~layerwise_ext.nn.convert_sync_batchnorm`; else each replica
            normalises its part, and the first one's running statistics are kept.
        asynchronous: train from replay buffers, as many steps in each worker as the loader has batches.
        buffer: batches that a replay buffer keeps.
        in_flight: batches that may be on the way between two workers before the sender waits.
        threads: of each process; None: an even share of this one's.
        device: ``'cuda'`` gives each process a GPU in turn, over NCCL if there is one for each; ``'cuda:0'`` puts all
            of them on that one, over gloo.
        **options: see :class:`Trainer`. The progress bar is that of the last worker.

    Raises:
        TypeError, ValueError: arguments that are not allowed; ``cuda_graph``, ``process_group``; blocks of a
            :class:`LocalTrainer`; (with ``workers``, in :meth:`fit`) parameters that stages of two workers share.

    Attributes:
        layout: which stages are where; with ``workers`` of no meaning before the first :meth:`fit`.
    """

    def __init__(
        self,
        stages: Iterable[LocalStage],
        optimizer: OptimizerFactory | Sequence[OptimizerFactory] = adam,
        *,
        workers: int | None = None,
        partition: Sequence[int] | None = None,
        replicas: int = 1,
        asynchronous: bool = False,
        buffer: int = 16,
        in_flight: int = 2,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("replicas", replicas), ("buffer", buffer), ("in_flight", in_flight), ("threads", threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        for name in ("blocks", "deep_supervision", "detach"):
            if name in options:
                raise ValueError(f"{name} is for a LocalTrainer; here each stage is trained by itself")
        if "process_group" in options:
            raise ValueError("process_group is for the other trainers; replicas are processes that share each batch")
        if options.get("cuda_graph"):
            raise ValueError(
                "cuda_graph=True captures the steps of one process; use a LocalTrainer, or stages with cuda_graph=True"
            )
        if not dist.is_available() or not dist.is_gloo_available():
            raise RuntimeError("this torch has no torch.distributed with gloo; use a LocalTrainer")
        super().__init__(stages, optimizer, **options)
        self.ema_decay = options.get("ema_decay")
        self.layout = Layout(_partition(len(self.stages), workers, partition), replicas)
        self._is_cut = partition is not None
        if self._is_cut:
            self._check_shared_parameters()
        self._rank = _given_rank(self.layout)
        self.asynchronous = asynchronous
        self.buffer = buffer
        self.in_flight = in_flight
        self.threads = threads
        self._processes: Processes | Members | None = None
        # Of the processes behind the first worker; that one uses the generators of this process.
        self._random_states: list[State | None] = [None] * self.layout.processes

    def fit(
        self,
        loader: Batches,
        epochs: int,
        val_loader: Batches | None = None,
        on_epoch_end: Callable[[Trainer, Record], None] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> list[Record]:
        """As :meth:`Trainer.fit`, in parallel.

        Stages, optimisers and ``loader`` are sent to the processes by pickle; where a loader cannot be, a class that
        makes it in ``__iter__`` can. The loader is iterated in the first worker, with the random generators of this
        process, which have the state afterwards that iterating here would have given them. Under torchrun
        ``on_epoch_end`` and ``callbacks`` are called by rank 0.

        Raises:
            ValueError: ``epochs`` below 1; ``asynchronous`` with a loader without a length; something that cannot be
                pickled.
            RuntimeError: the loader gave no batches; a worker was killed or failed. The trainer is then as it was after
                the last finished epoch; under torchrun, a checkpoint of then is what to go on from.
        """
        if self.asynchronous and length(loader) is None:
            raise ValueError("the loader has no length; asynchronous workers need it as their number of steps")
        done = False
        try:
            if self._rank:
                on_epoch_end, callbacks = None, ()
            history = super().fit(loader, epochs, val_loader, on_epoch_end, callbacks)
            done = True
        finally:
            processes, self._processes = self._processes, None
            if processes is not None:
                processes.end(at_once=not done)
        return history

    def _train_epoch(self, loader: Batches) -> Record:
        start = time.perf_counter()
        self._set_training()
        now = random_state.capture(loader, self.device)  # before members of a group begin to draw numbers of their own
        if self._processes is None:
            self._processes = self._start(loader)
        states = self._processes.epoch([self._state_of(rank, now) for rank in range(self.layout.processes)])
        self._take(states, loader)
        records = [state["history"][-1] for state in states[:: self.layout.replicas]]  # those of replicas are alike
        self._classes = [classes for record in records for classes in record["classes"]]
        return {
            "epoch": self.epoch + 1,
            "stages": self._reported(),
            "train_loss": [value for record in records for value in record["train_loss"]],
            "train_accuracy": [value for record in records for value in record["train_accuracy"]],
            "seconds": time.perf_counter() - start,
        }

    def _start(self, loader: Batches) -> Processes | Members:
        if self._rank is None:
            self._cut(loader)
            return Processes([self._job(rank, loader) for rank in range(self.layout.processes)])
        members = Members(self._backend())
        self._cut(loader, members)
        members.start(self._job(self._rank, loader))
        return members

    def _cut(self, loader: Batches, members: Members | None = None) -> None:
        """Decide which stages are where; of ``members`` rank 0 does."""
        if self._is_cut:
            return
        partition = self.layout.partition
        if not self._rank:
            before = random_state.capture(loader, self.device)
            batch = next(self._on_device(_aside(loader)), None)
            random_state.restore(before, loader, self.device)
            if batch is not None:
                partition = _balanced(self.stages, batch[0].shape[1:], len(partition))
        if members is not None:
            partition = members.of_rank_0(partition)
        self.layout = Layout(partition, self.layout.replicas)
        self._is_cut = True
        self._check_shared_parameters()

    @property
    def _logs(self) -> bool:
        return not self._rank

    @property
    def _spreads(self) -> bool:
        """Over GPUs."""
        return self.device.type == "cuda" and self.device.index is None

    def _backend(self) -> str:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self.layout.processes))
        has_gpus = self._spreads and torch.cuda.device_count() >= local_ranks
        return "cpu:gloo,cuda:nccl" if has_gpus and dist.is_nccl_available() else "gloo"

    def _job(self, rank: int, loader: Batches) -> Job:
        layout = self.layout
        stages = layout.stages(rank)
        is_first, is_last = layout.worker(rank) == 0, rank == layout.processes - layout.replicas
        looks = [stage.head.needs_image for stage in self.stages]
        device = self.device
        if self._spreads:
            local_rank = int(os.environ.get("LOCAL_RANK", rank)) if self._rank is not None else rank
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
        threads = self.threads
        if threads is None and self._rank is None:
            threads = max(1, torch.get_num_threads() // layout.processes)
        return Job(
            rank=rank,
            layout=layout,
            stages=self.stages[stages],
            optimizers=self.optimizers[stages],
            loader=loader if is_first else None,
            steps=length(loader),
            images=[any(looks[index:]) for index in range(len(looks))],
            buffer=self.buffer if self.asynchronous else None,
            in_flight=self.in_flight,
            device=device,
            backend=self._backend(),
            seed=self.generator.initial_seed(),
            threads=threads,
            options={
                "autocast_dtype": self.autocast_dtype,
                "channels_last": self.channels_last,
                "progress": self.progress and is_last,
                "accumulate": self.accumulate,
                "clip_norm": self.clip_norm,
                "ema_decay": self.ema_decay,
            },
        )

    def _state_of(self, rank: int, data: State) -> State:
        """The part of :meth:`state_dict` that the process of this rank begins an epoch with."""
        stages = self.layout.stages(rank)
        return {
            "trainer": Part.__name__,
            "processes": self.layout.replicas,
            "epoch": self.epoch,
            "history": [],
            "stages": [stage.state_dict() for stage in self.stages[stages]],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers[stages]],
            "schedulers": [],
            "averages": [average.state_dict() for average in self._averages[stages]],
            "early_stopping": [],
            "stopped": [self._has_stopped(group) for group in range(len(self.stages))[stages]],
            "scalers": precision.states(self._scalers[stages]),
            "generator": self.generator.get_state(),
            "random_state": data if self.layout.worker(rank) == 0 else self._random_states[rank],
        }

    def _take(self, states: list[State], loader: Batches) -> None:
        """What the processes have made of an epoch; of replicas the first one's."""
        layout = self.layout
        for rank in range(0, layout.processes, layout.replicas):
            for stage, state in zip(self.stages[layout.stages(rank)], states[rank]["stages"], strict=True):
                stage.load_state_dict(state)
            for average, state in zip(self._averages[layout.stages(rank)], states[rank]["averages"], strict=True):
                average.load_state_dict(state)
            for optimizer, state in zip(self.optimizers[layout.stages(rank)], states[rank]["optimizers"], strict=True):
                optimizer.load_state_dict(state)
                optimizer._opt_called = True  # type: ignore[attr-defined]  # by its process: schedulers warn of an optimiser without a step
            precision.load_states(self._scalers[layout.stages(rank)], states[rank]["scalers"])
        random_state.restore(states[0]["random_state"], loader, self.device)
        self._random_states = [
            None if layout.worker(rank) == 0 else state["random_state"] for rank, state in enumerate(states)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "partition": list(self.layout.partition) if self._is_cut else None,
            "replicas": self.layout.replicas,
            "random_states": self._random_states,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        layout, partition = self.layout, state.get("partition")
        if state.get("replicas", layout.replicas) != layout.replicas:
            raise ValueError(f"the state has replicas {state['replicas']}; this trainer has {layout.replicas}")
        if partition is not None and self._is_cut and partition != list(layout.partition):
            raise ValueError(f"the state has partition {partition}; this trainer has {list(layout.partition)}")
        if partition is not None and len(partition) != len(layout.partition):
            raise ValueError(f"the state has {len(partition)} workers; this trainer has {len(layout.partition)}")
        super().load_state_dict(state)
        if partition is not None:
            self.layout = Layout(tuple(partition), layout.replicas)
            self._is_cut = True
        self._random_states = state["random_states"]

    def _check_shared_parameters(self) -> None:
        owners: dict[int, int] = {}
        for rank in range(0, self.layout.processes, self.layout.replicas):
            for index in range(len(self.stages))[self.layout.stages(rank)]:
                for name, parameter in self.stages[index].named_parameters():
                    if owners.setdefault(id(parameter), rank) != rank:
                        raise ValueError(
                            f"stages[{index}].{name} is a parameter of another worker's stage, too; processes cannot "
                            "share one"
                        )


def _partition(stages: int, workers: int | None, partition: Sequence[int] | None) -> tuple[int, ...]:
    if (workers is None) == (partition is None):
        raise ValueError(f"workers is {workers} and partition is {partition}; one of them must be given, and one only")
    if workers is not None:
        if not 1 <= workers <= stages:
            raise ValueError(f"workers is {workers}; allowed: 1 to {stages}, the number of stages")
        return tuple((stages + worker) // workers for worker in range(workers))
    assert partition is not None
    if not isinstance(partition, Sequence) or isinstance(partition, str):
        raise TypeError(f"partition is {partition!r}; allowed: a sequence of numbers of stages, such as [3, 4], None")
    if any(count < 1 for count in partition) or sum(partition) != stages:
        raise ValueError(f"partition is {list(partition)}; allowed: numbers from 1 whose sum is {stages}, the stages")
    return tuple(partition)


def _aside(loader: Any) -> Any:
    """A copy to look into where ``loader`` itself would keep its workers, with which it cannot be pickled."""
    if not keeps_workers(loader):
        return loader
    aside = copy.copy(loader)
    if hasattr(aside, "loader"):
        aside.loader = _aside(aside.loader)
    return aside


def _balanced(stages: Sequence[LocalStage], image: Sequence[int], workers: int) -> tuple[int, ...]:
    """Numbers of stages with which the slowest worker computes least, for inputs ``(C, H, W)`` or ``(D,)``."""
    try:
        costs = summary(stages, image).local_multiply_adds()
    except Exception as error:  # whatever somebody's module says to tensors without data
        logger.warning("the operations of the stages cannot be counted, so workers get as many stages each: %s", error)
        return _partition(len(stages), workers, None)
    return tuple(b - a for a, b in itertools.pairwise([*balanced(costs, workers), len(stages)]))


def _given_rank(layout: Layout) -> int | None:
    """Of this process, where somebody else has started them; None where they are to be started.

    Raises:
        ValueError: there are more or fewer of them than needed.
    """
    if dist.is_initialized():
        rank, found = dist.get_rank(), dist.get_world_size()
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, found = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    else:
        return None
    if found != layout.processes:
        raise ValueError(
            f"this is one of {found} processes, but {len(layout.partition)} workers of {layout.replicas} replicas are "
            f"{layout.processes}; start torchrun with --nproc-per-node {layout.processes}"
        )
    return rank
