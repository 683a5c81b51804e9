"""torch.compile, torch.export, autocast, copies."""

from __future__ import annotations

import copy
from typing import Any

import layerwise_ext as lw
import pytest
import torch
from layerwise_ext import functional
from layerwise_ext.nn import ConvBNReLU2d
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def stage(channels: int = 32) -> lw.nn.LocalStage:
    body = lw.nn.ConvBNReLU2d(3, channels, 3, padding=1)
    return lw.nn.LocalStage(body, lw.nn.PooledLinearHead(channels, 5, bins=(2, 2))).to(
        memory_format=torch.channels_last
    )


def batch(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.arange(n) % 5


def step(module: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    features, loss, logits = module(x, target)
    loss.backward()
    results = {"features": features, "loss": loss.detach(), "logits": logits.detach()}
    results |= {name.removeprefix("_orig_mod."): p.grad for name, p in module.named_parameters()}
    return results | {name.removeprefix("_orig_mod."): b.clone() for name, b in module.named_buffers()}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance, msg=name)
        assert actual[name].stride() == value.stride(), name


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_step(backend: str) -> None:
    eager = stage()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=backend)
    x, target = batch()
    for _ in range(2):  # the second step sees the running statistics of the first
        same(step(compiled, x, target), step(eager, x, target))
        eager.zero_grad()
        compiled.zero_grad()


def test_compiled_with_another_batch_size() -> None:
    eager = stage()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 7):
        eager.zero_grad()
        compiled.zero_grad()
        inputs = batch(n)
        same(step(compiled, *inputs), step(eager, *inputs))


def test_compiled_joint_layer_with_dense_gradient() -> None:
    eager = nn.Sequential(lw.nn.ConvBNReLU2d(3, 16, 3, padding=1), lw.nn.ConvBNReLU2d(16, 8, 3)).double()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for module in (eager, compiled):
        module(x).square().sum().backward()
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_compiled_under_autocast() -> None:
    eager = stage()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    x, target = batch()
    with torch.autocast("cpu", torch.bfloat16):
        same(step(compiled, x, target), step(eager, x, target), 1e-2)


def test_autocast_is_near_float32() -> None:
    exact = stage()
    low = copy.deepcopy(exact)
    x, target = batch()
    expected = step(exact, x, target)
    with torch.autocast("cpu", torch.bfloat16):
        features, loss, _ = low(x, target)
    loss.backward()
    assert features.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected["loss"], rtol=2e-2, atol=2e-2)
    for name, p in low.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32
        torch.testing.assert_close(
            p.grad, expected[name], rtol=0.1, atol=0.1 * expected[name].abs().max().item(), msg=name
        )


@pytest.mark.parametrize("training", [True, False])
def test_export(training: bool) -> None:
    module = lw.nn.ConvBNReLU2d(3, 16, 3, padding=1).train(training)
    x, _ = batch()
    program = torch.export.export(module, (x,))
    expected = copy.deepcopy(module)(x)
    torch.testing.assert_close(program.module()(x), expected)


def test_deepcopy_continues_alike() -> None:
    first = stage()
    x, target = batch()
    first(x, target).loss.backward()
    second = copy.deepcopy(first)
    first.zero_grad()
    second.zero_grad()
    same(step(second, x, target), step(first, x, target), 0)


def test_modes_without_gradients() -> None:
    module = stage()
    x, target = batch()
    expected = module.eval()(x, target)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs: Any = module(x, target)
        assert torch.equal(outputs.features, expected.features) and torch.equal(outputs.loss, expected.loss)
        assert not outputs.loss.requires_grad


@pytest.mark.parametrize(
    "options", [{"activation": "rrelu"}, {"activation": "prelu"}, {"downsample": ("max", 2)}], ids=str
)
def test_layers_of_the_extended_form_compile_whole(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layer = ConvBNReLU2d(4, 4, 3, padding=1, **options)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    x, residual = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    y = compiled(x, residual)
    y.square().sum().backward()
    if options.get("activation") != "rrelu":  # random numbers of a traced program are others
        torch.testing.assert_close(y, layer(x, residual))


def test_fake_maps_have_the_checks_of_real_ones() -> None:
    for downsample in (("space_to_depth", (1, 2)), ("max", 3)):
        with FakeTensorMode(), pytest.raises(RuntimeError, match="cannot be cut into windows"):
            functional.bn_act_moments(torch.randn(1, 2, 2, 1), torch.zeros(2), torch.ones(2), downsample=downsample)
