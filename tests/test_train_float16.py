"""float16 with scalers against plain PyTorch."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from layerwise_ext.train import GreedyTrainer, JointTrainer, LocalTrainer, Trainer, precision
from test_train import TRAINERS, loader, network, same, trainer_for
from test_train_resume import resume_after
from torch import nn

BATCHES = [(images.float(), target) for images, target in loader()]


def float_network(fused: bool = False) -> Any:
    return network(fused).float()


def trainer_in_float16(kind: type[Trainer], model: Any, **options: Any) -> Trainer:
    return trainer_for(kind, model, autocast_dtype=torch.float16, **options)


def large_scalers(count: int) -> list[torch.amp.GradScaler]:
    return [torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3) for _ in range(count)]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("kind", [JointTrainer, LocalTrainer])
def test_steps_equal_a_plain_loop_with_scalers(kind: type[Trainer], clip_norm: float | None, fused: bool) -> None:
    """The first scales are too large for float16: steps are left out until they are not."""
    model, peer = float_network(fused), float_network(fused)
    trainer = trainer_in_float16(kind, model, clip_norm=clip_norm, channels_last=False)
    parts = list(peer) if kind is LocalTrainer else [peer.backbone()]
    trainer._scalers = large_scalers(len(parts))
    scalers = large_scalers(len(parts))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in parts]
    scales = []
    for images, target in itertools.islice(itertools.cycle(BATCHES), 18):
        trainer.step(images, target)
        x, losses = images, []
        with torch.autocast("cpu", torch.float16):
            for stage in peer:
                # The forward passes are the same ones, so that the rounding is; what is compared is what follows.
                features, moments = stage.moments(x, detach=kind is LocalTrainer)
                losses.append(stage.head(moments, target).loss)
                x = features.detach() if kind is LocalTrainer else features
        losses = losses if kind is LocalTrainer else losses[-1:]
        for loss, scaler, optimizer in zip(losses, scalers, optimizers, strict=True):
            scaler.scale(loss).backward()
            if clip_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip_norm)
            scaler.step(optimizer)
            optimizer.zero_grad()
            scaler.update()
        scales.append([scaler.get_scale() for scaler in scalers])
    assert [scaler.get_scale() for scaler in trainer._scalers] == scales[-1]
    for of_one in zip(*scales, strict=True):
        assert min(of_one) < 2.0**24 and any(a < b for a, b in itertools.pairwise(of_one))
    before, expected = float_network(fused).backbone().state_dict(), dict(peer.backbone().state_dict())
    torch.testing.assert_close(dict(model.backbone().state_dict()), expected, rtol=0, atol=0)
    assert not same(before, expected)


@pytest.mark.parametrize(("kind", "stop"), [(JointTrainer, 1), (LocalTrainer, 1), (GreedyTrainer, 3)])
def test_a_resumed_run_has_the_scale(kind: type[Trainer], stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(*_: Any) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)

    monkeypatch.setattr(precision, "grad_scaler", small)
    second, straight = resume_after(kind, stop, autocast_dtype=torch.float16, accumulate=2)
    scales = [[scaler.state_dict() for scaler in trainer._scalers] for trainer in (second, straight)]
    assert scales[0] == scales[1] and len(scales[0]) == (1 if kind is JointTrainer else 3)
    # Two updates per epoch double the scale once.
    epochs = straight.epoch // (3 if kind is GreedyTrainer else 1)
    assert all(scaler.get_scale() == 4.0 * 2**epochs for scaler in straight._scalers)


def test_a_stage_with_infinite_gradients_leaves_the_others_alone() -> None:
    model = float_network()
    trainer = trainer_in_float16(LocalTrainer, model)
    model[1].head.register_forward_hook(lambda _, args, output: output._replace(loss=output.loss * math.inf))
    before = copy.deepcopy(model.backbone().state_dict())
    images, target = BATCHES[0]
    trainer.step(images, target)
    scales = [scaler.get_scale() for scaler in trainer._scalers]
    assert scales[0] == scales[2] == 2 * scales[1]
    weights = [name for name in before if name.endswith("conv.weight")]
    after = model.backbone().state_dict()
    assert [not torch.equal(after[name], before[name]) for name in weights] == [True, False, True]


def test_steps_that_are_left_out_have_no_part_in_averages() -> None:
    model = float_network()
    trainer = trainer_in_float16(LocalTrainer, model, ema_decay=0.5)
    hook = model[1].head.register_forward_hook(lambda _, args, output: output._replace(loss=output.loss * math.inf))
    images, target = BATCHES[0]
    trainer.step(images, target)
    assert [int(average.n_averaged) for average in trainer._averages] == [1, 0, 1]
    hook.remove()
    trainer.step(images, target)
    assert [int(average.n_averaged) for average in trainer._averages] == [2, 1, 2]
    averaged = trainer.ema_stages[1].body.state_dict()
    assert same(averaged, model[1].body.state_dict())  # the first weights that it sees


def test_gradients_that_cross_stages_have_one_scale() -> None:
    model = float_network()
    for stage in model:
        stage.detach = False
    trainer = trainer_in_float16(LocalTrainer, model, detach=False)
    trainer.fit(BATCHES, 2)
    assert len(trainer._scalers) == 1 and all(map(math.isfinite, trainer.history[-1]["train_loss"]))


@pytest.mark.parametrize("kind", TRAINERS)
def test_forward_passes_are_in_float16(kind: type[Trainer]) -> None:
    model = float_network()
    seen = set()
    model[0].body.conv.register_forward_hook(lambda _, args, output: seen.add(output.dtype))
    trainer = trainer_in_float16(kind, model)
    trainer.fit(BATCHES, 1, BATCHES)
    assert seen == {torch.float16}
    with pytest.raises(ValueError, match=r"the state has autocast_dtype=torch\.float16; this trainer has not"):
        trainer_for(kind, float_network()).load_state_dict(trainer.state_dict())


def test_float16_is_refused_in_a_cuda_graph() -> None:
    with pytest.raises(ValueError, match="waits for the device"):
        precision.check(torch.float16, True)
    precision.check(torch.float16, False)
    model = float_network()
    model[1].cuda_graph = True
    with pytest.raises(ValueError, match="of the trainer or of a stage, with autocast_dtype"):
        trainer_in_float16(LocalTrainer, model)
