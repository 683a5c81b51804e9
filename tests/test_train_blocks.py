"""Deep supervision, checkpointing, blocks of stages and gradients across stages, against plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layerwise_ext.nn import ConvBNReLU2d, FusedChain, LocalStage, PooledLinearHead, PooledMoments, ReconstructionHead
from layerwise_ext.train import JointTrainer, LocalTrainer, Trainer
from test_train import TOLERANCE, loader, network, sgd, snapshot, trainer_for
from torch import Tensor, nn


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return snapshot(nn.ModuleList(trainer.stages))


def detached(stages: Any, detach: Sequence[bool]) -> list[LocalStage]:
    for stage, flag in zip(stages, detach, strict=True):
        stage.detach = flag
    return list(stages)


class Plain:
    """Any of these ways of training in plain PyTorch: ``factors`` of the stages' losses, ``cuts`` behind stages."""

    def __init__(self, factors: Sequence[float], cuts: Sequence[int] = ()) -> None:
        self.stages = network(fused=False)
        self.optimizer = sgd(list(self.stages.parameters()))
        self.factors, self.cuts = factors, cuts

    def step(self, images: Tensor, target: Tensor) -> list[Tensor]:
        x, losses = images, []
        for index, stage in enumerate(self.stages):
            y = stage.body(x)
            losses.append(F.cross_entropy(stage.head.to_modules()(y), target))
            x = y if stage.downsample is None else F.max_pool2d(y, 2)
            x = x.detach() if index in self.cuts else x
        self.optimizer.zero_grad()
        sum(f * loss for f, loss in zip(self.factors, losses, strict=True) if f > 0).backward()
        self.optimizer.step()
        return [loss.detach() for f, loss in zip(self.factors, losses, strict=True) if f > 0]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("kind", "options", "factors", "cuts"),
    [
        (JointTrainer, {"deep_supervision": 0.3}, [0.3, 0.3, 1], []),
        (JointTrainer, {"deep_supervision": [0.0, 2.0]}, [0, 2, 1], []),
        (JointTrainer, {"deep_supervision": 0.3, "checkpointing": True}, [0.3, 0.3, 1], []),
        (JointTrainer, {"checkpointing": 2}, [0, 0, 1], []),
        (LocalTrainer, {"blocks": [3]}, [0, 0, 1], []),
        (LocalTrainer, {"blocks": [1, 2]}, [1, 0, 1], [0]),
        (LocalTrainer, {"blocks": (2, 1), "deep_supervision": [0.5]}, [0.5, 1, 1], [1]),
        (LocalTrainer, {"blocks": [1, 1, 1]}, [1, 1, 1], [0, 1]),
        (LocalTrainer, {"detach": False}, [1, 1, 1], []),
    ],
)
def test_steps_equal_a_plain_loop(
    kind: type[Trainer], options: dict[str, Any], factors: list[float], cuts: list[int], fused: bool
) -> None:
    peer = Plain(factors, cuts)
    trainer = trainer_for(kind, detached(network(fused), [options.get("detach", True)] * 3), **options)
    for images, target in itertools.islice(itertools.cycle(loader()), 6):
        result = trainer.step(images, target)
        torch.testing.assert_close(result.loss, torch.stack(peer.step(images, target)), **TOLERANCE)
    torch.testing.assert_close(weights(trainer), snapshot(nn.ModuleList(peer.stages)), **TOLERANCE)
    reported = [i for i, factor in enumerate(factors) if factor > 0]
    assert trainer.fit(loader(), 1, loader())[0]["stages"] == trainer.evaluate(loader())["stages"] == reported


def test_a_stage_that_detaches_cuts_the_graph_where_the_trainer_does_not() -> None:
    trainer = trainer_for(LocalTrainer, detached(network(), [False, True, False]), detach=False)
    peer = Plain([1, 1, 1], cuts=[0, 1])
    for images, target in loader():
        trainer.step(images, target)
        peer.step(images, target)
    torch.testing.assert_close(weights(trainer), snapshot(nn.ModuleList(peer.stages)), **TOLERANCE)


@pytest.mark.parametrize(("blocks", "kind"), [([3], JointTrainer), ([1, 1, 1], LocalTrainer)])
def test_the_extremes_of_blocks_are_the_other_trainers(blocks: list[int], kind: type[Trainer]) -> None:
    ours, theirs = trainer_for(LocalTrainer, network(), blocks=blocks), trainer_for(kind, network())
    history = ours.fit(loader(), 2, loader())
    for a, b in zip(history, theirs.fit(loader(), 2, loader()), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=0)
    assert len(ours.optimizers) == len(theirs.optimizers)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("checkpointing", "again"), [(True, [2, 2, 1]), (2, [2, 1, 1]), (3, [2, 2, 1])])
