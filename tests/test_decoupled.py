"""Training in several processes: against one process, from replay buffers, resumed, and with a worker that dies."""

from __future__ import annotations

import io
import itertools
import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layerwise_ext._replicas import LinkError
from layerwise_ext.nn import FunctionHead, LocalStage, PooledLinearHead, ReconstructionHead, convert_sync_batchnorm
from layerwise_ext.train import DecoupledTrainer, EarlyStopping, LocalTrainer, Record, ReplayBuffer, Trainer
from layerwise_ext.train._links import _HEADER, End, Incoming, Replayed, _Batch, _describe, _size, _views
from layerwise_ext.train.decoupled import _balanced
from test_train import TOLERANCE, adam, arrays, loader, network, same, sgd, snapshot, trainer_for
from test_train_resume import Around, Noisy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, in whatever containers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def without_seconds(history: list[Record]) -> list[str]:
    """As text, in which NaN equals itself and numbers have all their digits."""
    return [str({key: value for key, value in record.items() if key != "seconds"}) for record in history]


# -- The replay buffer -------------------------------------------------------------------------------------------------


def test_replay_buffer_gives_the_least_used_and_of_these_the_newest() -> None:
    buffer: ReplayBuffer[str] = ReplayBuffer(3)
    with pytest.raises(IndexError, match="the buffer is empty"):
        buffer.sample()
    assert [buffer.add(item) for item in "ab"] == [None, None]
    assert [buffer.sample() for _ in range(5)] == list("babab")  # a twice, b three times
    assert buffer.add("c") is None
    assert [buffer.sample() for _ in range(4)] == list("ccca")
    assert buffer.add("d") == "a"  # the oldest, whatever its uses
    assert len(buffer) == 3
    assert [buffer.sample() for _ in range(5)] == list("ddddc")
    assert [buffer.add(item) for item in "ef"] == ["b", "c"]
    assert [buffer.sample() for _ in range(2)] == ["f", "e"]


def test_replay_buffer_of_one_item_repeats_it() -> None:
    buffer: ReplayBuffer[int] = ReplayBuffer(1)
    assert [buffer.add(item) for item in range(3)] == [None, 0, 1]
    assert [buffer.sample() for _ in range(3)] == [2, 2, 2]
    with pytest.raises(ValueError, match="capacity is 0; allowed: 1 or more"):
        ReplayBuffer(0)


# -- Links -------------------------------------------------------------------------------------------------------------

END = End(peer=0, name="worker 0", group=None, device=torch.device("cpu"), in_flight=2)


def test_batches_keep_values_shapes_dtypes_and_strides() -> None:
    x = torch.randn(3, 4, 5, 6)
    batches = [
        (x, torch.arange(3)),
        (x.to(memory_format=torch.channels_last), torch.arange(3), x.double()),
        (torch.randn(7, 9, 1, 1).to(memory_format=torch.channels_last).bfloat16(), torch.arange(7)),
        (x.transpose(1, 3), torch.tensor([], dtype=torch.int64)),
    ]
    for batch in batches:
        header = _describe(batch)
        assert len(header) == _HEADER and header[0] == len(batch)
        memory = torch.empty(_size(header), dtype=torch.uint8)
        views = list(_views(header, memory))
        for view, tensor in zip(views, batch, strict=True):
            view.copy_(tensor)
        for view, tensor in zip(views, batch, strict=True):
            assert torch.equal(view, tensor)
            assert view.dtype == tensor.dtype and view.stride() == tensor.stride()
    (gaps,) = _views(_describe((x[:, :2],)), torch.empty(4096, dtype=torch.uint8))
    assert gaps.shape == (3, 2, 5, 6) and gaps.is_contiguous()
    with pytest.raises(TypeError, match=r"a batch has a tensor of torch\.complex64"):
        _describe((x.to(torch.complex64),))


class Scripted:
    """A link whose other end is the list ``sent``; an error in it is raised."""

    def __init__(self, *args: Any, sent: list[Any], **options: Any) -> None:
        super().__init__(*args, **options)
        self.sent = sent

    def _receive(self) -> Iterator[_Batch]:
        for number in self.sent:
            if isinstance(number, Exception):
                raise number
            memory = torch.tensor([number], dtype=torch.uint8)
            yield _Batch(memory, (memory,))


