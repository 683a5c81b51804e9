"""Fused models in use: copied, in other precisions, replicated, compiled, exported, trained, and those of libraries."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fuse_models
import layerwise_ext as lw
import pytest
import torch
import torch.nn.functional as F
from fuse_cases import TOLERANCE, Counter, batch, fused_pair, same, small
from layerwise_ext import data
from torch import Tensor, nn
from torch.utils import checkpoint


def through_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_save])
def test_copies_are_fused_and_independent(way: Any, counter: Counter) -> None:
    model, peer, _ = fused_pair("resnet")
    other = way(model)
    same(other, peer, batch())
    assert counter.take() == 9
    assert all(m.num_batches_tracked == 0 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert lw.unfuse_(other) == 9
    other(batch())
    assert counter.take() == 0
    model(batch())
    assert counter.take() == 9
    handle = model.layer1.register_forward_hook(lambda *_: None)  # ids of hooks are not used twice
    assert len(model.layer1._forward_hooks) == 1
    handle.remove()


def weight_norm_hook(conv: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(conv)


@pytest.mark.parametrize(
    "change", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, weight_norm_hook]
)
@pytest.mark.parametrize("before", [True, False])
def test_reparametrised_weights(change: Any, before: bool, counter: Counter) -> None:
    torch.manual_seed(0)
    model = small()
    if before:
        change(model[0])
    report = lw.fuse_(model)
    assert len(report.fused) == 1, str(report)
    torch.manual_seed(1)
    if not before:
        change(model[0])
    peer = small()
    torch.manual_seed(1)
    change(peer[0])
    peer.load_state_dict(model.state_dict())
    same(model, peer, batch())
    # weight_norm's hook, registered later, would see what the convolution is given
    assert counter.take() == (before or change is not weight_norm_hook)
    if change is nn.utils.parametrizations.weight_norm:
        for m in (model, peer):
            nn.utils.parametrize.remove_parametrizations(m[0], "weight")
        assert type(model[0]) is nn.Conv2d
        same(model, peer, batch())


def test_frozen_batch_norm_and_frozen_weights(counter: Counter) -> None:
    model, peer, _ = fused_pair("resnet")
    for m in (model, peer):
        m.layer1[0].bn1.eval()
        m.layer1[1].conv1.requires_grad_(False)
    same(model, peer, batch())
    assert counter.take() == 9


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_dtypes(dtype: torch.dtype, autocast: torch.dtype | None, counter: Counter) -> None:
    model = small().to(dtype)
    peer = copy.deepcopy(model)
    lw.fuse_(model)
    x = batch().to(dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y, expected = model(x), peer(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    assert counter.take() == 1


@pytest.mark.parametrize("mode", ["autocast", "no_grad"])
@pytest.mark.parametrize("steps", [(), (0,), (1,), (2,), (0, 1), (1, 2)])
def test_steps_in_different_modes_are_not_one_operator(steps: tuple[int, ...], mode: str, counter: Counter) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = small().float()

        def forward(self, x: Tensor) -> Tensor:
            for i, step in enumerate((self.conv, self.bn, self.relu)):
                changed = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else torch.no_grad()
                with changed if i in steps else contextlib.nullcontext():
                    x = step(x)
            return x

    model = Steps()
    peer = copy.deepcopy(model)
    assert len(lw.fuse_(model).fused) == 1
    x = batch().float()
    results = [m(x) for m in (model, peer)]
    assert results[0].dtype == results[1].dtype
    torch.testing.assert_close(*results, rtol=3e-2, atol=3e-2)
    assert ("relu" in [call["activation"] for call in counter.calls]) == (not steps)
    trained = []
    for m, y in zip((model, peer), results, strict=True):
        if y.requires_grad:
            y.sum().backward()
        trained.append([name for name, p in m.named_parameters() if p.grad is not None])
    assert trained[0] == trained[1]


def test_what_the_operator_does_not_take(counter: Counter) -> None:
    model = small().eval()
    peer = copy.deepcopy(model)
    lw.fuse_(model)
    for x in (batch(0), batch().to("meta"), batch(1)[0]):
        if x.device.type == "meta":
            model.to("meta"), peer.to("meta")
        results = []
        for m in (model, peer):
            try:
                results.append(m(x).shape)
            except (ValueError, RuntimeError) as error:
                results.append(str(error))
        assert results[0] == results[1]
        model, peer = model.to_empty(device="cpu"), peer.to_empty(device="cpu")
    assert counter.take() == 0


def test_inference_mode_transforms_and_tracing(counter: Counter) -> None:
    model = small().eval()
    peer = copy.deepcopy(model)
    lw.fuse_(model)
    x = batch()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), peer(x), **TOLERANCE)
    assert counter.take() == 1
    parameters = dict(model.named_parameters())
    y = torch.func.functional_call(model, parameters, (x,))
    torch.testing.assert_close(y, peer(x), **TOLERANCE)
    assert counter.take() == 1
    torch.testing.assert_close(torch.func.vmap(model)(x[None])[0], peer(x), **TOLERANCE)
    gradient = torch.func.grad(lambda x: model(x).sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: peer(x).sum())(x), **TOLERANCE)
    torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), peer(x), **TOLERANCE)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), peer(x), **TOLERANCE)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (model, peer)]
    torch.testing.assert_close(*tangents, **TOLERANCE)
    assert counter.take() == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant: bool, counter: Counter) -> None:
    model, peer, _ = fused_pair("resnet")

    def run(m: nn.Module, x: Tensor) -> list[Tensor]:
        m.zero_grad()
        y = m.conv1(x)
        with checkpoint.set_checkpoint_early_stop(False):  # it would end before the last running statistics
            for block in (*m.layer1, *m.layer2):
                y = checkpoint.checkpoint(block, y, use_reentrant=reentrant)
        y.square().sum().backward()
        return [y, *(p.grad for p in m.parameters() if p.grad is not None), *m.buffers()]

    x = batch()
    torch.testing.assert_close(run(model, x), run(peer, x), **TOLERANCE)
    assert counter.take() == 2 * 8


def test_data_parallel_and_replicas(counter: Counter) -> None:
    model, peer, _ = fused_pair("vgg")
    replica = model._replicate_for_data_parallel()
    assert replica._forward_pre_hooks == model._forward_pre_hooks
    features = model.features._replicate_for_data_parallel()
    features._modules = OrderedDict((n, m._replicate_for_data_parallel()) for n, m in model.features._modules.items())
    for m, original in zip(features, model.features, strict=True):
        m._parameters = {n: p.detach() * 2 for n, p in original._parameters.items()}
    with torch.no_grad():
        for p in peer.parameters():
            p.mul_(2)
        x = batch()
        torch.testing.assert_close(features(x), peer.features(x), **TOLERANCE)
    assert counter.take() == 3


def test_threads(counter: Counter) -> None:
    model, peer, _ = fused_pair("resnet")
    model.eval(), peer.eval()
    x = [batch() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(model, x * 4))
    torch.testing.assert_close(results, [peer(t) for t in x * 4], **TOLERANCE)
    assert counter.take() == 9 * 16


def test_distributed_data_parallel(tmp_path: Any, counter: Counter) -> None:
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, peer, _ = fused_pair("resnet")
        parallel = nn.parallel.DistributedDataParallel(model)
        x = batch()
        parallel(x).square().sum().backward()
        peer(x).square().sum().backward()
        grads = [[p.grad for p in m.parameters()] for m in (model, peer)]
        torch.testing.assert_close(*grads, **TOLERANCE)
        assert counter.take() == 9
        outside = nn.parallel.DistributedDataParallel(copy.deepcopy(peer))
        assert len(lw.fuse_(outside).fused) == 9
        outside(x)
        assert counter.take() == 9
    finally:
        distributed.destroy_process_group()


# -- Compilation -------------------------------------------------------------------------------------------------------


def operators(graph: torch.fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function" and "conv" in str(n.target)]


@pytest.mark.parametrize("name", list(fuse_models.NETWORKS))
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    model, peer, _ = fused_pair(name)
    if name == "vgg":  # momentum=None reads its counter on the host, in any model
        model.features[8].momentum = peer.features[8].momentum = 0.1
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        compiled.train(training)
        peer.train(training)
        same(compiled, peer, batch())
        same(compiled, peer, batch())


@pytest.mark.parametrize("name", list(fuse_models.NETWORKS))
def test_compiled_with_residual_and_all_activations(name: str, counter: Any) -> None:
    torch._dynamo.reset()
    model, peer, _ = fused_pair(name)
    if name == "vgg":
        model.features[8].momentum = peer.features[8].momentum = 0.1
    same(torch.compile(model, fullgraph=True, backend="aot_eager"), peer, batch())


def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    model, peer, _ = fused_pair("resnet")
    same(torch.compile(model, fullgraph=True), peer, batch())


def test_compiled_parts_of_a_fused_model() -> None:
    torch._dynamo.reset()
    model, peer, _ = fused_pair("resnet")
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(operators(graph.graph))
        return graph.forward

    model.layer1.compile(backend=backend)
    for _ in range(3):
        same(model, peer, batch())
    assert [len(found) for found in graphs] == [2, 3], graphs  # a graph per block, each compiled once
    assert all("conv_bn_act" in target for found in graphs for target in found)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["resnet", "timm", "densenet"])
def test_exported(name: str, strict: bool) -> None:
    model, peer, report = fused_pair(name)
    x = batch()
    program = torch.export.export(model.eval(), (x,), strict=strict)
    found = operators(program.graph)
    # Strict export reads additions one by one: they are exact and not fused.
    expected = sum(not (strict and fused.add) for fused in report.fused)
    assert sum("layerwise_ext.conv_bn_act" in target for target in found) == expected
    torch.testing.assert_close(program.module()(x), peer.eval()(x), **TOLERANCE)
    assert not any("training" in key for key in program.state_dict)


# -- Training ----------------------------------------------------------------------------------------------------------


def test_an_epoch_on_digits() -> None:
    """The same loss at each step, with an optimizer that was made before the model was fused."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    images, labels = data.load("digits")[:2]
    x = (images.double() / 255).expand(-1, 3, -1, -1)
    peer = fuse_models.build("resnet")
    model = copy.deepcopy(peer)
    curves = []
    for module in (model, peer):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
        if module is model:
            lw.fuse_(model)
        losses = []
        for start in range(0, len(x), 64):
            optimizer.zero_grad()
            loss = F.cross_entropy(module(x[start : start + 64]).flatten(1), labels[start : start + 64] % 3)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    assert curves[0][-1] < curves[0][0]


