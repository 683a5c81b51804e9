"""Trainers: the steps against plain PyTorch loops, resuming, caching, and what a step must not do."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layerwise_ext.models import StagedModel, vgg
from layerwise_ext.nn import LocalStage, PooledLinearHead, ReconstructionHead
from layerwise_ext.train import GreedyTrainer, JointTrainer, LocalTrainer, Trainer
from layerwise_ext.train.feature_cache import FeatureCache
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
TRAINERS = [LocalTrainer, GreedyTrainer, JointTrainer]


def network(fused: bool = True, **options: Any) -> StagedModel:
    """Three stages in float64, with heads away from zero so that the first step already moves every layer."""
    defaults = {"in_channels": 1, "num_classes": 4, "image_size": (8, 8), "hidden": 12, "dim": 64, "seed": 0}
    model = vgg([6, "M", 8], **{**defaults, **options}, fused=fused).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for stage in model:
            stage.head.linear.weight.normal_(0, 0.1, generator=generator)
    return model


def arrays(samples: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes, told apart by the quadrant of a bright patch."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(4, (samples,), generator=generator)
    images = torch.randn(samples, 1, 8, 8, generator=generator, dtype=torch.float64)
    for image, label in zip(images, target.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 1
    return images, target


def loader(samples: int = 40, batch_size: int = 16, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*arrays(samples)), batch_size, **options)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def trainer_for(kind: type[Trainer], model: StagedModel, optimizer: Callable = sgd, **options: Any) -> Trainer:
    return kind(model, optimizer, **{"progress": False, "seed": 0, **options})


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- The steps ---------------------------------------------------------------------------------------------------------


def test_joint_training_equals_a_plain_loop() -> None:
    model = network()
    peer = network(fused=False).backbone()
    trainer, optimizer = trainer_for(JointTrainer, model), sgd(list(peer.parameters()))
    for images, target in itertools.islice(itertools.cycle(loader()), 8):
        result = trainer.step(images, target)
        logits = peer(images)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(result.loss, loss.detach()[None], **TOLERANCE)
        assert result.correct.tolist() == [int((logits.argmax(1) == target).sum())]
    torch.testing.assert_close(model.backbone_state_dict(), dict(peer.state_dict()), **TOLERANCE)


def test_joint_training_leaves_the_local_heads_alone() -> None:
    model = network()
    heads = [snapshot(stage.head) for stage in model]
    trainer_for(JointTrainer, model).fit(loader(), epochs=1)
    assert [same(before, stage.head.state_dict()) for before, stage in zip(heads, model, strict=True)] == [
        True,
        True,
        False,
    ]


def test_local_training_equals_isolated_plain_loops() -> None:
    model = network()
    peers = list(network(fused=False))
    optimizers = [sgd(list(peer.parameters())) for peer in peers]
    trainer = trainer_for(LocalTrainer, model)
    for images, target in itertools.islice(itertools.cycle(loader()), 6):
        result = trainer.step(images, target)
        features, losses = images, []
        for peer, optimizer in zip(peers, optimizers, strict=True):
            output = peer.body(features.detach())
            loss = F.cross_entropy(peer.head.to_modules()(output), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            features = output if peer.downsample is None else F.max_pool2d(output, 2)  # from before the update
        torch.testing.assert_close(result.loss, torch.stack(losses), **TOLERANCE)
    for stage, peer in zip(model, peers, strict=True):
        torch.testing.assert_close(dict(stage.state_dict()), dict(peer.state_dict()), **TOLERANCE)


@pytest.mark.parametrize("kind", TRAINERS)
def test_fused_and_plain_layers_train_alike(kind: type[Trainer]) -> None:
    histories = [trainer_for(kind, network(fused)).fit(loader(), 2, loader()) for fused in (True, False)]
    for fused, plain in zip(*histories, strict=True):
        for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert fused[key] == pytest.approx(plain[key], rel=1e-8)


def test_each_stage_is_updated_before_the_next_one_runs() -> None:
    model = network()
    trainer = trainer_for(LocalTrainer, model)
    events: list[str] = []
    for index, (stage, optimizer) in enumerate(zip(model, trainer.optimizers, strict=True)):
        stage.register_forward_hook(lambda *_, index=index: events.append(f"forward {index}"))
        stage.head.linear.weight.register_hook(lambda _, index=index: events.append(f"backward {index}"))
        optimizer.register_step_post_hook(lambda *_, index=index: events.append(f"update {index}"))
    trainer.step(*next(iter(loader())))
    assert events == [f"{event} {index}" for index in range(3) for event in ("forward", "backward", "update")]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_step_reads_nothing_back(kind: type[Trainer]) -> None:
    class Recorder(TorchDispatchMode):
        calls: list[str]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls.append(func.name())
            return func(*args, **(kwargs or {}))

    trainer = trainer_for(kind, network())
    images, target = next(iter(loader()))
    with Recorder() as recorder:
        recorder.calls = []
        trainer.step(images, target)
    assert "aten::convolution_backward" in recorder.calls or any("layerwise_ext" in call for call in recorder.calls)
    assert "aten::_local_scalar_dense" not in recorder.calls


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_training_freezes_what_it_has_trained(cache: bool) -> None:
    model = network()
    start = [snapshot(stage) for stage in model]
    seen: list[list[dict[str, torch.Tensor]]] = []
    trainer = trainer_for(GreedyTrainer, model, cache=cache)
    modes: list[list[bool]] = []
    step = trainer.step

    def recorded_step(x: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
        modes.append([stage.training and stage.body.training for stage in model])
        return step(x, target, **options)

    trainer.step = recorded_step  # type: ignore[method-assign]
    history = trainer.fit(loader(), 2, loader(), on_epoch_end=lambda *_: seen.append([snapshot(s) for s in model]))
    assert [record["stages"] for record in history] == [[0], [0], [1], [1], [2], [2]]
    assert [len(record["val_accuracy"]) for record in history] == [1, 1, 2, 2, 3, 3]
    for epoch, states in enumerate(seen):
        current = epoch // 2
        for index, state in enumerate(states):
            if index < current:  # parameters, running statistics and batch counters, bit for bit
                assert same(state, seen[2 * index + 1][index])
            else:
                assert same(state, start[index]) == (index > current)
    assert modes == [[index == stage for index in range(3)] for stage in range(3) for _ in range(2 * 3)]


def test_greedy_training_equals_a_plain_loop_on_frozen_features() -> None:
    """The first epoch of the second stage, with the cache off so that the order of the batches is the loader's."""
    model, peer = network(), network(fused=False)
    trainer = trainer_for(GreedyTrainer, model, cache=False)
    trainer.fit(loader(), 1)
    trainer_for(GreedyTrainer, [peer[0]]).fit(loader(), 1)
    peer[0].eval()
    optimizer = sgd(list(peer[1].parameters()))
    for images, target in loader():
        with torch.no_grad():
            features = peer[0].features(images)
        optimizer.zero_grad()
        F.cross_entropy(peer[1].head.to_modules()(peer[1].body(features)), target).backward()
        optimizer.step()
    torch.testing.assert_close(dict(model[1].state_dict()), dict(peer[1].state_dict()), **TOLERANCE)


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_training_drops_channels_of_what_is_kept(cache: bool) -> None:
    """Anew in each step, with the dropout of the stage before; not for the first stage, not in evaluation."""
    model = network(dropout=0.5)
    trainer = trainer_for(GreedyTrainer, model, cache=cache)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    step = trainer._step

    def watch(x: torch.Tensor, *rest: Any) -> Any:
        before = model[trainer.stage].moments
        model[trainer.stage].moments = lambda y, *more: seen.append((x, y)) or before(y, *more)  # type: ignore
        try:
            return step(x, *rest)
        finally:
            del model[trainer.stage].moments

    trainer._step = watch  # type: ignore[method-assign]
    trainer.fit([arrays(40)], 2)
    assert len(seen) == 6 and all(x is y or torch.equal(x, y) for x, y in seen[:2])
    masks = []
    for x, y in seen[2:]:
        kept = y.abs().sum((2, 3), keepdim=True) > 0
        torch.testing.assert_close(y, x * kept * 2, **TOLERANCE)
        assert 0.3 < kept.double().mean() < 0.8
        masks.append(kept)
    assert not torch.equal(masks[0], masks[1])
    assert trainer.evaluate([arrays(40)]) == trainer.evaluate([arrays(40)])