class InOrder(Scripted, Incoming):
    pass


class FromBuffer(Scripted, Replayed):
    pass


@pytest.mark.parametrize("error", [LinkError("worker 0 is lost"), MemoryError("worker 0 sends too much")])
def test_an_incoming_link_gives_every_batch_once_and_then_the_error(error: Exception) -> None:
    link = InOrder(END, sent=[1, 2, 3, 4])
    for _ in range(2):
        assert [x.item() for (x,) in link] == [1, 2, 3, 4]
    batches = iter(InOrder(END, sent=[1, error]))
    assert next(batches)[0].item() == 1
    with pytest.raises(type(error), match="worker 0"):
        next(batches)
    with pytest.raises(type(error), match="worker 0"):
        list(FromBuffer(END, 3, 5, sent=[error]))


def test_a_replayed_link_takes_its_steps_and_keeps_what_came_last() -> None:
    link = FromBuffer(END, 3, 5, sent=[1])
    assert [x.item() for (x,) in link] == [1] * 5  # it does not wait for a second one
    link.sent = [2, 3, 4, 5]
    seen = [x.item() for (x,) in link]
    assert len(seen) == 5 and len(link.buffer) == 3
    assert [batch.tensors[0].item() for batch in link.buffer._items] == [3, 4, 5]


# -- Two processes -----------------------------------------------------------------------------------------------------


def resumable(workers: bool) -> tuple[Trainer, DataLoader]:
    """A last smaller batch, augmentation from the global generator, a later stage that looks at the image, two batches
    to an update, and a stage that stops before the others."""
    torch.manual_seed(3)
    model = network()
    stages = [model[0], LocalStage(model[1].body, ReconstructionHead(8, 1).double()), model[2]]
    data = DataLoader(Noisy(), 16, shuffle=True, generator=torch.Generator().manual_seed(4))
    schedule = lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.5)  # noqa: E731
    options = {"scheduler": schedule, "seed": 0, "progress": False, "accumulate": 2, "clip_norm": 0.5, "ema_decay": 0.6}
    options["early_stopping"] = EarlyStopping(1, min_delta=0.01)
    if workers:
        return DecoupledTrainer(stages, sgd, partition=[1, 2], **options), data
    return LocalTrainer(stages, sgd, **options), data


def test_synchronous_training_and_its_resumption_equal_one_process() -> None:
    one, data = resumable(False)
    expected = one.fit(data, 3, loader())
    two, data = resumable(True)
    checkpoint = io.BytesIO()

    def save(trainer: Trainer, record: Record) -> None:
        if trainer.epoch == 2:
            torch.save(trainer.state_dict(), checkpoint)

    two.fit(data, 3, loader(), save)
    checkpoint.seek(0)
    resumed, data = resumable(True)
    resumed.load_state_dict(torch.load(checkpoint, weights_only=True))
    resumed.fit(data, 3, loader())
    state = one.state_dict()
    assert len({watch["stopped"] for watch in state["early_stopping"]}) == 2
    for trainer in (two, resumed):
        assert without_seconds(trainer.history) == without_seconds(expected)
        found = trainer.state_dict()
        for name in ("stages", "optimizers", "schedulers", "averages", "early_stopping", "random_state"):
            assert equal(found[name], state[name]), name
    assert multiprocessing.active_children() == []


def test_stages_of_vectors_train_as_in_one_process() -> None:
    """The links, the partition and the heads take [N, C]."""

    def stages() -> list[LocalStage]:
        torch.manual_seed(0)
        bodies = (nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU()), nn.Linear(12, 6))
        return [
            LocalStage(body.double(), PooledLinearHead(width, 4, bins=1).double())
            for body, width in zip(bodies, (12, 6), strict=True)
        ]

    one, two = LocalTrainer(stages(), sgd, progress=False), DecoupledTrainer(stages(), sgd, workers=2, progress=False)
    assert without_seconds(two.fit(loader(), 2)) == without_seconds(one.fit(loader(), 2))
    assert equal(two.state_dict()["stages"], one.state_dict()["stages"])


