"""Captured steps: what is captured when, and that a replayed step is the step. On the CPU (graph_recorder.py)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graph_recorder import recorded_graphs  # noqa: F401  # a fixture
from layerwise_ext import _graphs
from layerwise_ext.nn import ConvBNReLU2d, LocalStage, PooledLinearHead
from layerwise_ext.train import EarlyStopping, GreedyTrainer, JointTrainer, LocalTrainer, Trainer
from test_train import TOLERANCE, TRAINERS, adam, loader, network, sgd, snapshot, trainer_for
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("recorded_graphs")


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return snapshot(nn.ModuleList(trainer.stages))


def run(kind: type[Trainer], cuda_graph: bool, **options: Any) -> tuple[Trainer, dict[str, Tensor]]:
    """Eight batches per epoch, the last one smaller; the learning rate changes after each epoch."""
    trainer = trainer_for(kind, network(), scheduler=halving, cuda_graph=cuda_graph, **options)
    trainer.fit(loader(samples=60, batch_size=8), epochs=2)
    return trainer, weights(trainer)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_captured_run_is_the_run(kind: type[Trainer]) -> None:
    eager, expected = run(kind, False)
    captured, actual = run(kind, True)
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    for ours, theirs in zip(captured.history, eager.history, strict=True):
        for name in ("train_loss", "train_accuracy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-10)
    # Of 7 full batches in the first epoch 3 run before the capture; all of them in the second one. Greedy training
    # begins anew with each stage.
    stages = len(captured.stages) if kind is GreedyTrainer else 1
    assert captured._captured is not None and captured._captured.replays == stages * (4 + 7)


@pytest.mark.parametrize("kind", TRAINERS)
def test_options_of_a_captured_run(kind: type[Trainer]) -> None:
    options: dict[str, Any] = {"clip_norm": 0.05, "ema_decay": 0.8}
    if kind is JointTrainer:
        options["deep_supervision"] = 0.5
    if kind is LocalTrainer:
        options["blocks"] = [1, 2]
    eager, expected = run(kind, False, **options)
    captured, actual = run(kind, True, **options)
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    averages = [snapshot(nn.ModuleList(trainer.ema_stages)) for trainer in (captured, eager)]
    torch.testing.assert_close(*averages, **TOLERANCE)
    assert captured._captured is not None and captured._captured.replays > 0


def test_a_stage_that_has_stopped_is_captured_anew() -> None:
    states = []
    for cuda_graph in (False, True):
        trainer = trainer_for(LocalTrainer, network(), cuda_graph=cuda_graph, early_stopping=EarlyStopping(3))
        batches = loader(samples=60, batch_size=8)
        trainer.fit(batches, 1, batches)
        trainer._watches[1].stopped = True
        trainer.fit(batches, 3, batches)
        states.append(weights(trainer))
    torch.testing.assert_close(states[1], states[0], **TOLERANCE)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_captured_run_goes_on_from_a_checkpoint(kind: type[Trainer]) -> None:
    """Loading puts other tensors into the optimisers: a graph of the old ones would go on with those."""
    _, expected = run(kind, True)
    states = []
    first = trainer_for(kind, network(), scheduler=halving, cuda_graph=True)
    batches = loader(samples=60, batch_size=8)
    first.fit(batches, epochs=1, on_epoch_end=lambda trainer, _: states.append(copy.deepcopy(trainer.state_dict())))
    for _ in range(2):  # the second time into a trainer that has a graph
        first.load_state_dict(states[0])
        first.fit(batches, epochs=2)
        torch.testing.assert_close(weights(first), expected, **TOLERANCE)


def test_results_of_a_step_stay() -> None:
    trainer = trainer_for(LocalTrainer, network(), cuda_graph=True)
    peer = trainer_for(LocalTrainer, network())
    batch = next(iter(loader()))
    results = [trainer.step(*batch) for _ in range(8)]
    expected = [peer.step(*batch) for _ in range(8)]
    torch.testing.assert_close(results, expected, **TOLERANCE)


def test_a_graph_is_a_whole_update() -> None:
    trainer = trainer_for(LocalTrainer, network(), cuda_graph=True)
    for options in ({"update": False}, {"weight": 0.5}):
        with pytest.raises(ValueError, match="cuda_graph=True needs weight=1 and update=True"):
            trainer.step(*next(iter(loader())), **options)


def test_another_shape_that_stays_is_captured_anew() -> None:
    trainer = trainer_for(JointTrainer, network(), cuda_graph=True)
    peer = trainer_for(JointTrainer, network())
    images, target = next(iter(loader()))
    for size in [16] * 5 + [8] * 6 + [16] * 5:
        trainer.step(images[:size], target[:size])
        peer.step(images[:size], target[:size])
    torch.testing.assert_close(weights(trainer), weights(peer), **TOLERANCE)
    assert trainer._captured is not None and trainer._captured.replays == 2 + 3 + 2


def test_a_layer_that_changes_its_mode_is_captured_anew() -> None:
    trainer = trainer_for(LocalTrainer, network(), cuda_graph=True)
    peer = trainer_for(LocalTrainer, network())
    batch = next(iter(loader()))
    for t in (trainer, peer):
        for _ in range(5):
            t.step(*batch)
        for module in t.stages[1].body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        t.step(*batch)
    torch.testing.assert_close(weights(trainer), weights(peer), **TOLERANCE)


def test_a_checkpoint_of_captured_training_goes_on_without_graphs() -> None:
    """Adam on a CPU refuses to be capturable."""
    captured, plain = (trainer_for(LocalTrainer, network(), adam) for _ in range(2))
    captured.step(*next(iter(loader())))
    for optimizer in captured.optimizers:
        _graphs.make_capturable(optimizer)
    plain.load_state_dict(captured.state_dict())
    plain.step(*next(iter(loader())))
    assert not any(group["capturable"] for optimizer in plain.optimizers for group in optimizer.param_groups)


def test_a_state_loaded_behind_the_trainer_is_captured_anew() -> None:
    trainers = [trainer_for(JointTrainer, network(), cuda_graph=graph) for graph in (True, False)]
    batch = next(iter(loader()))
    for trainer in trainers:
        for _ in range(5):
            trainer.step(*batch)
        (optimizer,) = trainer.optimizers
        state = copy.deepcopy(optimizer.state_dict())
        for values in state["state"].values():
            values["momentum_buffer"].zero_()
        optimizer.load_state_dict(state)
        trainer.step(*batch)
    torch.testing.assert_close(weights(trainers[0]), weights(trainers[1]), **TOLERANCE)


def test_optimizers_are_made_capturable() -> None:
    model = network()
    optimizers = [adam(list(stage.parameters())) for stage in model]
    model[0](*next(iter(loader()))).loss.backward()
    optimizers[0].step()
    for optimizer in optimizers:
        _graphs.make_capturable(optimizer)
        assert all(group["capturable"] for group in optimizer.param_groups)
        assert all(state["step"].dtype == torch.float32 for state in optimizer.state.values())
    _graphs.make_capturable(sgd(list(model.parameters())))  # has no such option and needs none


# -- One stage ---------------------------------------------------------------------------------------------------------


def stage(cuda_graph: bool = True) -> LocalStage:
    torch.manual_seed(0)
    body = nn.Sequential(nn.MaxPool2d(2), ConvBNReLU2d(3, 8, 3, padding=1))
    return LocalStage(body, PooledLinearHead(8, 5, (2, 2)), cuda_graph=cuda_graph).double()


def data(batch: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(5, (batch,), generator=g)


def test_a_captured_stage_is_the_stage() -> None:
    ours, peer = stage(), stage(cuda_graph=False)
    optimizers = [sgd(list(module.parameters())) for module in (ours, peer)]
    for i, size in enumerate([6] * 6 + [4] + [6] * 2):
        results = []
        for module, optimizer in zip((ours, peer), optimizers, strict=True):
            output = module(*data(size, seed=i))
            (output.loss * 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            results.append((output.features.clone(), output.loss.detach(), output.logits.detach()))
        torch.testing.assert_close(*results, **TOLERANCE)
        assert not output.features.requires_grad
    torch.testing.assert_close(snapshot(ours), snapshot(peer), **TOLERANCE)
    assert ours._captured is not None and ours._captured.replays == 5


def test_gradients_add_up_over_runs_of_a_captured_stage() -> None:
    ours, peer = stage(), stage(cuda_graph=False)
    for i in range(6):
        for module in (ours, peer):
            module(*data(seed=i)).loss.backward()
    for a, b in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **TOLERANCE)


def test_a_run_before_the_backward_pass_of_the_one_before() -> None:
    module = stage()
    for i in range(5):
        first = module(*data(seed=i))
        first.loss.backward()
    first, second = module(*data()), module(*data())
    with pytest.raises(RuntimeError, match=r"ran again before loss.backward"):
        first.loss.backward()
    second.loss.backward()


def test_features_that_are_overwritten_are_not_used() -> None:
    """The next layer's backward pass, too late, says so instead of using another batch's features."""
    module, layer = stage(), nn.Conv2d(8, 4, 1, dtype=torch.float64)
    for i in range(5):
        module(*data(seed=i)).loss.backward()
    late = layer(module(*data()).features).sum()
    module(*data())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_evaluation_is_not_captured() -> None:
    module = stage()
    for _ in range(5):
        module(*data()).loss.backward()
    expected = copy.deepcopy(module).eval()
    x, target = data()
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x, target), expected(x, target))
        assert module(x).loss is None
    assert module._captured is not None and module._captured.replays == 2


def test_a_frozen_stage_is_not_captured() -> None:
    module = stage().requires_grad_(False)
    expected = copy.deepcopy(module)
    for _ in range(5):
        torch.testing.assert_close(module(*data()).loss, expected(*data()).loss)
    assert module._captured is None


def test_a_copy_of_a_captured_stage_is_its_own() -> None:
    module = stage()
    for _ in range(5):
        module(*data()).loss.backward()
    twin = copy.deepcopy(module)
    before = snapshot(module)
    for _ in range(5):
        twin(*data()).loss.backward()
    torch.testing.assert_close(snapshot(module), before, rtol=0, atol=0)


def test_parameters_without_a_gradient_have_none() -> None:
    module = stage()
    module.body.add_module("1", copy.deepcopy(module.body[1]))
    module.body[1].register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    module.body[1].bn.weight.requires_grad_(False)
    for _ in range(5):
        module.zero_grad()
        module(*data()).loss.backward()
        assert module.body[1].unused.grad is None and module.body[1].bn.weight.grad is None
        assert module.body[1].conv.weight.grad is not None


def test_what_waits_for_the_device_is_named() -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.abs().max().item()

    module = LocalStage(nn.Sequential(Waits(), nn.Conv2d(3, 8, 3)), PooledLinearHead(8, 5, 2), cuda_graph=True).double()
    for _ in range(3):
        module(*data()).loss.backward()
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.*\n.*cuda_graph=False runs any step"):
        module(*data())


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs detach=True"):
        LocalStage(nn.Identity(), PooledLinearHead(3, 5), detach=False, cuda_graph=True)
    cumulative = LocalStage(ConvBNReLU2d(3, 8, 3, momentum=None), PooledLinearHead(8, 5, 2), cuda_graph=True).double()
    with pytest.raises(ValueError, match=r"a number as momentum of the batch norm 'body.bn', got None"):
        cumulative(*data())
    with pytest.raises(ValueError, match=r"a number as momentum of the batch norm 'body.bn', got None"):
        LocalTrainer([cumulative], cuda_graph=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="needs stages on a CUDA device; they are on cpu"):
        LocalTrainer(network(), cuda_graph=True)