# -- The cache of frozen stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_feature_cache_gives_every_sample_once_in_its_layout(layout: torch.memory_format) -> None:
    data = torch.randn(10, 3, 2, 5)
    batches = [(x.to(memory_format=layout), t) for x, t in zip(data.split(4), torch.arange(10).split(4), strict=True)]
    cache = FeatureCache.fill(batches, 3, 1 << 20)
    assert cache is not None
    assert len(cache) == 3
    orders = []
    for seed in (0, 1, 0):
        read = list(cache.batches(torch.Generator().manual_seed(seed)))
        assert [len(x) for x, _ in read] == [4, 4, 2]
        assert all(x.is_contiguous(memory_format=layout) for x, _ in read)
        order = torch.cat([target for _, target in read])
        assert torch.equal(torch.cat([x for x, _ in read]), data[order])
        orders.append(order.tolist())
    assert sorted(orders[0]) == list(range(10))
    assert orders[0] == orders[2] != orders[1]


def test_frozen_stages_run_once_per_stage_with_the_cache() -> None:
    model = network()
    calls = [0, 0, 0]
    for index, stage in enumerate(model):

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        # LocalStage reads a Sequential body child by child: the innermost layer sees every pass.
        stage.body.register_forward_hook(count)
    trainer_for(GreedyTrainer, model).fit(loader(), 4)
    assert calls == [2 * 3, 3, 0]  # 3 batches: stage 0 for the caches of 1 and 2, stage 1 for that of 2