def test_checkpointed_layers_run_again_and_move_their_statistics_once(
    checkpointing: bool | int, again: list[int], momentum: float | None, fused: bool
) -> None:
    """With dropout, whose mask must be the same one."""
    trainers, calls = [], [0, 0, 0]
    for options in ({"checkpointing": checkpointing}, {}):
        model = network(fused)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        stages = [
            LocalStage(nn.Sequential(stage.body, nn.Dropout2d(0.3)), stage.head, downsample=downsample)
            for stage, downsample in zip(model, (("max", 2), None, None), strict=True)
        ]
        trainers.append(trainer_for(JointTrainer, stages, **options))
        if options:
            for i, stage in enumerate(stages):
                stage.body[1].register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    for seed, batch in enumerate(loader()):
        for trainer in trainers:
            torch.manual_seed(seed)
            trainer.step(*batch)
    assert calls == [3 * n for n in again]
    ours, theirs = map(weights, trainers)
    assert {int(t) for name, t in ours.items() if "num_batches" in name and "head" not in name} == {3}
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("segments", [1, 2])
def test_a_chain_that_is_run_again_is_the_chain(segments: int) -> None:
    """A FusedChain, which keeps less than its layers would and may run parts of itself again."""
    trainers = []
    for checkpointing in (True, False):
        model = network(in_channels=6)
        torch.manual_seed(3)
        chain = FusedChain(ConvBNReLU2d(1, 6, 3, padding=1), ConvBNReLU2d(6, 6, 3, padding=1), segments=segments)
        first = LocalStage(chain, PooledLinearHead(6, 4)).double()
        trainers.append(trainer_for(JointTrainer, [first, *model], checkpointing=checkpointing))
    for batch in loader():
        results = [trainer.step(*batch) for trainer in trainers]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*map(weights, trainers), rtol=1e-12, atol=1e-12)


def test_heads_in_a_block_get_the_image() -> None:
    stages = list(network())
    head = ReconstructionHead(8, image_channels=1).double()
    trainer = trainer_for(JointTrainer, [stages[0], LocalStage(stages[1].body, head), stages[2]], deep_supervision=1.0)
    images, target = next(iter(loader()))
    moments = PooledMoments.of(stages[1].features(stages[0].features(images)), head.bins)
    moments.image = images
    expected = head(moments, target).loss
    torch.testing.assert_close(trainer.step(images, target).loss[1], expected.detach(), **TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            LocalTrainer,
            {"blocks": [2, 2]},
            r"blocks is \[2, 2\]; .* add up to the 3 stages",
        ),
        (LocalTrainer, {"blocks": [3, 0]}, r"blocks is \[3, 0\]"),
        (LocalTrainer, {"blocks": []}, r"blocks is \[\]"),
        (LocalTrainer, {"blocks": [3], "detach": False}, "blocks with detach=False"),
        (LocalTrainer, {"deep_supervision": 0.5}, "deep_supervision is 0.5 without blocks: there are no hidden heads"),
        (LocalTrainer, {"blocks": [1, 2], "deep_supervision": [1, 1]}, "has 2 weights; there are 1 hidden heads"),
        (JointTrainer, {"deep_supervision": -1.0}, "deep_supervision has the weight -1.0; allowed: 0 or more"),
        (JointTrainer, {"deep_supervision": float("nan")}, "deep_supervision has the weight nan"),
        (JointTrainer, {"checkpointing": 4}, "checkpointing is 4; allowed: True, False, 2 to 3 segments"),
        (JointTrainer, {"checkpointing": 1}, "checkpointing is 1"),
        (JointTrainer, {"checkpointing": True, "cuda_graph": True}, "cuda_graph=True needs checkpointing=False"),
    ],
)
def test_bad_arguments(kind: type[Trainer], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(network(), **options)


@pytest.mark.parametrize("blocks", [2, "12"])
def test_blocks_are_a_sequence(blocks: Any) -> None:
    with pytest.raises(TypeError, match=rf"blocks is {blocks!r}; allowed: a sequence of numbers of stages"):
        LocalTrainer(network(), blocks=blocks)


def test_stages_with_gradients_need_a_trainer_with_gradients() -> None:
    stages = detached(network(), [True, False, True])
    with pytest.raises(ValueError, match=r"stages\[1\] has detach=False; local training needs detach=True"):
        LocalTrainer(stages)
