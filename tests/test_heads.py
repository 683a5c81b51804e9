"""Local heads, each against a few lines of plain PyTorch on the map itself, in float64."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_recorder import Recorder, recorded_graphs  # noqa: F401  # a fixture
from head_cases import (
    CLASSES,
    DOUBLE,
    HEADS,
    TOLERANCE,
    C,
    N,
    gradients,
    images,
    make_body,
    make_stage,
    match,
    norm_ratio,
    reconstruction,
    std,
    targets,
)
from layerwise_ext import functional, reference
from layerwise_ext.nn import (
    ContrastiveHead,
    ConvBNReLU2d,
    ConvHead,
    FunctionHead,
    GoodnessHead,
    HeadOutput,
    InfoProHead,
    LocalHead,
    LocalStage,
    MLPSRHead,
    PooledLinearHead,
    PooledMoments,
    PredSimHead,
    ReconstructionHead,
    SimilarityHead,
    infopro_weights,
)
from layerwise_ext.train import GreedyTrainer, LocalTrainer
from torch import Tensor, nn


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("name", HEADS)
def test_stage_with_head_equals_plain_autograd(name: str, activation: str, fused: bool, left_out: bool) -> None:
    make, peer = HEADS[name]
    torch.manual_seed(1)
    stage = LocalStage(make_body(fused, activation), make())
    target = targets(name)
    if left_out and name != "function":
        target[::4] = -100
    plain = copy.deepcopy(stage)
    x = images().contiguous(memory_format=torch.channels_last)
    features, loss, _ = stage(x, target)
    y = plain.features(x)
    expected = peer(plain.head, y, target)
    torch.testing.assert_close(features, y.detach(), **TOLERANCE)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(gradients(loss, stage), gradients(expected, plain), **TOLERANCE)


@pytest.mark.parametrize("name", HEADS)
def test_gradcheck(name: str) -> None:
    """Through the moments of the operator, or of the map, to an arbitrary map."""
    torch.manual_seed(1)
    head = HEADS[name][0]()
    target = targets(name)[:4]
    y = torch.randn(4, C, 4, 4, dtype=torch.float64, requires_grad=True)
    image = torch.rand(4, 3, 6, 6, dtype=torch.float64)

    def loss(y: Tensor, *parameters: Tensor) -> Tensor:
        zero, one = torch.zeros(C), torch.ones(C)
        y, m1, m2 = functional.bn_act_moments(y, zero, one, eps=0.0, activation="identity", bins=head.bins)
        moments = PooledMoments(m1, m2, (4, 4), y)
        moments.image = image
        names = (key for key, _ in head.named_parameters())
        return torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (moments, target)).loss

    assert torch.autograd.gradcheck(loss, (y, *head.parameters()), check_undefined_grad=False)


# -- Moments of the whole map ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "bins"), [((6, 8), (3, 2)), ((7, 5), (3, 2)), ((4, 4), (3, 3)), ((5, 1), (5, 1))])
def test_moments_over_the_map(size: tuple[int, int], bins: tuple[int, int]) -> None:
    """Each cell counts alike, so each element by the sum, over its cells, of one over their areas."""
    y = torch.randn(2, 3, *size, dtype=torch.float64)
    areas = functional.cell_area(size, bins).double()
    weights = reference.expand_cells(1 / areas[None, None], size) / (bins[0] * bins[1])
    torch.testing.assert_close(weights.sum().item(), 1.0)
    mean, second = ((weights * t).sum((2, 3)) for t in (y, y * y))
    count = size[0] * size[1]
    expected = ((second - mean * mean) * count / (count - 1)).sqrt()
    m1, m2 = (reference.cell_sums(t, bins) for t in (y, y * y))
    for moments in (PooledMoments(m1, m2, size), PooledMoments.of(y, bins)):
        whole = moments.over_map()
        assert whole.bins == (1, 1) and whole.size == size
        torch.testing.assert_close(whole.mean[..., 0, 0], mean)
        torch.testing.assert_close(whole.std[..., 0, 0], expected)
        assert whole.over_map() is whole
    if size[0] % bins[0] == 0 and size[1] % bins[1] == 0:
        torch.testing.assert_close(expected, std(y))


@pytest.mark.parametrize("project", [False, True])
def test_maps_of_one_element_are_matched_themselves(project: bool) -> None:
    torch.manual_seed(0)
    head = SimilarityHead(C, CLASSES, project=project, kernel_size=1, **DOUBLE)
    stage = LocalStage(ConvBNReLU2d(3, C, 8, activation="identity", **DOUBLE), head)
    plain = copy.deepcopy(stage)
    loss = stage(images(), targets("")).loss
    y = plain.features(images())
    features = y if plain.head.projection is None else plain.head.projection(y)
    expected = match(features.flatten(1), targets(""))
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(gradients(loss, stage), gradients(expected, plain), **TOLERANCE)


@pytest.mark.parametrize("name", HEADS)
def test_constant_channels_and_samples_without_any_have_finite_gradients(name: str) -> None:
    torch.manual_seed(1)
    head, target = HEADS[name][0](), targets(name)
    y = torch.randn(N, C, 4, 4, dtype=torch.float64)
    y[:, 2] = 0.5  # a channel
    y[3] = 0  # a sample
    y.requires_grad_()
    moments = PooledMoments.of(y, head.bins)
    moments.image = images((4, 4))
    head(moments, target).loss.backward()
    assert y.grad is not None and y.grad.isfinite().all() and y.grad.abs().max() < 1e3
    assert y.grad[0].any()


def test_gradient_of_a_constant_channel_is_zero() -> None:
    y = torch.randn(N, C, 4, 4, dtype=torch.float64)
    y[:, 2] = 0.5
    y.requires_grad_()
    SimilarityHead(C, CLASSES)(PooledMoments.of(y, (1, 1)), targets("")).loss.backward()
    assert y.grad is not None and not y.grad[:, 2].any() and y.grad[:, 1].any()


# -- Where stages are used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_autocast_is_near_float32(name: str) -> None:
    exact = make_stage(name).float()
    low = copy.deepcopy(exact)
    x, target = images().float(), targets(name)
    expected = exact(x, target)
    with torch.autocast("cpu", torch.bfloat16):
        actual = low(x, target)
    assert actual.features.dtype == torch.bfloat16 and actual.loss.dtype == torch.float32
    assert actual.logits is None or actual.logits.dtype == torch.float32
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0.03, atol=0.03)
    for mine, theirs in zip(gradients(actual.loss, low), gradients(expected.loss, exact), strict=True):
        if theirs is not None and theirs.norm() > 1e-6:  # a bias before batch norm has none
            assert mine.dtype == torch.float32
            assert (mine - theirs).norm() < 0.15 * theirs.norm()


def test_the_moment_heads_themselves_are_not_rounded_under_autocast() -> None:
    y = torch.randn(N, C, 8, 8)
    for name in ("similarity", "predsim", "goodness", "contrastive", "function"):
        torch.manual_seed(1)
        head = HEADS[name][0]().float()
        moments = PooledMoments.of(y, head.bins)
        expected = head(moments, targets(name)).loss
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(head(moments, targets(name)).loss, expected)


def test_a_mean_in_bfloat16_does_not_spoil_the_variance() -> None:
    y = (5 + 0.1 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    torch.testing.assert_close(PooledMoments.of(y, (1, 1)).std.flatten(1), std(y.double()).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", HEADS)
def test_compiles_to_a_single_graph(name: str) -> None:
    torch.compiler.reset()
    stage, target = make_stage(name), targets(name)
    peer = copy.deepcopy(stage)
    expected = peer(images(), target)
    actual = torch.compile(stage, fullgraph=True, backend="aot_eager")(images(), target)
    torch.testing.assert_close(actual.loss, expected.loss, **TOLERANCE)
    torch.testing.assert_close(gradients(actual.loss, stage), gradients(expected.loss, peer), **TOLERANCE)


@pytest.mark.parametrize("name", HEADS)
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    stage, target, x = make_stage(name), targets(name), images()
    with Recorder():  # it fails at what a CUDA graph cannot hold
        stage(x, target).loss.backward()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.usefixtures("recorded_graphs")
def test_a_captured_stage_is_the_stage(name: str) -> None:
    results = []
    for cuda_graph in (False, True):
        stage = make_stage(name, cuda_graph=cuda_graph)
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        for step in range(6):
            features, loss, logits = stage(images() + step, targets(name))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert (stage._captured is not None and stage._captured.replays == 3) == cuda_graph
        state = {key: value.clone() for key, value in stage.state_dict().items()}
        results.append((features.clone(), loss.detach(), None if logits is None else logits.detach(), state))
    torch.testing.assert_close(*results, **TOLERANCE)


@pytest.mark.parametrize("name", HEADS)
def test_copies(name: str) -> None:
    stage, target = make_stage(name), targets(name)
    loaded = make_stage(name)
    for parameter in loaded.parameters():
        nn.init.normal_(parameter)
    loaded.load_state_dict(stage.state_dict(), strict=True)
    assert not any("_zero" in key or "_one" in key for key in stage.state_dict())
    expected = copy.deepcopy(stage)(images(), target).loss
    for other in (loaded, pickle.loads(pickle.dumps(stage)), stage):
        assert torch.equal(other(images(), target).loss, expected)


@pytest.mark.parametrize("name", HEADS)
def test_without_a_target_there_is_no_loss(name: str) -> None:
    stage = make_stage(name).eval()
    with torch.inference_mode():
        _, loss, logits = stage(images())
    assert loss is None
    classes = dict.fromkeys(
        ["predsim", "predsim, projected", "conv, depth 1", "conv, depth 3", "mlp_sr", "module", "infopro"], CLASSES
    )
    classes["goodness"] = 2
    assert (None if logits is None else logits.shape) == ((N, classes[name]) if name in classes else None)


# -- Single heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["predsim, projected", "conv, depth 1", "conv, depth 3", "mlp_sr", "module"])
def test_classifiers_serve_a_plain_network(name: str) -> None:
    stage = make_stage(name)
    _, _, logits = stage(images(), targets(""))
    torch.testing.assert_close(stage.head.to_modules()(stage.features(images())), logits, **TOLERANCE)


def test_the_image_is_another_size_than_the_map() -> None:
    stage = LocalStage(ConvBNReLU2d(3, C, 3, 2, 1, **DOUBLE), ReconstructionHead(C, **DOUBLE))
    image, x = torch.rand(N, 3, 16, 16, dtype=torch.float64), images((8, 8))
    y = stage.features(x)
    decoded = stage.head.decoder(F.interpolate(y, (16, 16), mode="bilinear", align_corners=True))
    expected = F.binary_cross_entropy(decoded.sigmoid(), image)
    torch.testing.assert_close(stage(x, targets(""), image).loss, expected, **TOLERANCE)
    assert not torch.equal(stage(x, targets("")).loss, expected)  # of its input
    with pytest.raises(ValueError, match=r"images of 3 channels, got shape \[9, 1, 8, 8\]"):
        stage(x, targets(""), x[:, :1])
    pred = LocalStage(ConvBNReLU2d(3, C, 3, **DOUBLE), PooledLinearHead(C, CLASSES, 1, **DOUBLE))
    assert torch.equal(pred(x, targets(""), image).loss, pred(x, targets("")).loss)
    _, moments = pred.moments(x)
    with pytest.raises(RuntimeError, match="needs_image is False"):
        _ = moments.image


@pytest.mark.parametrize("name", ["infopro", "infopro, contrastive"])
def test_images_without_labels_are_reconstructed(name: str) -> None:
    stage, nothing = make_stage(name), torch.full((N,), -100)
    loss = stage(images(), nothing).loss
    expected = 0.3 * reconstruction(stage.head.reconstruction, stage.features(images()), nothing)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    mine, theirs = (torch.autograd.grad(each, list(stage.body.parameters())) for each in (loss, expected))
    torch.testing.assert_close(mine, theirs, **TOLERANCE)
    assert not any(g is not None and g.any() for g in gradients(stage(images(), nothing).loss, stage.head.projection))


def test_infopro_weights() -> None:
    assert infopro_weights(3, (4, 0), (0, 1)) == [(4, 0), (2, 0.5), (0, 1)]
    assert infopro_weights(1, (4, 0), (0, 1)) == [(4, 0)]
    assert infopro_weights(0) == []
    with pytest.raises(ValueError, match="stages is -1"):
        infopro_weights(-1)


@pytest.mark.parametrize(("size", "bins"), [((8, 8), (2, 2)), ((7, 33), (2, 9)), ((1, 3), (1, 1))])
def test_mlp_sr_sees_a_quarter_of_the_resolution(size: tuple[int, int], bins: tuple[int, int]) -> None:
    head = MLPSRHead(C, CLASSES, size)
    assert head.bins == bins
    linear = next(layer for layer in head.layers if isinstance(layer, nn.Linear))
    assert linear.in_features == C * min(2, bins[0]) * min(2, bins[1])


def test_images_without_a_label_have_no_part_in_the_loss_of_labels() -> None:
    goodness, head = torch.rand(5, 3), GoodnessHead(num_classes=3)
    labels = torch.tensor([0, -100, 2, -100, 1])
    expected = head.label_loss(goodness[[0, 2, 4]], labels[[0, 2, 4]])
    assert torch.equal(head.label_loss(goodness, labels), expected)


def test_a_projected_head_made_without_memory() -> None:
    saved = SimilarityHead(4, 3, project=True)
    with torch.device("meta"):
        head = SimilarityHead(4, 3, project=True)
    head.to_empty(device="cpu")
    head.load_state_dict(saved.state_dict())
    moments = PooledMoments.of(torch.rand(6, 4, 5, 5), (1, 1))
    moments = PooledMoments(moments.m1, moments.m2, moments.size, torch.rand(6, 4, 5, 5))
    assert torch.equal(head.features(moments), saved.features(moments))


def test_the_goodness_classifies() -> None:
    stage = make_stage("goodness")
    _, moments = stage.moments(images())
    values = stage.head.goodness(moments)
    logits = stage.head(moments).logits
    torch.testing.assert_close(values, stage.features(images()).square().mean((1, 2, 3)), **TOLERANCE)
    assert torch.equal(logits.argmax(1) == 1, values > 0.4)
    torch.testing.assert_close(logits.softmax(1)[:, 1], torch.sigmoid(values - 0.4))


def test_contrastive_without_partners_is_zero() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    for target in ([0, 1, 2], [-100] * 3, [0, -100, 1]):
        loss = functional.supervised_contrastive_loss(x, torch.tensor(target))
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss == 0 and not gradient.any()


def test_contrastive_against_the_reference() -> None:
    target = torch.tensor([0, 1, 0, 2, -100, 1, 0])
    x = torch.randn(7, 5, dtype=torch.float64)
    x[2] = 0
    results = []
    for function in (functional.supervised_contrastive_loss, reference.supervised_contrastive_loss):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, target, temperature=0.2)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    actual, expected = results
    torch.testing.assert_close(actual[0], expected[0])
    others = [0, 1, 3, 4, 5, 6]  # without direction, the third has no gradient here
    torch.testing.assert_close(actual[1][others], expected[1][others])
    assert not actual[1][[2, 4]].any()


def test_a_function_may_be_a_module_with_parameters() -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(C, CLASSES)

        def forward(self, moments: PooledMoments, target: Tensor) -> Tensor:
            return F.cross_entropy(self.linear(moments.mean.flatten(1)), target)

    stage = LocalStage(make_body(), FunctionHead(Probe(), second_moment=False)).double()
    peer = LocalStage(make_body(), PooledLinearHead(C, CLASSES, 1, **DOUBLE))
    peer.head.load_state_dict(stage.head.function.state_dict())
    losses = [s(images(), targets("")).loss for s in (stage, peer)]
    torch.testing.assert_close(*losses, **TOLERANCE)
    torch.testing.assert_close(gradients(losses[0], stage), gradients(losses[1], peer), **TOLERANCE)
    assert len(list(stage.head.parameters())) == 2


@pytest.mark.parametrize("fused", [True, False])
def test_what_a_head_did_not_declare_is_refused(fused: bool) -> None:
    def uses_m2(moments: PooledMoments, target: Tensor) -> Tensor:
        return moments.m2.sum()

    def uses_y(moments: PooledMoments, target: Tensor) -> Tensor:
        return moments.y.sum()

    with pytest.raises(RuntimeError, match="second_moment is False"):
        LocalStage(make_body(fused), FunctionHead(uses_m2, second_moment=False))(images(), targets(""))
    if fused:  # any other body has made it anyway
        with pytest.raises(RuntimeError, match="needs_map is False"):
            LocalStage(make_body(), FunctionHead(uses_y))(images(), targets(""))


def test_a_head_of_the_map() -> None:
    class TotalVariation(LocalHead):
        bins = (1, 1)
        needs_map = True

        def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
            y = moments.y
            return HeadOutput(None, (y[:, :, 1:] - y[:, :, :-1]).abs().mean() + moments.m2.mean())

    results = []
    for fused in (True, False):
        stage = LocalStage(make_body(fused), TotalVariation())
        loss = stage(images(), targets("")).loss
        results.append((loss, gradients(loss, stage)))
    torch.testing.assert_close(*results, **TOLERANCE)


# -- In trainers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LocalTrainer, GreedyTrainer])
def test_a_stage_without_logits_has_no_accuracy(kind: Any) -> None:
    last = LocalStage(ConvBNReLU2d(C, C, 3, **DOUBLE), PooledLinearHead(C, CLASSES, 2, **DOUBLE))
    trainer = kind([make_stage("similarity"), last], progress=False, seed=0)
    trainer.fit([(images(), targets(""))], epochs=2, val_loader=[(images(), targets(""))])
    scores = trainer.evaluate([(images(), targets(""))])
    assert math.isnan(scores["accuracy"][0]) and 0 <= scores["final"] <= 1
    assert all(math.isfinite(loss) for loss in scores["loss"])
    assert math.isnan(trainer.history[0]["train_accuracy"][0])
    assert 0 <= trainer.history[-1]["train_accuracy"][-1] <= 1


def test_forward_forward_tells_kinds_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(64) % 2
    x = torch.randn(64, 3, 8, 8, generator=generator, dtype=torch.float64)
    x[target == 1, 0] += 1.5  # what is real is bright
    body = nn.Sequential(nn.RMSNorm((3, 8, 8), elementwise_affine=False), make_body())
    trainer = LocalTrainer([LocalStage(body, GoodnessHead())], _adam, progress=False)
    trainer.fit([(x, target)], epochs=40)
    assert trainer.evaluate([(x, target)])["final"] > 0.9


def _adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-2)


# -- Bad input ---------------------------------------------------------------------------------------------------------

LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SimilarityHead(1, 10), "in_channels, num_classes are 1, 10; allowed: at least 2 and 2"),
    (lambda: SimilarityHead(4, 1), "in_channels, num_classes are 4, 1; allowed: at least 2 and 2"),
    (lambda: SimilarityHead(4, 2, project=True, kernel_size=2), "kernel_size is 2; allowed: odd"),
    (lambda: PredSimHead(4, 2, beta=1.5), "beta is 1.5; allowed: 0 to 1"),
    (lambda: PredSimHead(4, 2, bins=0), r"bins is \(0, 0\); both must be at least 1"),
    (lambda: FunctionHead(norm_ratio, (2, 0)), r"bins is \(2, 0\); both must be at least 1"),
    (lambda: ReconstructionHead(4, loss="l1"), "loss is 'l1'; allowed: 'bce', 'mse'"),
    (lambda: ReconstructionHead(4, mean=[0.1, 0.2]), "mean has 2 values; allowed: 1 or 3"),
    (lambda: InfoProHead(4, 3, "both"), "task is 'both'; allowed: 'softmax', 'contrastive'"),
    (lambda: InfoProHead(4, 3, weights=(-1, 1)), r"weights are \(-1, 1\)"),
    (lambda: InfoProHead(4, 3, temperature=0), "temperature is 0"),
    (lambda: InfoProHead(4, 3, label_smoothing=2), "label_smoothing is 2; allowed: 0 to 1"),
    (lambda: InfoProHead(4, 3, "contrastive", label_smoothing=0.1), "label_smoothing is 0.1; allowed with task"),
    (lambda: GoodnessHead(num_classes=1), "num_classes is 1; allowed: 2 or more, None"),
    (lambda: ConvHead(4, 3, 0), "depth is 0; it must be at least 1"),
    (lambda: ConvHead(4, 3, bins=0), r"bins is \(0, 0\)"),
    (lambda: MLPSRHead(4, 3, (0, 4)), r"map_size is \(0, 4\)"),
    (lambda: ConvHead(4, 3, label_smoothing=-1), "label_smoothing is -1; allowed: 0 to 1"),
    (lambda: ContrastiveHead(4, features=0), "features is 0; it must be at least 1"),
    (lambda: ContrastiveHead(4, temperature=0), "temperature is 0; it must be positive"),
    (lambda: functional.supervised_contrastive_loss(torch.ones(2, 2), LABELS, temperature=-1),
     "temperature must be positive, got -1"),
    (lambda: functional.supervised_contrastive_loss(torch.ones(2, 2, 2), LABELS),
     r"features must have 2 dimensions \[N, D\], got shape \[2, 2, 2\]"),
])  # fmt: skip
def test_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_function() -> None:
    with pytest.raises(TypeError, match="function is str; a function of"):
        FunctionHead("loss")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [n for n in HEADS if n != "function" and not n.startswith("reconstruction")])
def test_bad_targets_and_shapes(name: str) -> None:
    stage, target = make_stage(name), targets(name)
    with pytest.raises(TypeError, match=r"target .*int32"):
        stage(images(), target.int())
    with pytest.raises(ValueError, match=r"target .*8"):
        stage(images(), target[:8])
    if "contrastive" not in name:  # there any number may be a class
        for wrong in (-1, 3):
            with pytest.raises(ValueError, match="target is out of range"):
                stage(images(), target + wrong)
    if name not in ("goodness", "module"):
        other = LocalStage(ConvBNReLU2d(3, C + 1, 3, **DOUBLE), stage.head)
        with pytest.raises(ValueError, match=r"built for pooled features \[6, .*stage gives \[7"):
            other(images(), target)


# -- The documentation -------------------------------------------------------------------------------------------------


def test_the_examples_run() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "local_losses.md"
    if not page.is_file():
        pytest.skip("docs/ is not beside tests/")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    assert names["scores"].shape == (96, 10)
    assert names["forward_forward_stage"](3, 4, 8)(torch.randn(2, 3, 8, 8), torch.arange(2)).features.shape[1] == 4