# -- Libraries, where they are installed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fused"),
    [("resnet18", 20), ("mobilenet_v2", 52), ("densenet121", 59), ("efficientnet_b0", 49), ("regnet_y_400mf", 53)],
)
def test_torchvision(name: str, fused: int) -> None:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # the latter where it is built for another torch
        pytest.skip(f"torchvision cannot be used: {error}")
    check_library_model(getattr(models, name)(num_classes=3), fused)


@pytest.mark.parametrize(("name", "fused"), [("resnet18", 20), ("cspdarknet53", 67), ("regnety_002", 44)])
def test_timm(name: str, fused: int) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    check_library_model(timm.create_model(name, num_classes=3), fused)


def check_library_model(peer: nn.Module, fused: int) -> None:
    peer = peer.double()
    model = copy.deepcopy(peer)
    assert len(lw.fuse_(model).fused) == fused
    for training in (True, False):
        model.train(training)
        peer.train(training)
        x = batch(2, 64).requires_grad_()
        results = []
        for m in (model, peer):
            torch.manual_seed(0)
            y = m(x)
            grads = torch.autograd.grad(y.square().sum(), [x, *m.parameters()])
            results.append((y, grads, [b.clone() for b in m.buffers()]))
        torch.testing.assert_close(*results, **TOLERANCE)
    peer.load_state_dict(model.state_dict())
    model.load_state_dict(peer.state_dict())
