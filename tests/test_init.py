"""Initialisation from data: against versions of a few lines, and by what it promises."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import fuse_models
import layerwise_ext as lw
import pytest
import torch
from layerwise_ext.init import InitReport, data_dependent_, lsuv_
from layerwise_ext.nn import ConvBNReLU2d, FusedChain, LocalStage, PooledLinearHead, Residual
from torch import Tensor, nn

INITIALIZERS = [lsuv_, data_dependent_]
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 16, size: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, 3, size, size, generator=generator(1), dtype=dtype) - 0.3


def plain_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, 2, groups=2), nn.Dropout(0.5),
        nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 1, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 5),
    ).double()  # fmt: skip


def relu_network(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=bias), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, bias=bias), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(72, 7, bias=bias), nn.ReLU(), nn.Linear(7, 5, bias=bias),
    ).double()  # fmt: skip


def weighted(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def outputs(model: nn.Module, x: Tensor, run: Callable[[Tensor], Any] | None = None) -> dict[nn.Module, Tensor]:
    """What the convolutions and linear layers of plain modules give in evaluation."""
    found: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        found[module] = output.clone()

    handles = [m.register_forward_hook(keep) for m in weighted(model)]
    with torch.no_grad():
        (run or model.eval())(x)
    for handle in handles:
        handle.remove()
    return found


# -- LSUV --------------------------------------------------------------------------------------------------------------


def paper_lsuv(model: nn.Module, x: Tensor, draws: torch.Generator, tolerance: float, max_tries: int) -> list[int]:
    """The paper's algorithm as it stands: the whole network again for every try."""
    tries = []
    for layer in weighted(model):
        nn.init.orthogonal_(layer.weight, generator=draws)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        for count in range(max_tries + 1):
            std = outputs(model, x)[layer].numpy().std()
            if abs(std - 1) <= tolerance or count == max_tries:
                tries.append(count)
                break
            layer.weight.data /= std
    return tries


@pytest.mark.parametrize(("tolerance", "max_tries"), [(0.1, 10), (1e-9, 10), (0.1, 1)])
def test_lsuv_is_the_papers(tolerance: float, max_tries: int) -> None:
    model = plain_network()
    peer = copy.deepcopy(model)
    report = lsuv_(model, images(), tolerance=tolerance, max_tries=max_tries, generator=generator())
    tries = paper_lsuv(peer, images(), generator(), tolerance, max_tries)
    assert [row.tries for row in report.layers] == tries
    assert [row.name for row in report.layers] == ["0", "3", "6", "9"]
    for a, b in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    for row, y in zip(report.layers, outputs(peer, images()).values(), strict=True):
        assert row.std == pytest.approx(y.std(correction=0).item())


def check_unit_variance(plain: nn.Module, x: Tensor, report: InitReport, run: Any = None) -> None:
    """By the plain network, which has nothing of this package in it."""
    found = outputs(plain, x, run)
    assert len(found) == len([row for row in report.layers if row.note == ""]) > 0
    for y in found.values():
        assert abs(y.std(correction=0).item() - 1) <= 0.1


@pytest.mark.parametrize("build", [
    lambda **o: lw.models.vgg([8, "M", 16, 16, "M", 8], hidden=12, **o),
    lambda **o: lw.models.vgg([8, "M", 16], pool="space_to_depth", downsampling=[0], hidden=None, **o),
    lambda **o: lw.models.resnet((1, 2), width=8, **o),
    lambda **o: lw.models.resnet((1, 1), width=4, block="bottleneck", stem="imagenet", **o),
])  # fmt: skip
def test_every_layer_of_a_network_has_unit_variance(build: Callable[..., lw.models.StagedModel]) -> None:
    options: dict[str, Any] = {"image_size": (16, 16), "seed": 0}
    plain = build(**options, fused=False).double()
    for model in (build(**options).double(), build(**options, fused=False).double()):
        report = lsuv_(model, images(), generator=generator())
        plain.load_state_dict(model.state_dict())
        check_unit_variance(plain.backbone(), images(), report)
        hidden = [row for row in report.layers if row.note]
        assert [row.name for row in hidden] == [f"stages.{i}.head.linear" for i in range(len(model) - 1)]
        assert all("not called" in row.note and math.isnan(row.std) for row in hidden)
        assert not any(stage.head.linear.weight.any() for stage in list(model)[:-1])


