"""Data parallel training: two processes with parts of each batch against one with all of it, in float64."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layerwise_ext import checkpoint
from layerwise_ext.nn import (
    ConvBNReLU2d,
    ConvHead,
    LocalStage,
    MLPSRHead,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from layerwise_ext.train import (
    AutoencoderPretrainer,
    DecoupledTrainer,
    EarlyStopping,
    GreedyTrainer,
    JointTrainer,
    LocalTrainer,
    Trainer,
)
from test_decoupled import equal
from test_train import TOLERANCE, adam, arrays, loader, network, same, sgd, snapshot, trainer_for
from test_train_resume import Noisy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)


# -- The same numbers as one process -----------------------------------------------------------------------------------


def synchronised(group: Any = None) -> Any:
    return convert_sync_batchnorm(network(), group)


def fitted(kind: type[Trainer], stages: Any, group: Any, batch_size: int = 15, **options: Any) -> dict[str, Any]:
    """Batches of 15, 15 and 7 samples, of which a process gets 8 or 7, then 4 or 3; the last one that is evaluated has
    a single sample."""
    trainer = trainer_for(kind, stages, process_group=group, **options)
    validation = loader(31, 15)
    trainer.fit(loader(37, batch_size), 3, validation)
    state = trainer.state_dict()
    names = ("stages", "optimizers", "averages", "early_stopping")
    return {
        **{name: copy.deepcopy(state[name]) for name in names},
        "generators": (state["generator"], state["random_state"]),
        "history": without_time(trainer.history),
        "scores": trainer.evaluate(validation, ensemble=True),
        "predictions": trainer.predict(validation),
    }


def without_time(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


def local_with_options(group: Any) -> dict[str, Any]:
    return fitted(
        LocalTrainer,
        synchronised(group),
        group,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.5),
        accumulate=2,
        clip_norm=0.5,
        ema_decay=0.6,
        early_stopping=EarlyStopping(1, min_delta=0.02),
    )


def connected(group: Any) -> dict[str, Any]:
    stages = synchronised()
    for stage in stages:
        stage.detach = False
    return fitted(LocalTrainer, stages, group, detach=False)


def batch_norm_in_heads(group: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    stages = nn.ModuleList(
        [
            LocalStage(ConvBNReLU2d(1, 6, 3, padding=1), ConvHead(6, 4)),
            LocalStage(nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Tanh()), MLPSRHead(5, 4, (6, 6))),
        ]
    )
    stages[1].body[1].momentum = None
    return fitted(LocalTrainer, convert_sync_batchnorm(stages.double()), group)


def pretrained(group: Any, batch_size: int, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    layers = nn.ModuleList(
        [
            ConvBNReLU2d(1, 3, 3, padding=1, downsample=("max", 2)),
            ConvBNReLU2d(3, 4, 3, padding=1, downsample=("avg", 2)),
        ]
    )
    options = {"seed": 0, "progress": False, "process_group": group, **options}
    trainer = AutoencoderPretrainer(convert_sync_batchnorm(layers.double()), sgd, **options)
    trainer.fit(loader(37, batch_size), 2)
    state = copy.deepcopy(trainer.state_dict())
    losses = [record["train_loss"] for record in trainer.history]
    generators = (state["generator"], state["random_state"])
    parts = {name: state[name] for name in ("stages", "optimizers")}
    return {"losses": losses, "generators": generators, **parts}


# With a cache each process has an order of its own: there is one only where a batch holds everything.
SCENARIOS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "joint": lambda group: fitted(JointTrainer, synchronised(), group),
    "joint, supervised": lambda group: fitted(
        JointTrainer, synchronised(), group, deep_supervision=0.3, checkpointing=True
    ),
    "local": local_with_options,
    "blocks": lambda group: fitted(LocalTrainer, synchronised(), group, blocks=[2, 1]),
    "connected": connected,
    "heads": batch_norm_in_heads,
    "greedy": lambda group: fitted(GreedyTrainer, synchronised(), group, cache=False),
    "greedy, cached": lambda group: fitted(GreedyTrainer, synchronised(), group, batch_size=37),
    "autoencoder": lambda group: pretrained(group, 15, cache=False),
    "autoencoder, cached": lambda group: pretrained(group, 37, tied=True),
}


def assert_close(actual: Any, expected: Any, where: str) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, **TOLERANCE, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(actual[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_close(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-9, abs=1e-12), where
    else:
        assert actual == expected, where


# -- What there is in several processes only ---------------------------------------------------------------------------


def unsynchronised(group: Any) -> dict[str, Any]:
    """From other parameters and other generators in each process, and with statistics of its own."""
    calls: list[int] = []
    torch.manual_seed(group.rank())
    trainer = trainer_for(LocalTrainer, network(seed=group.rank()), process_group=group, ema_decay=0.5)
    trainer.fit(loader(37, 15, shuffle=True), 2, loader(31, 15), lambda trainer, _: calls.append(trainer.epoch))
    assert calls == ([1, 2] if group.rank() == 0 else [])
    state = trainer.state_dict()
    return {name: copy.deepcopy(state[name]) for name in ("stages", "averages", "optimizers", "random_state")}


def drawn(group: Any) -> dict[str, Any]:
    """Batches and masks of dropout, of uneven parts; both from torch's global generator."""
    torch.manual_seed(5 if group is None or group.rank() == 0 else 6)
    images, target = arrays(37)
    images[:, 0, 0, 0] = torch.arange(37)
    model = network()
    dropout = nn.Dropout(0.0 if group is None else 0.5)
    model[0].body = nn.Sequential(dropout, model[0].body)
    seen, masks = [], []
    dropout.register_forward_hook(lambda *arguments: masks.append(arguments[2][:3] != 0))
    trainer = trainer_for(JointTrainer, model, process_group=group)
    model[0].features = lambda x: (seen.append(x[:, 0, 0, 0].tolist()), LocalStage.features(model[0], x))[1]
    trainer.fit(DataLoader(TensorDataset(images, target), 15, shuffle=True), 2)
    return {"seen": seen, "masks": masks}


