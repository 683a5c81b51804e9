"""fuse_ and unfuse_: what is fused and what is not, against the unfused copy of the model, in float64."""

from __future__ import annotations

import copy
from typing import Any

import fuse_models
import layerwise_ext as lw
import pytest
import torch
import torch.nn.functional as F
from fuse_cases import TOLERANCE, Counter, batch, fused_pair, same, small, step
from layerwise_ext.fuse import hooks
from torch import Tensor, nn
from torch.utils import checkpoint


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(fuse_models.NETWORKS))
def test_fused_equals_unfused(name: str, training: bool, counter: Counter) -> None:
    model, peer, report = fused_pair(name)
    expected = fuse_models.NETWORKS[name][1]
    assert len(report.fused) == expected, str(report)
    model.train(training)
    peer.train(training)
    for _ in range(2):
        same(model, peer, batch())
        assert counter.take() == expected
    with torch.no_grad():
        x = batch()
        torch.testing.assert_close(model(x), peer(x), **TOLERANCE)
    assert counter.take() == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slopes", [1, 4])
def test_learned_and_random_slopes(slopes: int, training: bool, counter: Counter) -> None:
    peer = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(slopes), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.RReLU()
    ).double()
    model = copy.deepcopy(peer)
    assert [fused.activation for fused in lw.fuse_(model).fused] == ["prelu", "rrelu"]
    model.train(training)
    peer.train(training)
    if training:  # random numbers differ; the layer that learns its slope does not
        del model[3:], peer[3:]
    same(model, peer, batch())
    assert [call["activation"] for call in counter.calls] == ["prelu"] + ["leaky_relu"] * (not training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(fuse_models.NETWORKS))
def test_with_residual_and_all_activations(name: str, training: bool, counter: Counter) -> None:
    model, peer, report = fused_pair(name)
    _, convolutions, activations, additions = fuse_models.NETWORKS[name]
    assert sum(f.activation is not None for f in report.fused) == activations, str(report)
    assert sum(f.add for f in report.fused) == additions, str(report)
    model.train(training)
    peer.train(training)
    same(model, peer, batch())
    assert sum(call["activation"] != "identity" for call in counter.calls) == activations
    assert sum(call["residual"] is not None for call in counter.calls) == additions
    assert counter.take() == convolutions


def test_names_keys_classes_and_parameters_stay() -> None:
    model = fuse_models.build("resnet")
    before = dict(model.named_modules())
    classes = {name: type(m) for name, m in before.items()}
    state, text = model.state_dict(), repr(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lw.fuse_(model)
    assert dict(model.named_modules()) == before
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert list(model.state_dict()) == list(state) and repr(model) == text
    assert all(a is b for a, b in zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True))
    fresh = fuse_models.build("resnet")
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(fresh.state_dict())
    model(batch()).sum().backward()
    optimizer.step()


def test_unfuse_gives_the_model_back(counter: Counter) -> None:
    model = small()
    seen: list[Any] = []
    model[1].register_forward_hook(lambda *args: seen.append(args))
    lw.unfuse_(model)
    before = {name: {k: dict(v) for k, v in m.__dict__.items() if "hooks" in k} for name, m in model.named_modules()}
    del model[1]._forward_hooks[next(iter(model[1]._forward_hooks))]
    lw.fuse_(model)
    assert lw.unfuse_(model) == 1
    assert lw.unfuse_(model) == 0
    after = {name: {k: dict(v) for k, v in m.__dict__.items() if "hooks" in k} for name, m in model.named_modules()}
    before["1"]["_forward_hooks"] = {}
    assert after == before
    model(batch())
    assert counter.take() == 0


def test_fusing_twice_is_fusing_once(counter: Counter) -> None:
    model, peer, report = fused_pair("resnet")
    lw.fuse_(model.layer1)
    assert lw.fuse_(model) == report
    same(model, peer, batch())
    assert counter.take() == 9