def test_chains_and_strides() -> None:
    def layer(i: int, o: int, **options: Any) -> ConvBNReLU2d:
        return ConvBNReLU2d(i, o, 3, padding=1, **options)

    for downsample in (None, ("stride", 2), ("max", 2)):
        block = Residual(layer(6, 6), layer(6, 6, activation="identity"))
        chain = FusedChain(layer(3, 6, downsample=downsample), block, nn.MaxPool2d(2), layer(6, 4, bias=True)).double()
        report = lsuv_(chain, images(), generator=generator())
        assert [row.name for row in report.layers] == ["0.conv", "1.body.0.conv", "1.body.1.conv", "3.conv"]
        first, *inside, last = (copy.deepcopy(m) for m in chain.modules() if isinstance(m, ConvBNReLU2d))
        before, after = nn.Sequential(*first.to_modules()), nn.Sequential(*last.to_modules())
        body = nn.Sequential(*(m for one in inside for m in one.to_modules()))
        check_unit_variance(
            nn.ModuleList([before, body, after]).eval(),
            images(),
            report,
            lambda x, b=before, m=body, a=after: a(nn.functional.max_pool2d(b(x) + m(b(x)), 2)),  # body last
        )


@pytest.mark.parametrize("initialize", INITIALIZERS)
@pytest.mark.parametrize("downsample", [None, ("stride", 2), ("avg", 2)])
def test_a_fused_layer_is_as_its_plain_modules(initialize: Callable[..., InitReport], downsample: Any) -> None:
    layer = ConvBNReLU2d(3, 6, 3, padding="same", padding_mode="reflect", bias=True, downsample=downsample).double()
    if downsample == ("stride", 2):
        layer.conv.padding = 1
    plain = copy.deepcopy(nn.Sequential(*layer.to_modules()))
    for model in (layer, plain):
        initialize(model, images(), tolerance=1e-9, generator=generator())
    torch.testing.assert_close(layer.conv.weight, plain[0].weight, **EXACT)
    torch.testing.assert_close(layer.conv.bias, plain[0].bias, **EXACT)