def test_float16_has_the_scales_of_one_process() -> None:
    """The first ones are too large: steps are left out until they are not, in each stage for itself."""
    batches = [(images.float(), target) for images, target in loader()]
    trainers: list[Trainer] = []
    for kind, options in ((LocalTrainer, {}), (DecoupledTrainer, {"partition": [2, 1]})):
        trainer = trainer_for(kind, network().float(), autocast_dtype=torch.float16, **options)
        trainer._scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**s, growth_interval=3) for s in (20, 24, 28)]
        trainer.fit(batches, 3)
        trainers.append(trainer)
    one, two = (trainer.state_dict() for trainer in trainers)
    assert without_seconds(trainers[0].history) == without_seconds(trainers[1].history)
    assert equal(one["stages"], two["stages"]) and equal(one["optimizers"], two["optimizers"])
    assert one["scalers"] == two["scalers"] and len({state["scale"] for state in one["scalers"]}) > 1


def test_asynchronous_training_learns() -> None:
    model = network()
    trainer = trainer_for(DecoupledTrainer, model, adam, workers=3, asynchronous=True, buffer=2)
    history = trainer.fit(loader(200, shuffle=True), 6, loader(200))
    assert [record["stages"] for record in history] == [[0, 1, 2]] * 6
    for first, last in zip(history[0]["train_loss"], history[-1]["train_loss"], strict=True):
        assert last < 0.5 * first
    assert history[-1]["val_accuracy"][-1] > 0.9
    for optimizer in trainer.optimizers:  # every worker has taken as many steps as the loader has batches
        assert {state["step"].item() for state in optimizer.state.values()} == {6 * 13}


class Faulty(nn.Module):
    """Fails in the second epoch of three training steps, after the first one."""

    def __init__(self, kill: bool) -> None:
        super().__init__()
        self.kill = kill
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        if self.steps == 5 and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.steps == 5:
            raise ArithmeticError("out of order")
        return x


@pytest.mark.parametrize(("index", "kill", "message"), [
    (0, True, r"worker 0 \(stage 0; rank 0\) was ended by SIGKILL; the others were ended, and the trainer"),
    (2, False, r"worker 1 \(stages 1 to 2; rank 1\) failed; the others (.*\n)*ArithmeticError: out of order"),
])  # fmt: skip
def test_a_lost_worker_ends_the_run_and_leaves_the_last_epoch(index: int, kill: bool, message: str) -> None:
    model = network()
    model[index].body = nn.Sequential(Faulty(kill), model[index].body)
    trainer = trainer_for(DecoupledTrainer, model, adam, workers=2)
    checkpoints = []

    def save(trainer: Trainer, record: Record) -> None:
        checkpoints.append(io.BytesIO())
        torch.save(trainer.state_dict(), checkpoints[-1])

    data = loader()
    with pytest.raises(RuntimeError, match=message):
        trainer.fit(data, 3, None, save)
    assert multiprocessing.active_children() == []
    assert len(checkpoints) == trainer.epoch == len(trainer.history) == 1
    checkpoints[0].seek(0)
    other = trainer_for(DecoupledTrainer, network(), adam, workers=2)
    other.stages[index].body = nn.Sequential(Faulty(kill), other.stages[index].body)
    other.load_state_dict(torch.load(checkpoints[0], weights_only=True))
    assert all(same(snapshot(a), snapshot(b)) for a, b in zip(trainer.stages, other.stages, strict=True))
    assert trainer.evaluate(data)["samples"] == 40