def test_fused_layers_are_left_alone() -> None:
    model = nn.Sequential(small(), lw.nn.ConvBNReLU2d(4, 4, 1))
    report = lw.fuse_(model)
    assert [f.conv for f in report.fused] == ["0.0"]
    assert report.skipped == (("1.conv", "no forward calls it"),)


def test_report() -> None:
    report = lw.fuse_(nn.Sequential(small(nn.Conv2d(4, 4, 1), nn.Sigmoid())))
    assert report.fused == (("0.0", "0.1", False, "relu"),)
    assert report.skipped == (("0.3", "its output goes to Sigmoid, not to a BatchNorm2d"),)
    assert str(report).splitlines() == [
        "1 of 2 convolutions fused",
        "  0.0 + 0.1 + relu",
        "  0.3 left alone: its output goes to Sigmoid, not to a BatchNorm2d",
    ]
    with pytest.raises(TypeError, match=r"model is list; allowed: an nn\.Module"):
        lw.fuse_([])  # type: ignore[arg-type]


# -- Left alone --------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A convolution, a batch norm and a result that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.bn2 = nn.BatchNorm2d(3)
        self.read_twice = nn.Conv2d(3, 3, 1)
        self.bn3 = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv(self.bn(self.conv(x))))
        x = self.bn(self.other(x))
        z = self.read_twice(x)
        return self.bn3(z) + z


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.body = small()[:0].append(fuse_models.ConvNormActivation(4, 4, 3, act=nn.ReLU))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_bn(self.stem(x))
        return self.body(x) if x.sum() < 1e9 else x


class WritesOverItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        z = self.conv(x)
        x.mul_(0.5)
        return self.bn(z)