@pytest.mark.parametrize("limit", [16 * 3 * 8 * 4 * 4 * 8 - 1, 16 * 3 * 8 * 4 * 4 * 8])
def test_the_cache_limit_falls_back_with_a_warning(limit: int, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_for(GreedyTrainer, network(), cache_limit_bytes=limit)
    with caplog.at_level(logging.WARNING):
        history = trainer.fit(loader(), 2)
    warnings = [record.getMessage() for record in caplog.records]
    if limit % 2:
        assert len(warnings) == 1  # said once for the stage that does not fit, not in each epoch
        assert "cache_limit_bytes" in warnings[0]
    else:
        assert warnings == []
    assert len(history) == 6


def test_a_loader_without_a_length_is_not_cached(caplog: pytest.LogCaptureFixture) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(loader())

    GreedyTrainer(network(), sgd, progress=False).fit(Stream(), 1)
    assert sum("has no length" in record.getMessage() for record in caplog.records) == 2


def test_a_cache_that_overflows_says_so() -> None:
    batches = [(torch.zeros(2, 1, 1, 1), torch.zeros(2)), (torch.zeros(3, 1, 1, 1), torch.zeros(3))]
    with pytest.raises(RuntimeError, match="more samples than its first batch and its length say"):
        FeatureCache.fill(batches, 2, 1 << 20)


# -- Metrics, evaluation, options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINERS)
def test_evaluation_is_right_and_changes_nothing(kind: type[Trainer]) -> None:
    model = network()
    trainer = trainer_for(kind, model)
    model[1].body.bn.eval()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    scores = trainer.evaluate(loader(batch_size=7))
    assert same(before, model.state_dict())
    assert modes == [module.training for module in model.modules()]

    images, target = arrays()
    peer = copy.deepcopy(model).eval()
    features, losses, accuracies = images, [], []
    for stage in peer:
        output = stage.body(features)
        logits = stage.head.to_modules()(output)
        features = output if stage.downsample is None else F.max_pool2d(output, 2)
        losses.append(F.cross_entropy(logits, target).item())
        accuracies.append(float((logits.argmax(1) == target).double().mean()))
    reported = {LocalTrainer: [0, 1, 2], GreedyTrainer: [0], JointTrainer: [2]}[kind]
    assert scores["stages"] == reported
    assert scores["loss"] == pytest.approx([losses[k] for k in reported])
    assert scores["accuracy"] == pytest.approx([accuracies[k] for k in reported])
    assert scores["final"] == scores["accuracy"][-1]
    assert scores["samples"] == 40


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_learns_and_keeps_a_history(kind: type[Trainer]) -> None:
    trainer = trainer_for(kind, network(), adam)
    history = trainer.fit(loader(200, shuffle=True), 8, loader(200))
    assert history is trainer.history
    assert [record["epoch"] for record in history] == list(range(1, trainer.epoch + 1))
    assert trainer.epoch == (24 if kind is GreedyTrainer else 8)
    assert all(record["seconds"] > 0 for record in history)
    assert trainer.evaluate(loader(200))["final"] == history[-1]["val_accuracy"][-1] > 0.9


def test_training_metrics_weigh_batches_by_their_size() -> None:
    trainer = trainer_for(JointTrainer, network(), lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    losses = []
    model = network()
    for images, target in loader():
        losses.append(F.cross_entropy(model(images), target).item() * len(target))
    (record,) = trainer.fit(loader(), 1)
    assert record["train_loss"] == pytest.approx([sum(losses) / 40])


@pytest.mark.parametrize("kind", TRAINERS)
def test_accuracies_are_over_the_samples_with_a_label(kind: type[Trainer]) -> None:
    images, target = arrays()
    target[::4] = -100
    data = [(images, target)]
    trainer = trainer_for(kind, network(), lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    result = trainer_for(kind, network()).step(images, target)
    assert result.labelled == 30
    assert trainer.fit(data, 1)[0]["train_accuracy"] == (result.correct / 30).tolist()
    scores = trainer.evaluate(data, ensemble=True)
    for name in ("final", "ensemble"):
        hits = trainer.predict(images, ensemble=name == "ensemble").argmax(1) == target
        assert scores[name] == pytest.approx(hits[target != -100].double().mean().item())
    assert scores["samples"] == 40


def test_schedulers_step_once_per_epoch_of_their_own_optimizer() -> None:
    halve = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)  # noqa: E731
    rates: list[list[float]] = []
    for kind in TRAINERS:
        trainer = trainer_for(kind, network(), scheduler=halve)
        trainer.fit(loader(), 2)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])
    assert rates == [[pytest.approx(0.025)] * 3, [pytest.approx(0.025)] * 3, [pytest.approx(0.025)]]