class Fatal(nn.Identity):
    """Kills the worker that gets it, before that has met the others."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("index", [0, 2])
def test_a_worker_that_is_killed_at_the_start(index: int) -> None:
    model = network(hidden=2000)  # states that no pipe takes before somebody reads them
    model[index].body = nn.Sequential(Fatal(), model[index].body)
    trainer = trainer_for(DecoupledTrainer, model, partition=[2, 1])
    with pytest.raises(RuntimeError, match=rf"worker {index // 2} .* was ended by SIGKILL"):
        trainer.fit(loader(), 1)
    assert multiprocessing.active_children() == []


# -- More processes, and those of somebody else ------------------------------------------------------------------------


def test_replicas_train_as_one_process_on_whole_batches() -> None:
    model = convert_sync_batchnorm(network())
    data = loader(40, batch_size=15)  # parts of 8 and 7 samples, then of 5
    replicated = trainer_for(DecoupledTrainer, model, workers=2, replicas=2, accumulate=2)
    alone = trainer_for(LocalTrainer, network(), accumulate=2)
    histories = [trainer.fit(data, 2, data) for trainer in (replicated, alone)]
    for stage, peer in zip(replicated.stages, alone.stages, strict=True):
        torch.testing.assert_close(stage.state_dict(), peer.state_dict(), **TOLERANCE)
    for record, expected in zip(*histories, strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert record[name] == pytest.approx(expected[name], rel=1e-9)


def member(work: Callable[[int], Trainer], rank: int, folder: str) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        trainer = work(rank)
        torch.save((trainer.state_dict(), trainer.history), f"{folder}/{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise


def run_members(work: Callable[[int], Trainer], folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=member, args=(work, rank, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, "\n".join(errors)
    assert [process.exitcode for process in processes] == [0, 0]


def two_workers(rank: int) -> Trainer:
    with pytest.raises(ValueError, match="this is one of 2 processes, but 3 workers of 1 replicas are 3"):
        DecoupledTrainer(network(), sgd, workers=3)
    calls: list[int] = []
    trainer, data = resumable(True)
    trainer.fit(data, 1, loader(), lambda trainer, _: calls.append(trainer.epoch))
    trainer.fit(data, 2, loader(), lambda trainer, _: calls.append(trainer.epoch))
    assert calls == ([1, 2] if rank == 0 else [])
    return trainer


def test_in_processes_that_somebody_else_started_every_rank_has_the_result(tmp_path: Path) -> None:
    run_members(two_workers, tmp_path)
    one, data = resumable(False)
    expected = one.fit(data, 2, loader())
    for rank in range(2):
        state, history = torch.load(tmp_path / f"{rank}.pt")
        assert without_seconds(history) == without_seconds(expected)
        assert equal(state["stages"], one.state_dict()["stages"])
        assert equal(state["optimizers"], one.state_dict()["optimizers"])


def two_replicas(rank: int | None) -> Trainer:
    """Order and augmentation come from the global generator; after two epochs another loader takes over."""
    torch.manual_seed(3)
    if rank is None:
        trainer = trainer_for(LocalTrainer, network())
    else:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
        trainer = trainer_for(DecoupledTrainer, model, workers=1, replicas=2)
    trainer.fit(DataLoader(Noisy(), 16, shuffle=True), 2)
    trainer.fit(DataLoader(Noisy(), 10, shuffle=True), 3)
    return trainer


def test_replicas_that_somebody_else_started_read_the_same_batches(tmp_path: Path) -> None:
    run_members(two_replicas, tmp_path)
    alone = two_replicas(None)
    for rank in range(2):
        state, history = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(state["stages"], alone.state_dict()["stages"], **TOLERANCE)
        for record, expected in zip(history, alone.history, strict=True):
            assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-9)


def test_the_trainer_alone_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, target = arrays()
    images[0] = float("nan")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with caplog.at_level(logging.INFO, logger="layerwise_ext"):
            trainer_for(DecoupledTrainer, network(), workers=1).fit([(images, target)], 1)
    finally:
        dist.destroy_process_group()
    messages = [record.getMessage() for record in caplog.records]
    assert sum("train_loss nan" in message for message in messages) == 1
    assert sum("the loss of stage 0 is nan" in message for message in messages) == 1


def logging_workers(rank: int) -> Trainer:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("layerwise_ext")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    options = {"early_stopping": EarlyStopping(1, min_delta=10.0)}
    trainer = trainer_for(DecoupledTrainer, network(), workers=2, **options)
    trainer.fit(loader(num_workers=1, persistent_workers=True), 2, loader())
    if rank > 0:
        assert messages == []
        return trainer
    starts = [message.split(":")[0] for message in messages]
    assert starts.count("epoch 1") == 1 and starts.count("epoch 2") == 1 + 3  # each stage ends
    assert sum("persistent_workers=True" in message for message in messages) == 1
    return trainer


def test_of_ranks_that_somebody_else_started_the_first_one_logs(tmp_path: Path) -> None:
    run_members(logging_workers, tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_loader_that_keeps_its_workers(wrapped: bool) -> None:
    """Looking at its first batch leaves it as it was, so that it can be sent; once it has workers it cannot."""
    data: Any = loader(num_workers=1, persistent_workers=True)
    given = Around(data) if wrapped else data
    two, one = trainer_for(DecoupledTrainer, network(), workers=2), trainer_for(LocalTrainer, network())
    assert without_seconds(two.fit(given, 2)) == without_seconds(one.fit(loader(), 2))
    assert equal(two.state_dict()["stages"], one.state_dict()["stages"])
    next(iter(data))
    with pytest.raises(ValueError, match="sent to other processes by pickle, which fails"):
        trainer_for(DecoupledTrainer, network(), partition=[1, 2]).fit(given, 1)


# -- What is refused ---------------------------------------------------------------------------------------------------


def stages(*widths: int) -> list[LocalStage]:
    """Of convolutions 1x1 on a map that nobody makes smaller: what a stage computes is the product of its widths."""
    return [
        LocalStage(nn.Conv2d(a, b, 1), FunctionHead(lambda moments, target: moments.m1.sum()))
        for a, b in itertools.pairwise(widths)
    ]


@pytest.mark.parametrize(("widths", "partition"), [
    ([2, 2, 2, 2, 2], (2, 2)),
    ([2, 9, 2, 2, 2], (1, 3)),
    ([2, 2, 9, 9, 2], (2, 2)),
    ([2, 2, 2, 9, 9], (3, 1)),
    ([2, 9, 2, 9, 2, 9, 2], (2, 2, 2)),
    ([9, 9, 9, 2, 2, 9, 7], (1, 2, 3)),
])  # fmt: skip
def test_stages_are_cut_where_the_slowest_worker_has_least_to_compute(
    widths: list[int], partition: tuple[int, ...]
) -> None:
    assert _balanced(stages(*widths), (widths[0], 5, 5), len(partition)) == partition


def test_stages_whose_operations_cannot_be_counted_are_cut_by_number(caplog: pytest.LogCaptureFixture) -> None:
    class Moody(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    some = stages(2, 9, 2, 2, 2, 2)
    some[1].body = nn.Sequential(Moody(), some[1].body)
    with caplog.at_level(logging.WARNING):
        assert _balanced(some, (2, 5, 5), 2) == (2, 3)
        assert _balanced(some, (2, 5, 5), 3) == (1, 2, 2)
    assert all("the operations of the stages cannot be counted" in record.getMessage() for record in caplog.records)


def test_the_cut_is_made_once_and_is_part_of_the_state() -> None:
    data = [(torch.randn(2, 2, 5, 5), torch.zeros(2, dtype=torch.int64))]
    trainer = DecoupledTrainer(stages(2, 9, 2, 2, 2), sgd, workers=2)
    assert trainer.state_dict()["partition"] is None
    trainer._cut(data)
    assert trainer.layout.partition == (1, 3) and trainer.state_dict()["partition"] == [1, 3]
    other = DecoupledTrainer(stages(2, 9, 2, 2, 2), sgd, workers=2)
    other.load_state_dict({**trainer.state_dict(), "partition": [3, 1]})  # as of before there were such cuts
    other._cut(data)
    assert other.layout.partition == (3, 1)
    with pytest.raises(ValueError, match="the state has 2 workers; this trainer has 3"):
        DecoupledTrainer(stages(2, 9, 2, 2, 2), sgd, workers=3).load_state_dict(trainer.state_dict())
    layout = DecoupledTrainer(stages(*[1] * 8), sgd, partition=[5, 2], replicas=2).layout
    assert layout.processes == 4
    assert [layout.stages(rank) for rank in range(4)] == [slice(0, 5)] * 2 + [slice(5, 7)] * 2


def test_looking_at_the_first_batch_draws_nothing() -> None:
    data = DataLoader(TensorDataset(*arrays()), 16, shuffle=True)  # from torch's global generator
    orders = []
    for looks in (False, True):
        torch.manual_seed(0)
        trainer = trainer_for(DecoupledTrainer, network(), workers=2)
        if looks:
            trainer._cut(data)
        orders.append(torch.cat([target for _, target in data]))
    assert torch.equal(*orders)


def test_bad_arguments() -> None:
    shared = network()
    shared[2].body.extra = shared[0].body.conv
    lambdas = network()
    lambdas[0].register_forward_hook(lambda *_: None)
    batches = (batch for batch in loader())
    stop = trainer_for(DecoupledTrainer, network(), partition=[1, 2]).state_dict()
    for error, message, make in [
        (ValueError, "workers is None and partition is None; one of them", lambda: DecoupledTrainer(network())),
        (TypeError, "partition is 2; allowed: a sequence", lambda: DecoupledTrainer(network(), partition=2)),
        (ValueError, "one only", lambda: DecoupledTrainer(network(), workers=2, partition=[1, 2])),
        (
            ValueError,
            "workers is 4; allowed: 1 to 3, the number of stages",
            lambda: DecoupledTrainer(network(), workers=4),
        ),
        (ValueError, "workers is 0", lambda: DecoupledTrainer(network(), workers=0)),
        (ValueError, r"partition is \[1, 1\]; .* sum is 3", lambda: DecoupledTrainer(network(), partition=[1, 1])),
        (ValueError, r"partition is \[3, 0\]", lambda: DecoupledTrainer(network(), partition=[3, 0])),
        (ValueError, "replicas is 0; allowed: 1 or more", lambda: DecoupledTrainer(network(), workers=2, replicas=0)),
        (ValueError, "buffer is 0", lambda: DecoupledTrainer(network(), workers=2, buffer=0)),
        (ValueError, "in_flight is 0", lambda: DecoupledTrainer(network(), workers=2, in_flight=0)),
        (ValueError, "threads is 0", lambda: DecoupledTrainer(network(), workers=2, threads=0)),
        (ValueError, "blocks is for a LocalTrainer", lambda: DecoupledTrainer(network(), workers=2, blocks=[1, 2])),
        (ValueError, "cuda_graph=True captures", lambda: DecoupledTrainer(network(), workers=2, cuda_graph=True)),
        (
            ValueError,
            r"stages\[2\]\.body\.extra\.weight is a parameter of another",
            lambda: DecoupledTrainer(shared, partition=[1, 2]),
        ),
        (
            ValueError,
            r"stages\[2\]\.body\.extra\.weight is a parameter of another",
            lambda: trainer_for(DecoupledTrainer, shared, workers=3).fit(loader(), 1),
        ),
        (ValueError, "epochs is 0", lambda: trainer_for(DecoupledTrainer, network(), workers=2).fit(loader(), 0)),
        (
            ValueError,
            "the loader has no length; asynchronous workers",
            lambda: trainer_for(DecoupledTrainer, network(), workers=2, asynchronous=True).fit(batches, 1),
        ),
        (
            ValueError,
            "sent to other processes by pickle, which fails",
            lambda: trainer_for(DecoupledTrainer, lambdas, workers=2).fit([arrays()], 1),
        ),
        (
            ValueError,
            "sent to other processes by pickle",
            lambda: trainer_for(DecoupledTrainer, network(), workers=2).fit(batches, 1),
        ),
        (
            ValueError,
            r"the state has partition \[1, 2\]; this trainer has \[2, 1\]",
            lambda: trainer_for(DecoupledTrainer, network(), partition=[2, 1]).load_state_dict(stop),
        ),
    ]:
        with pytest.raises(error, match=message):
            make()