def with_random_stages() -> Any:
    torch.manual_seed(3)
    model = synchronised()
    model[0].body = nn.Sequential(model[0].body, nn.Dropout(0.2))
    return model


def resumed(kind: type[Trainer], folder: Path, group: Any) -> dict[str, Any]:
    """A run, and another one from its third checkpoint on, with the cache of one process only."""
    folder = folder / kind.__name__
    data = DataLoader(Noisy(), 15, shuffle=True)

    def make(cache: str) -> Trainer:
        model = with_random_stages()
        torch.manual_seed(group.rank())
        options = {"cache_dir": folder / cache} if kind is GreedyTrainer else {"accumulate": 2, "ema_decay": 0.6}
        return trainer_for(kind, model, adam, process_group=group, **options)

    def save(trainer: Trainer, _: Any) -> None:
        if trainer.epoch == 3:
            folder.mkdir(exist_ok=True)
            checkpoint.save(folder / "checkpoint.pt", trainer.state_dict())
            if kind is GreedyTrainer:
                shutil.copytree(folder / "whole", folder / "part")
                assert sorted(file.name for file in (folder / "part").iterdir()) == [
                    "stage1.0of2.features",
                    "stage1.1of2.features",
                ]
                (folder / "part" / "stage1.1of2.features").unlink()

    epochs = 2 if kind is GreedyTrainer else 4
    whole = make("whole")
    whole.fit(data, epochs, None, save)
    again = make("part")
    again.load_state_dict(checkpoint.load(folder / "checkpoint.pt"))
    again.fit(data, epochs)
    return {
        name: {"state": without_history(trainer.state_dict()), "history": without_time(trainer.history)}
        for name, trainer in (("whole", whole), ("again", again))
    }