@pytest.mark.parametrize("name", ["resnet", "vgg", "timm", "functional"])
def test_fused_models_of_others(name: str) -> None:
    model = fuse_models.build(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    peer = copy.deepcopy(model)
    assert lw.fuse_(model).fused
    report = lsuv_(model, images(), generator=generator())
    lsuv_(peer, images(), generator=generator())
    for a, b in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    check_unit_variance(peer, images(), report)
    assert lw.unfuse_(model) > 0  # it is still fused


def test_a_stage() -> None:
    stage = LocalStage(nn.Sequential(ConvBNReLU2d(3, 6, 3), ConvBNReLU2d(6, 4, 3)), PooledLinearHead(4, 2))
    report = lsuv_(stage, images(dtype=torch.float32), generator=generator())
    assert [row.note == "" for row in report.layers] == [True, True, False]


# -- Data-dependent ----------------------------------------------------------------------------------------------------


def paper_within(model: nn.Module, x: Tensor, draws: torch.Generator) -> None:
    for layer in weighted(model):
        nn.init.normal_(layer.weight, generator=draws)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        z = outputs(model, x)[layer].transpose(0, 1).flatten(1).numpy()
        mu, sigma = torch.from_numpy(z.mean(1)), torch.from_numpy(z.std(1))
        layer.weight.data /= sigma.view(-1, *[1] * (layer.weight.dim() - 1))
        if layer.bias is not None:
            layer.bias.data = -mu / sigma + 0.1


def ratios(model: nn.Module, x: Tensor, eta: Tensor) -> Tensor:
    model.eval().zero_grad()
    (model(x) * eta).sum().backward()
    grads = [(m.weight.grad, m.weight) for m in weighted(model)]
    found = torch.stack([(g.square().mean() / w.square().mean()).sqrt() for g, w in grads if g is not None]).detach()
    return found / found.log().mean().exp()


def test_data_dependent_is_the_papers() -> None:
    model = plain_network()
    peer = copy.deepcopy(model)
    data_dependent_(model, images(), max_rounds=0, generator=generator())
    paper_within(peer, images(), generator())
    for a, b in zip(model.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for layer, z in outputs(model, images()).items():
        channels = z.transpose(0, 1).flatten(1)
        torch.testing.assert_close(channels.std(1, correction=0), torch.ones(len(channels)).double())
        if layer.bias is not None:
            torch.testing.assert_close(channels.mean(1), torch.full((len(channels),), 0.1).double())


def test_layers_learn_at_one_rate_and_the_output_stays() -> None:
    x = images()
    within, model = relu_network(), relu_network()
    data_dependent_(within, x, max_rounds=0, generator=generator())
    draws = generator()
    report = data_dependent_(model, x, generator=draws)
    assert [row.tries for row in report.layers] == [1] * 4  # one round is exact where everything is homogeneous
    torch.testing.assert_close(model(x), within(x), rtol=1e-9, atol=1e-9)
    again = generator()
    for layer in weighted(model):
        torch.empty_like(layer.weight).normal_(generator=again)
    eta = torch.randn(16, 5, generator=again)
    assert torch.equal(draws.get_state(), again.get_state())
    assert (ratios(within, x, eta) - 1).abs().max() > 0.1
    torch.testing.assert_close(ratios(model, x, eta), torch.ones(4).double(), rtol=0, atol=1e-6)
    # One step by hand from where the first part ended.
    factors = ratios(within, x, eta).sqrt()
    for layer, factor, grown in zip(weighted(within), factors, factors.cumprod(0), strict=True):
        layer.weight.data *= factor
        layer.bias.data *= grown
    for a, b in zip(model.parameters(), within.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    for row, z in zip(report.layers, outputs(model, x).values(), strict=True):
        assert row.std == pytest.approx(z.std(correction=0).item()) and row.ratio == pytest.approx(1)


@pytest.mark.parametrize("fused", [True, False])
def test_data_dependent_networks(fused: bool) -> None:
    options: dict[str, Any] = {"image_size": (16, 16), "seed": 0, "fused": fused}
    x = images(dtype=torch.float32)
    vgg = lw.models.vgg([8, "M", 16, 16, "M", 8], hidden=12, **options)
    report = data_dependent_(vgg, x, generator=generator())
    visited = [row for row in report.layers if not row.note]
    assert len(visited) == 6 and all(abs(row.ratio - 1) <= 0.01 for row in visited)
    resnet = lw.models.resnet((1, 2), width=8, **options)
    first = data_dependent_(resnet, x, max_rounds=0, generator=generator())
    last = data_dependent_(resnet, x, generator=generator())
    spread = [max(abs(math.log(row.ratio)) for row in report.layers if not row.note) for report in (first, last)]
    assert spread[1] < 0.5 * spread[0]  # additions: it gets there slowly


def test_frozen_weights_and_gradients_stay_as_they_are() -> None:
    model = relu_network()
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    report = data_dependent_(model, images(), generator=generator())
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad
    assert torch.equal(model[2].weight.grad, torch.ones_like(model[2].weight)) and model[6].weight.grad is None
    assert report.layers[0].ratio == pytest.approx(1)


# -- Both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initialize", INITIALIZERS)
def test_a_generator_decides_and_nothing_else_changes(initialize: Callable[..., InitReport]) -> None:
    models = [lw.models.vgg([6, "M", 8], image_size=(16, 16), seed=seed) for seed in (0, 1)]
    model = models[0].train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    norms = {n: p.clone() for n, p in model.named_parameters() if ".bn." in n}
    state = torch.get_rng_state()
    x = images(dtype=torch.float32)
    for m in models:
        initialize(m, x, generator=generator())
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert all(torch.equal(p, norms[n]) for n, p in model.named_parameters() if n in norms)
    initialize(models[1], x, generator=generator(1))
    assert not torch.equal(models[0][0].body.conv.weight, models[1][0].body.conv.weight)
    torch.manual_seed(3)
    initialize(models[0], x)
    torch.manual_seed(3)
    initialize(models[1], x)
    assert torch.equal(models[0][0].body.conv.weight, models[1][0].body.conv.weight)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("initialize", INITIALIZERS)
def test_bfloat16(initialize: Callable[..., InitReport]) -> None:
    model = lw.models.vgg([6, "M", 8], image_size=(16, 16), seed=0).bfloat16()
    report = initialize(model, images(dtype=torch.bfloat16), generator=generator())
    for row in report.layers[:4]:
        assert abs((row.std if initialize is lsuv_ else row.ratio) - 1) < 0.1


class Tied(nn.Module):
    """One layer twice, one weight in two layers, one layer that is not called, and those that are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        self.idle = nn.Linear(2, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
        self.up = nn.ConvTranspose2d(3, 3, 2, 2)
        self.last = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.normed(self.second(self.first(self.first(x))))))


@pytest.mark.parametrize("initialize", INITIALIZERS)
def test_shared_idle_and_computed_weights(initialize: Callable[..., InitReport]) -> None:
    model = Tied().double()
    before = copy.deepcopy(model)
    report = initialize(model, images(), generator=generator())
    notes = {row.name: row.note for row in report.layers}
    assert [row.name for row in report.layers][:2] == ["first", "last"]
    assert notes["first"] == notes["last"] == ""
    assert notes["second"] == "its weight is that of first"
    assert notes["idle"] == "not called by the forward pass: left alone"
    assert notes["up"] == "ConvTranspose2d: left alone" and notes["normed"] == "its weight is computed: left alone"
    for name in ("idle", "normed", "up"):
        for a, b in zip(getattr(model, name).parameters(), getattr(before, name).parameters(), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(model.first.weight, before.first.weight)
    if initialize is lsuv_:  # set at its first call
        z = model.first(images())
        assert abs(z.std().item() - 1) < 0.1
    assert "not called" in str(report)


def test_layers_without_variance() -> None:
    zero = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Threshold(1e6, 0.0), nn.Conv2d(4, 5, 3), nn.Flatten()).double()
    report = lsuv_(zero, images(), generator=generator())
    note = "its output does not vary over the batch"
    assert report.layers[1] == ("2", 0.0, 0, pytest.approx(math.nan, nan_ok=True), note)
    w = zero[2].weight.flatten(1)
    torch.testing.assert_close(w @ w.T, torch.eye(5).double())
    report = data_dependent_(zero, images(), generator=generator())
    assert report.layers[1].note == "5 of 5 channels do not vary over the batch"
    assert all(p.isfinite().all() for p in zero.parameters())
    broken = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    x = torch.full((4, 3), math.inf)
    assert lsuv_(broken, x).layers[0].note == "its output is not finite"
    assert all(p.isfinite().all() for p in broken.parameters())


class Idle(nn.Module):
    """Has a linear layer that is used without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight


@pytest.mark.parametrize("initialize", INITIALIZERS)
def test_refusals(initialize: Callable[..., InitReport]) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 2)), torch.rand(4, 3)
    before = copy.deepcopy(model.state_dict())
    model.train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        initialize(model, x)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and model.training
    assert not model[0]._forward_pre_hooks
    with pytest.raises(TypeError, match="model is list"):
        initialize([model], x)
    with pytest.raises(TypeError, match=r"batch is torch.int64; allowed: a floating-point tensor"):
        initialize(model, torch.ones(4, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="batch is tuple"):
        initialize(model, (x, x))
    with pytest.raises(ValueError, match=r"batch has shape \[0, 3\]"):
        initialize(model, x[:0])
    with pytest.raises(ValueError, match="ReLU has no convolution or linear layer"):
        initialize(nn.ReLU(), x)
    with pytest.raises(ValueError, match="Idle calls none of its convolutions and linear layers as modules"):
        initialize(Idle(), x)
    with pytest.raises(ValueError, match="lazy module, '0'"):
        initialize(nn.Sequential(nn.LazyLinear(2)), x)
    with pytest.raises(ValueError, match="tolerance is 0; it must be positive"):
        initialize(model, x, tolerance=0)


def test_refusals_of_one() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.rand(4, 3)
    with pytest.raises(ValueError, match="max_tries is 0; allowed: 1 or more"):
        lsuv_(model, x, max_tries=0)
    with pytest.raises(ValueError, match="max_rounds is -1; allowed: 0 or more"):
        data_dependent_(model, x, max_rounds=-1)
    with pytest.raises(ValueError, match="beta is nan; it must be finite"):
        data_dependent_(model, x, beta=math.nan)

    wrapped = nn.Sequential(nn.Linear(3, 3), nn.Identity())
    wrapped.append(nn.Module())
    wrapped[2].forward = lambda x: (x, x)  # type: ignore[method-assign]
    before = wrapped[0].weight.clone()
    with pytest.raises(TypeError, match="model gives tuple; a floating-point tensor is needed"):
        data_dependent_(wrapped, x)
    wrapped[2].forward = lambda x: x.detach()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the model's output has no graph"):
        data_dependent_(wrapped, x)
    with torch.inference_mode(), pytest.raises(ValueError, match="the model's output has no graph"):
        data_dependent_(model, x)
    assert torch.equal(wrapped[0].weight, before)
    lsuv_(wrapped, x)
