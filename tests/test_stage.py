"""LocalStage: what crosses its borders and what does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layerwise_ext import _graphs, functional
from layerwise_ext.nn import (
    ConvBNReLU2d,
    HeadOutput,
    LocalHead,
    LocalStage,
    PooledLinearHead,
    PooledMoments,
    PredSimHead,
    SimilarityHead,
)
from torch import nn

TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


def block(in_channels: int = 3, channels: int = 8) -> ConvBNReLU2d:
    return ConvBNReLU2d(in_channels, channels, 3, padding=1, dtype=torch.float64)


def make_stage(body: nn.Module, channels: int = 8, **options: Any) -> LocalStage:
    return LocalStage(body, PooledLinearHead(channels, 5, bins=(2, 2), dtype=torch.float64), **options)


def data(channels: int = 3, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, channels, size, size, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (6,), generator=generator)


BODIES = {
    "layer": block,
    "pool, layer": lambda: nn.Sequential(nn.MaxPool2d(2), block()),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Identity()), nn.Sequential(block(3, 4), block(4, 8))),
    "plain": lambda: nn.Sequential(*block().to_modules()),
    "other module": lambda: nn.Conv2d(3, 8, 3, dtype=torch.float64),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_stage_equals_plain_autograd(name: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    stage = make_stage(BODIES[name]())
    peer = copy.deepcopy(stage)
    x, target = data()
    x = x.to(memory_format=layout)

    features, loss, logits = stage(x, target)
    loss.backward()

    expected_features = peer.features(x)
    expected_logits = peer.head.linear(F.adaptive_avg_pool2d(expected_features, (2, 2)).flatten(1))
    expected_loss = F.cross_entropy(expected_logits, target)
    expected_loss.backward()

    torch.testing.assert_close(features, expected_features.detach(), **TOLERANCE)
    torch.testing.assert_close(logits, expected_logits, **TOLERANCE)
    torch.testing.assert_close(loss, expected_loss, **TOLERANCE)
    for (key, mine), theirs in zip(stage.named_parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **TOLERANCE, msg=key)
    torch.testing.assert_close(list(stage.buffers()), list(peer.buffers()), **TOLERANCE)


@pytest.mark.parametrize("name", ["layer", "plain"])
def test_no_gradient_crosses_a_detached_stage(name: str) -> None:
    stage = make_stage(BODIES[name]())
    x, target = data()
    x.requires_grad_()
    output = stage(x, target)
    assert not output.features.requires_grad
    output.loss.backward()
    assert x.grad is None


@pytest.mark.parametrize("name", ["layer", "plain"])
def test_gradients_of_two_stages_without_detach(name: str) -> None:
    """Deep supervision: the first stage receives its own loss's gradient and the second one's."""
    torch.manual_seed(0)
    first = make_stage(BODIES[name](), detach=False)
    second = make_stage(block(8, 8), detach=False)
    peers = copy.deepcopy(nn.ModuleList([first, second]))
    x, target = data()
    x.requires_grad_()

    a = first(x, target)
    b = second(a.features, target)
    (a.loss + b.loss).backward()
    grad, x.grad = x.grad, None

    features, loss = x, torch.zeros((), dtype=torch.float64)
    for peer in peers:
        features = peer.features(features)
        loss = loss + F.cross_entropy(peer.head.to_modules()(features), target)
    loss.backward()
    torch.testing.assert_close(grad, x.grad, **TOLERANCE)
    for mine, theirs in zip([*first.parameters(), *second.parameters()], peers.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **TOLERANCE)


def test_a_head_of_both_moments() -> None:
    class Spread(LocalHead):
        bins = (1, 1)

        def forward(self, moments: PooledMoments, target: torch.Tensor | None = None) -> HeadOutput:
            logits = moments.std.flatten(1)
            return HeadOutput(logits, None if target is None else F.cross_entropy(logits, target))

    fused = LocalStage(block(), Spread())
    dense = LocalStage(nn.Sequential(*copy.deepcopy(fused.body).to_modules()), Spread())
    x, target = data()
    for stage in (fused, dense):
        stage(x, target).loss.backward()
    for mine, theirs in zip(fused.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **TOLERANCE)


def test_the_linear_head_has_no_second_moment() -> None:
    stage = make_stage(block())
    x, target = data()
    _, moments = stage.moments(x)
    loss = stage.head(moments, target).loss
    assert torch.autograd.grad(loss, moments.m1)[0].shape == (6, 8, 2, 2)
    for name in ("m2", "second_moment", "variance", "std"):
        with pytest.raises(RuntimeError, match="second_moment is False"):
            getattr(moments, name)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("bins", [(2, 2), (3, 2)])  # cells that are alike, and cells that overlap
def test_the_linear_head_is_pool_flatten_linear(layout: torch.memory_format, bins: tuple[int, int]) -> None:
    y = torch.randn(6, 8, 5, 6, dtype=torch.float64).contiguous(memory_format=layout)
    head = PooledLinearHead(8, 10, bins, dtype=torch.float64)
    m1 = functional.bn_act_moments(y, torch.zeros(8), torch.ones(8), eps=0.0, activation="identity", bins=bins).m1
    assert m1.is_contiguous(memory_format=layout)
    expected = head.to_modules()(y)
    for moments in (PooledMoments(m1, None, (5, 6)), PooledMoments.of(y, bins)):
        torch.testing.assert_close(head(moments).logits, expected)
        gradients = [
            torch.autograd.grad(logits.square().sum(), list(head.parameters()))
            for logits in (head(moments).logits, head.to_modules()(y))
        ]
        torch.testing.assert_close(*gradients)


def test_evaluation_without_target_and_without_graph() -> None:
    stage = make_stage(block()).eval()
    x, _ = data()
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            features, loss, logits = stage(x)
        assert loss is None
        assert not logits.requires_grad
        torch.testing.assert_close(features, stage.features(x).detach(), **TOLERANCE)
    assert all(torch.equal(before[key], value) for key, value in stage.state_dict().items())


def test_compiles_to_a_single_graph() -> None:
    for body, downsample in ((block(), None), (block(), ("max", 2)), (nn.Sequential(nn.MaxPool2d(2), block()), None)):
        stage = make_stage(body, downsample=downsample)
        peer = copy.deepcopy(stage)
        x, target = data()
        torch.compiler.reset()
        output = torch.compile(stage, fullgraph=True, backend="aot_eager")(x, target)
        output.loss.backward()
        expected = peer(x, target)
        expected.loss.backward()
        torch.testing.assert_close(output.features, expected.features, **TOLERANCE)
        for mine, theirs in zip(stage.parameters(), peer.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, **TOLERANCE)
        torch.testing.assert_close(list(stage.buffers()), list(peer.buffers()), **TOLERANCE)


class MapHead(LocalHead):
    """Looks at the map itself."""

    bins = (1, 1)
    needs_map = True

    def forward(self, moments: PooledMoments, target: torch.Tensor | None = None) -> HeadOutput:
        return HeadOutput(None, moments.y.square().mean())


DOWNSAMPLED = {
    "layer": block,
    "layer behind another": lambda: nn.Sequential(block(3, 4), block(4, 8)),
    "random slopes": lambda: ConvBNReLU2d(3, 8, 3, padding=1, activation="rrelu", dtype=torch.float64),
    "downsampling layer": lambda: ConvBNReLU2d(3, 8, 3, padding=1, downsample=("avg", 2), dtype=torch.float64),
    "padding around": lambda: ConvBNReLU2d(3, 8, (3, 2), padding="same", padding_mode="reflect", dtype=torch.float64),
    "plain": lambda: nn.Sequential(*block().to_modules()),
}


@pytest.mark.parametrize("head", ["moments", "map"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", DOWNSAMPLED)
def test_downsampling_behind_the_head(name: str, detach: bool, head: str) -> None:
    """The head sees the map before it, the next stage what is left of it."""
    torch.manual_seed(0)
    stage = make_stage(DOWNSAMPLED[name](), detach=detach, downsample=("max", 2))
    if head == "map":
        stage.head = MapHead()
    peer = copy.deepcopy(stage)
    peer.downsample = None
    x, target = data(size=12)
    outputs = []
    for module in (stage, peer):
        torch.manual_seed(1)
        features, loss, logits = module(x, target)
        loss.backward()
        outputs.append((features, loss, logits, *(p.grad for p in module.parameters()), *module.buffers()))
    (features, *rest), (whole, *expected) = outputs
    assert features.requires_grad is not detach
    torch.testing.assert_close(features, F.max_pool2d(whole, 2), rtol=0, atol=0)
    torch.testing.assert_close(rest, expected, rtol=0, atol=0)
    assert list(stage.state_dict()) == list(peer.state_dict())
    stage.eval(), peer.eval()
    with torch.no_grad():
        for way in (stage.features(x), stage(x).features):
            torch.testing.assert_close(way, F.max_pool2d(peer.features(x), 2), **TOLERANCE)


@pytest.mark.parametrize("downsample", [("sum", 2), ("max", 0), ("max", 2, True), "max"])
def test_downsampling_must_exist(downsample: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match="downsample"):
        make_stage(block(), downsample=downsample)


@pytest.mark.parametrize("downsample", [None, ("max", 2)])
@pytest.mark.parametrize("detach", [True, False])
def test_dropout_behind_the_head(detach: bool, downsample: Any) -> None:
    """Loss and gradients of the stage are those without it; the next stage gets whole channels or zeros."""
    torch.manual_seed(0)
    stage = make_stage(block(), detach=detach, downsample=downsample, dropout=0.4)
    peer = make_stage(block(), detach=detach, downsample=downsample)
    peer.load_state_dict(stage.state_dict(), strict=True)
    x, target = data()
    torch.manual_seed(1)
    features, loss, _ = stage(x, target)
    torch.manual_seed(1)
    whole, expected, _ = peer(x, target)
    torch.manual_seed(1)
    torch.testing.assert_close(features, F.dropout2d(whole, 0.4), rtol=0, atol=0)
    kept = features.abs().sum((2, 3)).gt(0)
    assert 0.3 < kept.double().mean() < 0.9 and features.requires_grad is not detach
    total, total_expected = loss, expected
    if not detach:  # a later loss reaches the body through what is kept
        total = loss + features.square().sum()
        total_expected = expected + (whole * kept[:, :, None, None] / 0.6).square().sum()
    total.backward(), total_expected.backward()
    gradients = [[p.grad for p in module.parameters()] for module in (stage, peer)]
    torch.testing.assert_close(*gradients, **TOLERANCE)
    stage.eval(), peer.eval()
    torch.testing.assert_close(stage(x).features, peer(x).features, rtol=0, atol=0)
    torch.testing.assert_close(stage.features(x), peer.features(x), rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_is_a_probability(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"dropout is .*; allowed: 0 to below 1"):
        make_stage(block(), dropout=dropout)


def test_heads_stay_outside_the_backbone() -> None:
    backbone = nn.Sequential(block(3, 8), block(8, 8))
    keys = list(backbone.state_dict())
    stages = [make_stage(body) for body in backbone]
    assert list(backbone.state_dict()) == keys
    assert [stage.body for stage in stages] == list(backbone)


def test_a_head_built_for_another_shape() -> None:
    x, target = data()
    with pytest.raises(ValueError, match=r"\[64, 2, 2\].*stage gives \[8, 2, 2\]"):
        make_stage(block(), channels=64)(x, target)
    small = data(size=3)[0]
    for name in ("pool, layer", "other module"):
        with pytest.raises((ValueError, RuntimeError), match=r"cells|bins"):
            make_stage(BODIES[name]())(small, target)
    with pytest.raises(TypeError, match="head is Linear"):
        LocalStage(block(), nn.Linear(8, 5))  # type: ignore[arg-type]


def test_nan_in_the_input_propagates() -> None:
    stage = make_stage(block())
    x, target = data()
    x[0, 0, 0, 0] = float("nan")
    output = stage(x, target)
    assert output.loss.isnan()


# -- Maps that are constant, and bodies of other classes ---------------------------------------------------------------


def plain_similarity(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """In plain PyTorch, with a standard deviation whose gradient is 0 where a map is constant."""
    variance = y.flatten(2).var(2)
    constant = variance < 1e-20
    std = torch.where(constant, 0, torch.where(constant, 1, variance).sqrt())
    return functional.similarity_matching_loss(std, target, num_classes=4)


@pytest.mark.parametrize("body", ["layer", "plain"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("size", [8, 32, 56])
@pytest.mark.parametrize("bins", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_blank_image_has_no_standard_deviation(
    dtype: torch.dtype, bins: int, size: int, bias: float, layout: torch.memory_format, body: str
) -> None:
    """Its maps are constant and not 0 behind batch norm; what rounding leaves of their sums is nothing to match."""
    torch.manual_seed(0)
    x = torch.rand(8, 3, size, size, dtype=torch.float64)
    x[0] = 0
    target = torch.arange(8) % 4
    module = BODIES[body]()
    (module.bn if body == "layer" else module[1]).bias.data.fill_(bias)
    exact = copy.deepcopy(module) if body == "plain" else nn.Sequential(*copy.deepcopy(module).to_modules())
    expected = plain_similarity(exact(x), target)
    expected.backward()
    head = SimilarityHead(8, 4) if bins == 1 else PredSimHead(8, 4, bins, beta=1.0)
    stage = LocalStage(module, head).to(dtype)
    loss = stage(x.to(dtype).contiguous(memory_format=layout), target).loss
    loss.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    gradient, exact_gradient = next(module.parameters()).grad, next(exact.parameters()).grad
    assert (gradient.double() - exact_gradient).norm() <= 10 * tolerance * exact_gradient.norm()


@pytest.mark.parametrize("body", ["layer", "plain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_on_standard_deviations_is_nan_where_the_map_is(value: float, body: str) -> None:
    x, target = data()
    x[0, 0, 0, 0] = value
    assert LocalStage(BODIES[body](), SimilarityHead(8, 5).double())(x, target).loss.isnan()


def test_a_body_that_changes_what_its_class_gives() -> None:
    class Scaled(ConvBNReLU2d):
        def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            return 2 * super().forward(x, residual)

    x, target = data()
    for downsample in (None, ("max", 2)):
        stage = make_stage(Scaled(3, 8, 3, padding=1, dtype=torch.float64), downsample=downsample)
        output = stage(x, target)
        torch.testing.assert_close(output.features, stage.features(x).detach(), **TOLERANCE)
        expected = stage.head.to_modules()(stage.body(x))
        torch.testing.assert_close(output.logits, expected, **TOLERANCE)


def test_what_a_graph_fixes() -> None:
    """Compared at each call of a captured stage."""
    stage = make_stage(nn.Sequential(block(), nn.Dropout(0.5)))
    before = _graphs.settings_of([stage])
    assert _graphs.settings_of([stage]) == before
    changes: list[tuple[Any, str, Any]] = [
        (stage.body[0].bn, "momentum", 0.5),
        (stage.body[1], "p", 0.1),
        (stage.head, "label_smoothing", 0.1),
    ]
    for module, name, value in changes:
        kept = getattr(module, name)
        setattr(module, name, value)
        assert _graphs.settings_of([stage]) != before
        setattr(module, name, kept)
    assert _graphs.settings_of([stage]) == before