@pytest.mark.parametrize("kind", TRAINERS)
def test_bfloat16_autocast(kind: type[Trainer]) -> None:
    model = network().float()
    data = [(images.float(), target) for images, target in loader()]
    trainer = trainer_for(kind, model, autocast_dtype=torch.bfloat16)
    seen: set[torch.dtype] = set()
    # A joint step runs the bodies, the others run the stages.
    model[1].body.register_forward_hook(lambda _, args, output: seen.add(output.dtype))
    model[1].register_forward_hook(lambda _, args, output: seen.add(output.features.dtype))
    history = trainer.fit(data, 2, data)
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.tensor(record["train_loss"]).isfinite().all() for record in history)


def test_layout_of_parameters_and_batches() -> None:
    for channels_last in (True, False):
        model = network(in_channels=3)
        trainer = trainer_for(LocalTrainer, model, channels_last=channels_last)
        layouts = []
        model[0].register_forward_hook(
            lambda _, args, out, layouts=layouts: layouts.append(
                args[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
        images, target = arrays()
        trainer.fit([(images.expand(-1, 3, -1, -1).contiguous(), target)], 1)
        weight = model[0].body.conv.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert layouts == [channels_last]


def test_the_seed_shuffles_the_cache_and_nothing_else() -> None:
    before = torch.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        model = network()
        trainer_for(GreedyTrainer, model, seed=seed).fit([arrays()] * 2, 2)
        results.append([snapshot(stage) for stage in model])
    assert torch.equal(before, torch.get_rng_state())
    assert all(same(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert same(results[0][0], results[2][0])  # the first stage reads the loader itself
    assert not same(results[0][1], results[2][1])


def test_progress_bar_and_log(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="layerwise_ext"):
        trainer_for(LocalTrainer, network()).fit(loader(), 1, loader())
    assert capsys.readouterr().err == ""
    assert any("val_accuracy" in record.getMessage() for record in caplog.records)
    trainer_for(LocalTrainer, network(), progress=True).fit(loader(), 1)
    assert "epoch 1" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    images, target = arrays()
    images[0] = float("nan")
    trainer_for(LocalTrainer, network()).fit([(images, target)], 1)
    assert any("the loss of stage 0 is nan" in record.getMessage() for record in caplog.records)


def test_frozen_parameters_stay() -> None:
    model = network()
    model[0].body.conv.weight.requires_grad_(False)
    before = model[0].body.conv.weight.clone()
    trainer_for(LocalTrainer, model).fit(loader(), 1)
    assert torch.equal(before, model[0].body.conv.weight)


def test_bad_arguments() -> None:
    stage = LocalStage(nn.Identity(), PooledLinearHead(1, 4), detach=False)
    plateau = lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)  # noqa: E731
    for error, message, make in [
        (ValueError, "stages is empty", lambda: LocalTrainer([])),
        (TypeError, r"stages\[0\] is Linear", lambda: JointTrainer([nn.Linear(2, 2)])),  # type: ignore[list-item]
        (ValueError, r"stages\[0\] has detach=False", lambda: LocalTrainer([stage])),
        (
            ValueError,
            r"stages\[1\] has a ReconstructionHead, which looks at the image",
            lambda: GreedyTrainer([stage, LocalStage(nn.Identity(), ReconstructionHead(1)), stage]),
        ),
        (ValueError, "autocast_dtype is torch.float64", lambda: JointTrainer(network(), autocast_dtype=torch.float64)),
        (ValueError, "ReduceLROnPlateau", lambda: JointTrainer(network(), scheduler=plateau)),
        (ValueError, "epochs is 0", lambda: trainer_for(JointTrainer, network()).fit(loader(), 0)),
        (RuntimeError, "loader gave no batches", lambda: trainer_for(JointTrainer, network()).fit([], 1)),
        (RuntimeError, "loader gave no batches", lambda: trainer_for(JointTrainer, network()).evaluate([])),
        (TypeError, "must be a pair", lambda: trainer_for(JointTrainer, network()).fit([arrays()[0]], 1)),
        (TypeError, "unexpected keyword", lambda: LocalTrainer(network(), cache=True)),
    ]:
        with pytest.raises(error, match=message):
            make()


@pytest.mark.parametrize("kind", [JointTrainer, LocalTrainer])
def test_a_batch_without_labels_has_no_part_in_losses(kind: type[Trainer]) -> None:
    images, target = arrays(16)
    nothing = torch.full_like(target, -100)
    trainer, expected = (trainer_for(kind, network()) for _ in range(2))
    record = trainer.evaluate([(images, target), (images, nothing)])
    known = expected.evaluate([(images, target)])
    assert record["loss"] == known["loss"] and record["accuracy"] == known["accuracy"]
    assert record["samples"] == 2 * known["samples"]
    (epoch,) = trainer.fit([(images, nothing), (images, target)], 1)
    assert all(map(math.isfinite, epoch["train_loss"]))
    before = snapshot(nn.ModuleList(trainer.stages))
    assert all(value.isfinite().all() for value in before.values())
    assert all(map(math.isnan, trainer.evaluate([(images, nothing)])["loss"]))