def without_history(state: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({name: value for name, value in state.items() if name != "history"})


def resumed_autoencoder(folder: Path, group: Any) -> dict[str, Any]:
    path = folder / "autoencoder.pt"
    data = DataLoader(Noisy(), 15, shuffle=True)

    def make() -> AutoencoderPretrainer:
        stages = list(with_random_stages())[:2]
        torch.manual_seed(group.rank())
        return AutoencoderPretrainer(stages, adam, noise=0.2, progress=False, process_group=group)

    def save(trainer: Trainer, _: Any) -> None:
        if trainer.epoch == 3:
            checkpoint.save(path, trainer.state_dict())

    whole = make()
    whole.fit(data, 2, on_epoch_end=save)
    again = make()
    again.load_state_dict(checkpoint.load(path))
    again.fit(data, 2)
    return {name: without_history(t.state_dict()) for name, t in (("whole", whole), ("again", again))}


def scaled(group: Any) -> dict[str, Any]:
    """A step in which the gradients of one process are not finite, and one in which all are."""
    trainer = trainer_for(
        LocalTrainer,
        network(fused=False).float(),
        autocast_dtype=torch.float16,
        channels_last=False,
        process_group=group,
    )
    images, target = arrays(16)
    images = images.float()
    parameters = [p for stage in trainer.stages for p in stage.parameters()]
    found = []
    for value in (math.inf if group.rank() == 1 else 0.0, 0.0):
        before = [p.detach().clone() for p in parameters]
        images[0, 0, 0, 0] = value
        trainer.step(images, target)
        moved = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
        scales = [scaler.get_scale() for scaler in trainer._scalers]
        found.append((scales, moved, [p.detach().clone() for p in parameters]))
    return {"first": found[0], "second": found[1]}


def refused(group: Any) -> None:
    with pytest.raises(TypeError, match=r"process_group is str; allowed: a torch\.distributed\.ProcessGroup, None"):
        trainer_for(JointTrainer, network(), process_group="WORLD")
    with pytest.raises(ValueError, match="cuda_graph=True captures one process; process_group has 2"):
        trainer_for(JointTrainer, network(), process_group=group, cuda_graph=True)
    with pytest.raises(ValueError, match=r"a batch has 1 samples, which cannot be divided among 2 replicas; leave"):
        trainer_for(JointTrainer, network(), process_group=group).fit(loader(31, 15), 1)
    trainer = trainer_for(JointTrainer, network(), process_group=group)
    trainer.epoch = group.rank()
    with pytest.raises(ValueError, match=r"epoch is \[0, 1\] in the replicas; all of them must load the same"):
        trainer.fit(loader(), 2)
    batches = list(loader(45, 15))[: 2 + group.rank()]
    with pytest.raises(RuntimeError, match=r"the replicas got \[0, 1\] batches for an update"):
        trainer_for(JointTrainer, network(), process_group=group).fit(batches, 1)


def die(rank: int, folder: Path) -> None:
    """The second process does, in the second epoch."""
    steps: list[int] = []

    def count(*_: Any) -> None:
        steps.append(1)
        if rank == 1 and len(steps) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    model = synchronised()
    model[1].register_forward_pre_hook(count)
    trainer = trainer_for(LocalTrainer, model, process_group=dist.group.WORLD)
    save = lambda trainer, _: checkpoint.save(folder / "checkpoint.pt", trainer.state_dict())  # noqa: E731
    trainer.fit(loader(), 3, None, save)


# -- The processes -----------------------------------------------------------------------------------------------------


def worker(rank: int, folder: Path) -> None:
    group = dist.group.WORLD
    results = {name: scenario(group) for name, scenario in SCENARIOS.items()}
    results["unsynchronised"] = unsynchronised(group)
    results["drawn"] = drawn(group)
    results["scaled"] = scaled(group)
    for kind in (LocalTrainer, GreedyTrainer):
        results[f"resumed {kind.__name__}"] = resumed(kind, folder, group)
    results["resumed autoencoder"] = resumed_autoencoder(folder, group)
    refused(group)
    torch.save(results, folder / f"{rank}.pt")
    die(rank, folder)


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        worker(rank, folder)
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replicas")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=process, args=(rank, path)) for rank in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(600)
        each.kill()
    errors = [file.read_text() for file in sorted(path.glob("*.error"))]
    assert len(list(path.glob("?.pt"))) == 2, "\n".join(errors)
    assert [each.exitcode for each in processes] == [3, -signal.SIGKILL]
    return path


@pytest.fixture(scope="module")
def replicas(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one_on_whole_batches(name: str, replicas: list[dict[str, Any]]) -> None:
    first, second = (replica[name] for replica in replicas)
    assert equal(first, second)
    expected = SCENARIOS[name](None)
    del first["generators"], expected["generators"]  # others are drawn
    assert_close(first, expected, name)
    if name == "local":
        assert {watch["stopped"] for watch in expected["early_stopping"]} == {True, False}


def test_the_first_process_decides_what_the_others_begin_with(replicas: list[dict[str, Any]]) -> None:
    assert equal(*(replica["unsynchronised"] for replica in replicas))


def test_processes_share_the_order_of_the_data_but_not_the_noise(replicas: list[dict[str, Any]]) -> None:
    first, second = (replica["drawn"] for replica in replicas)
    batches = [a + b for a, b in zip(first["seen"], second["seen"], strict=True)]
    assert batches == drawn(None)["seen"]
    epochs = [[i for batch in part for i in batch] for part in (batches[:3], batches[3:])]
    assert epochs[0] != epochs[1]
    assert [sorted(epoch) for epoch in epochs] == [list(range(37))] * 2
    masks = [*first["masks"], *second["masks"]]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_a_step_is_left_out_by_all_or_none(replicas: list[dict[str, Any]]) -> None:
    for name, scale, moves in (("first", [32768.0] * 3, False), ("second", [32768.0] * 3, True)):
        own, other = (replica["scaled"][name] for replica in replicas)
        assert own[0] == other[0] == scale
        assert any(own[1]) == any(other[1]) == moves
        assert equal(own[2], other[2])


@pytest.mark.parametrize("name", ["LocalTrainer", "GreedyTrainer", "autoencoder"])
def test_a_run_resumed_from_the_checkpoint_of_the_first_process(name: str, replicas: list[dict[str, Any]]) -> None:
    first, second = (replica[f"resumed {name}"] for replica in replicas)
    assert equal(first, second)
    assert equal(first["whole"], first["again"])


def test_a_checkpoint_of_two_processes_in_one(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = with_random_stages()
    trainer = trainer_for(LocalTrainer, model, adam, accumulate=2, ema_decay=0.6)
    trainer.load_state_dict(checkpoint.load(folder / "LocalTrainer" / "checkpoint.pt"))
    assert "the state is of 2 processes, this trainer has 1: training goes on, but" in caplog.text
    assert trainer.fit(loader(), 4)[-1]["epoch"] == 4


def test_a_lost_process_ends_the_others_and_leaves_the_last_checkpoint(folder: Path) -> None:
    (error,) = folder.glob("*.error")
    assert "LinkError: the connection to another replica is lost: " in error.read_text()
    trainer = trainer_for(LocalTrainer, synchronised())
    trainer.load_state_dict(checkpoint.load(folder / "checkpoint.pt"))
    assert trainer.epoch == 1


# -- One process -------------------------------------------------------------------------------------------------------


def test_conversion_keeps_parameters_and_can_be_undone() -> None:
    stages = nn.ModuleList([network()[0], LocalStage(nn.Conv2d(6, 5, 3), MLPSRHead(5, 4, (6, 6)))])
    state, kinds = snapshot(stages), [type(m) for m in stages.modules()]
    assert convert_sync_batchnorm(stages) is stages
    converted = [m for m in stages.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(converted) == 7 and all(isinstance(m, nn.SyncBatchNorm) for m in converted)
    assert same(stages.state_dict(), state)
    assert same(copy.deepcopy(stages).state_dict(), state)
    assert convert_sync_batchnorm(stages[1].head) is stages[1].head  # again
    revert_sync_batchnorm(stages)
    assert [type(m) for m in stages.modules()] == kinds
    assert same(stages.state_dict(), state)
    with pytest.raises(TypeError, match="module has an uninitialised LazyBatchNorm2d; run it once before"):
        convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))


def test_decoupled_training_has_replicas_of_its_own() -> None:
    with pytest.raises(ValueError, match="process_group is for the other trainers; replicas are processes that share"):
        DecoupledTrainer(network(), workers=2, process_group=None)