class WritesOverABatchNorm(nn.Module):
    """The second convolution's input is written over before its activation, by one that could be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        out = self.conv2(x)
        self.relu(x)
        return self.relu(self.bn2(out)) + x


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (Shared, {"conv": "called more than once", "other": "called more than once", "read_twice": "in 2 places"}),
        (lambda: nn.Sequential(Scaled(3, 4, 3), nn.BatchNorm2d(4)), {"0": "Scaled has a forward of its own"}),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)), {"0": "goes to SyncBatchNorm"}),
        (DataDependent, {"stem": "DataDependent.forward cannot be traced"}),
        (WritesOverItsInput, {"conv": "other operations run between"}),
        (WritesOverABatchNorm, {"conv2": "other operations run between"}),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)), {"0": "not initialised"}),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), {"0": "output goes to ReLU"}),
    ],
)
def test_left_alone_with_the_reason(model: Any, reasons: dict[str, str], counter: Counter) -> None:
    torch.manual_seed(0)
    model = model().double()
    peer = copy.deepcopy(model)
    report = lw.fuse_(model)
    assert {s.name for s in report.skipped} == set(reasons), str(report)
    for s in report.skipped:
        assert reasons[s.name] in s.reason
    if any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        model.eval(), peer.eval()
    if not any(isinstance(m, nn.LazyConv2d) for m in model.modules()):
        with torch.no_grad():
            x = batch()
            torch.testing.assert_close(model(x), peer(x), **TOLERANCE)
    assert counter.take() == len(report.fused)


def test_tracing_leaves_no_trace() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()
            self.register_buffer("calls", torch.zeros(()))
            self.last: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            self.last = x
            return F.dropout(self.body(x), training=self.training)

    model = Counts()
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args))
    model.eval()
    state = torch.get_rng_state()
    report = lw.fuse_(model)
    assert len(report.fused) == 1
    assert model.calls == 0 and model.last is None and not seen and not model.training and not model.body.training
    assert torch.equal(torch.get_rng_state(), state)


# -- Changes after fuse_ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_see_what_they_saw(which: int, kind: str, before: bool, counter: Counter) -> None:
    model, seen, expected = small(), [], []
    peer = copy.deepcopy(model)

    def register(module: nn.Module, log: list[Any]) -> None:
        getattr(module, f"register_{kind}_hook")(lambda module, *args: log.append(args))

    register(peer[which], expected)
    if before:
        register(model[which], seen)
    lw.fuse_(model)
    if not before:
        register(model[which], seen)
    same(model, peer, batch())
    assert len(seen) == 1
    torch.testing.assert_close(seen, expected, **TOLERANCE)
    fused = which == 2 or (which == 0 and kind == "forward_pre" and before)  # that one runs before the convolution
    assert counter.take() == fused


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("name", ["resnet", "regnet", "inverted_residual", "timm"])
def test_hooks_anywhere(name: str, kind: str, counter: Counter) -> None:
    """On each module in turn, before and after fusing."""
    peer = fuse_models.build(name)
    if kind == "full_backward":
        if name in ("resnet", "regnet"):
            pytest.skip("PyTorch lets nothing be written over whose gradient is hooked, and this network adds in place")
        for module in peer.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
    x = batch()
    for path, module in peer.named_modules():
        logs: list[list[Any]] = []
        for before in (True, False, None):
            model = copy.deepcopy(peer)
            log: list[Any] = []
            if before is False:
                lw.fuse_(model)
            register = getattr(model.get_submodule(path), f"register_{kind}_hook")
            register(lambda module, *args, log=log: log.append([module.training, *args]))
            if before:
                lw.fuse_(model)
            step(model, x)
            assert all(isinstance(t, (Tensor, bool)) for t in torch.utils._pytree.tree_leaves(log) if t is not None)
            logs.append(log)
        if not getattr(module, "inplace", False):  # what a hook gets is written over afterwards
            torch.testing.assert_close(logs[0], logs[2], **TOLERANCE)
            torch.testing.assert_close(logs[1], logs[2], **TOLERANCE)
    assert counter.take() > 0


def test_global_hooks_see_tensors(counter: Counter) -> None:
    model = small()
    lw.fuse_(model)
    seen: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, result: seen.append((*args, result)))
    try:
        model(batch())
    finally:
        handle.remove()
    assert len(seen) == 4 and all(type(t) is Tensor for pair in seen for t in pair)
    assert counter.take() == 0


def test_parts_called_from_elsewhere_are_unfused(counter: Counter) -> None:
    model, peer, _ = fused_pair("vgg")
    x = batch()
    for end in range(1, 8):
        part = model.features[:end]
        assert type(part(x)) is Tensor
        torch.testing.assert_close(part(x), peer.features[:end](x), **TOLERANCE)
    assert type(model.features[0](x)) is Tensor
    torch.testing.assert_close(model.features[0](x), peer.features[0](x), **TOLERANCE)
    assert counter.take() == 0


@pytest.mark.parametrize(
    "replacement",
    [nn.GroupNorm(2, 4), nn.Identity(), nn.InstanceNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.Sequential()],
)
@pytest.mark.parametrize("place", [1, 2])
def test_replaced_modules(replacement: nn.Module, place: int) -> None:
    model = small()
    lw.fuse_(model)
    model[place] = copy.deepcopy(replacement).double()
    peer = copy.deepcopy(model)
    lw.unfuse_(peer)
    same(model, peer, batch())


def test_sync_batch_norm_conversion_before_and_after(counter: Counter) -> None:
    before = nn.SyncBatchNorm.convert_sync_batchnorm(small())
    assert lw.fuse_(before).fused == ()
    model, peer = small(), small()
    lw.fuse_(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    peer.load_state_dict(model.state_dict())
    x = batch()
    torch.testing.assert_close(model(x), peer.eval()(x), **TOLERANCE)
    assert counter.take() == 0


class Switches(nn.Module):
    """Its forward is another one once ``mode`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.mode = ""

    def forward(self, x: Tensor) -> Any:
        z = self.conv(x)
        if self.mode == "read":
            return (z * 2 + 1 - z[:, :1].mean()) / (z.abs() + 1), -z
        if self.mode == "return":
            return {"z": z, "y": [self.relu(self.bn(z))]}
        if self.mode == "shape":
            return self.bn(z.view(z.shape)).flatten(1)
        u = self.bn(z)
        if self.mode == "add":
            return torch.cat([1 + u, u + x, x + u, torch.add(u, x, alpha=2), self.relu(u)])
        if self.mode == "add in place":
            u += x
            return u
        if self.mode == "two":
            return torch.sigmoid(u) + torch.cat([u, z]).sum(), self.relu(u)
        if self.mode == "numpy":
            return len(u), float(u.sum()), [row.shape for row in u]
        if self.mode == "no_grad":
            with torch.no_grad():
                u = self.bn(self.conv(x))
        if self.mode == "half no_grad":
            with torch.no_grad():
                z = self.conv(x)
            u = self.bn(z)
        if self.mode == "reentrant":
            u = self.bn(checkpoint.checkpoint(self.conv, x, use_reentrant=True))
        if self.mode == "checkpoint":
            u = self.bn(checkpoint.checkpoint(self.conv, x, use_reentrant=False))
        return self.relu(u)


MODES = ["", "read", "return", "shape", "add", "add in place", "two", "numpy", "no_grad", "half no_grad", "reentrant"]


@pytest.mark.parametrize("mode", [*MODES, "checkpoint"])
def test_another_path_through_forward_is_exact(mode: str) -> None:
    torch.manual_seed(0)
    model = Switches().double()
    peer = copy.deepcopy(model)
    assert len(lw.fuse_(model).fused) == 1
    model.mode = peer.mode = mode
    x = batch().requires_grad_()
    results = []
    for m in (model, peer):
        y = m(x)
        leaves = [t for t in torch.utils._pytree.tree_leaves(y) if isinstance(t, Tensor)]
        grads: Any = ()
        if any(t.requires_grad for t in leaves):
            weighted = [(t * torch.arange(t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in leaves]
            inputs = [x, *m.parameters()]
            for t in inputs:
                t.grad = None
            sum(weighted).backward()
            grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
        results.append((y, grads, [b.clone() for b in m.buffers()]))
    torch.testing.assert_close(*results, **TOLERANCE)


def test_an_activation_into_a_given_tensor(counter: Counter) -> None:
    class Given(Switches):
        def forward(self, x: Tensor) -> Tensor:
            u = self.bn(self.conv(x))
            return torch.sigmoid(u, out=torch.empty_like(x)) if self.mode else torch.sigmoid(u)

    torch.manual_seed(0)
    model = Given().double()
    peer = copy.deepcopy(model)
    x = batch()
    assert [f.activation for f in lw.fuse_(model).fused] == ["sigmoid"]
    model.mode = peer.mode = "out"
    with torch.no_grad():
        torch.testing.assert_close(model(x), peer(x), **TOLERANCE)
    assert [f.activation for f in lw.fuse_(model).fused] == [None]


def test_an_input_written_over_is_an_error() -> None:
    class Writes(Switches):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            z = self.conv(x)
            if self.mode:
                x.zero_()
            return self.bn(z)

    model = Writes().double()
    assert len(lw.fuse_(model).fused) == 1
    model.mode = "write"
    with pytest.raises(RuntimeError, match=r"modified in place.*unfuse_"):
        model(batch())
    assert hooks._thread.innermost.scope is None


def test_after_an_interruption(counter: Counter) -> None:
    model, peer, _ = fused_pair("resnet")
    handle = model.layer1[1].conv2.register_forward_pre_hook(lambda *_: signal())

    def signal() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model(batch())
    handle.remove()
    peer.load_state_dict(model.state_dict())
    same(model, peer, batch())


def test_errors_leave_no_scope_behind(counter: Counter) -> None:
    model = small()
    lw.fuse_(model)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(batch(1, 3))
    assert hooks._thread.innermost.scope is None
    model.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        model(batch())
    assert hooks._thread.innermost.scope is None
