"""Probes: against brute force on all features at once, and against backward passes by hand."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import fuse_models
import layerwise_ext as lw
import pytest
import torch
import torch.nn.functional as F
from layerwise_ext.nn import ConvBNReLU2d, FusedChain, GoodnessHead, LocalStage, PooledLinearHead
from layerwise_ext.probe import LayerSeparability, gradient_norms, separability
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

RIDGE = 1e-2
CLASSES = 4


def samples(n: int, seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Images that a little of their class is in; the last batch has a class that the others have not."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES - 1, (n,), generator=generator)
    target[-2:] = CLASSES - 1
    images = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    images[:, 0] += target[:, None, None] * 0.5
    return images, target


def batches(data: tuple[Tensor, Tensor], size: int = 16) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(size) for part in data), strict=True))


def brute_force(train: Tensor, target: Tensor, test: Tensor, test_target: Tensor) -> tuple[float, float, float]:
    """Accuracy, Fisher ratio and cosine gap of features ``[N, D]``."""
    scaler = StandardScaler().fit(train.numpy())
    probe = Ridge(alpha=RIDGE * len(train)).fit(scaler.transform(train.numpy()), F.one_hot(target).numpy())
    predicted = probe.predict(scaler.transform(test.numpy())).argmax(1)
    accuracy = float((predicted == test_target.numpy()).mean())
    within = between = 0.0
    for c in range(CLASSES):
        members = train[target == c]
        within += (members - members.mean(0)).square().sum().item()
        between += len(members) * (members.mean(0) - train.mean(0)).square().sum().item()
    cosine = F.cosine_similarity(train[:, None], train[None], dim=2)
    same = target[:, None] == target[None]
    other = ~torch.eye(len(train), dtype=torch.bool)
    return accuracy, between / within, (cosine[same & other].mean() - cosine[~same].mean()).item()


def check(row: LayerSeparability, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
    accuracy, fisher, gap = brute_force(*train, *test)
    assert row.features == train[0].shape[1]
    assert row.accuracy == accuracy
    assert row.fisher_ratio == pytest.approx(fisher, rel=1e-9)
    assert row.cosine_gap == pytest.approx(gap, rel=1e-7, abs=1e-12)


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


# -- Separability ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_stages_by_brute_force(fused: bool) -> None:
    model = lw.models.vgg([6, "M", 8, 8], image_size=(8, 8), hidden=None, fused=fused, seed=0).double()
    train, test = samples(90, 0), samples(50, 1)
    model.train()
    for x, _ in batches(train):
        model(x)  # running statistics that are not those of a batch
    for given in (model, list(model)):
        found = separability(given, batches(train), batches(test), dim=40, ridge=RIDGE)
        assert (found.samples, found.test_samples) == (90, 50)
        assert [row.layer for row in found.layers] == ["stages.0", "stages.1", "stages.2"]
    # 6 channels with 2x2 cells, 8 with 2x2, by the rule of the heads; the first stage's output is pooled to 4x4.
    features = [train[0], test[0]]
    plain = copy.deepcopy(model).eval()
    grids = [(2, 2), (2, 2), (2, 2)]
    for row, stage, grid in zip(found.layers, plain, grids, strict=True):
        with torch.no_grad():
            features = [stage.features(x) for x in features]
        pooled = [F.adaptive_avg_pool2d(x, grid).flatten(1) for x in features]
        check(row, (pooled[0], train[1]), (pooled[1], test[1]))


def test_named_modules_of_any_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(216, 20), nn.Tanh()
    ).double()  # fmt: skip
    train = samples(70, 0)
    found = separability(model, batches(train), layers=["5", "1", "4"], dim=216, ridge=RIDGE)
    assert [row.layer for row in found.layers] == ["5", "1", "4"]
    model.eval()
    with torch.no_grad():
        z = model[1](model[0](train[0]))  # before the ReLU writes over it
        y = model[4](model[3](F.relu(z)))
    for row, features in zip(found.layers, (y.tanh(), z.flatten(1), y), strict=True):
        check(row, (features, train[1]), (features, train[1]))


def test_modules_of_a_staged_and_of_a_fused_model() -> None:
    train = samples(40, 0)
    staged = lw.models.vgg([6, "M", 8], image_size=(8, 8), hidden=None, seed=0).double()
    by_stage = separability(staged, batches(train))
    by_name = separability(staged, batches(train), layers=["stages.1.body", "stages.0.body"])
    assert by_name.layers[0] == dataclasses.replace(by_stage.layers[1], layer="stages.1.body")
    model = fuse_models.build("resnet")
    names = ["conv1", "bn1", "layer1.0.bn2", "layer1.1", "fc"]
    plain = separability(model, batches(train), layers=names)
    lw.fuse_(model)
    for a, b in zip(separability(model, batches(train), layers=names).layers, plain.layers, strict=True):
        assert a.accuracy == b.accuracy and a.fisher_ratio == pytest.approx(b.fisher_ratio)


def test_features_with_a_large_mean_constants_and_zeros() -> None:
    images, target = samples(60, 0, size=2)
    features = images.flatten(1)
    model = nn.Sequential(nn.Flatten(), Identity())
    far = separability(model, batches((images + 1e6, target)), layers=["1"], ridge=RIDGE).layers[0]
    near = separability(model, batches((images, target)), layers=["1"], ridge=RIDGE).layers[0]
    check(near, (features, target), (features, target))
    assert far.accuracy == near.accuracy
    assert far.fisher_ratio == pytest.approx(near.fisher_ratio, rel=1e-7)

    # Constants that float64 cannot add up exactly: nothing can be learned from them.
    constants = torch.rand(25, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dull = torch.cat([images, constants.expand(60, 25, 2, 2)], 1)
    moved = dull.clone()
    moved[:, 3:] = 4.0
    fitted, elsewhere = batches((dull, target), 13), batches((moved, target))
    rows = [separability(model, fitted, tested, layers=["1"]).layers[0] for tested in (fitted, elsewhere)]
    assert rows[0] == rows[1]
    images[5] = 0  # a sample without a direction has the cosine 0
    check(
        separability(model, batches((images, target)), layers=["1"], ridge=RIDGE).layers[0],
        (images.flatten(1), target), (images.flatten(1), target),
    )  # fmt: skip
    blank = separability(model, [(torch.zeros(4, 3, 2, 2), torch.arange(4))], layers=["1"]).layers[0]
    assert math.isnan(blank.fisher_ratio) and math.isnan(blank.cosine_gap) and blank.accuracy == 0.25


def test_classes_that_are_apart() -> None:
    target = torch.arange(3).repeat(10)
    found = separability(nn.Sequential(Identity()), [(F.one_hot(target).float(), target)], layers=["0"]).layers[0]
    assert found.accuracy == 1 and found.fisher_ratio > 1e10 and found.cosine_gap == pytest.approx(1)


def test_a_layer_that_knows_the_class_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(3, (300,), generator=generator)
    noise = torch.randn(300, 8, generator=generator)
    knows = noise + 4 * F.one_hot(target, 8)
    model = nn.Sequential(Identity())
    rows = [
        separability(model, batches((x[:200], target[:200])), batches((x[200:], target[200:])), layers=["0"]).layers[0]
        for x in (knows, noise)
    ]
    assert rows[0].accuracy > 0.95 and rows[1].accuracy < 0.5
    assert rows[0].fisher_ratio > 1 > 0.1 > rows[1].fisher_ratio
    assert rows[0].cosine_gap > 0.3 > 0.05 > abs(rows[1].cosine_gap)


def state_of(model: nn.Module) -> list[Any]:
    return [
        [p.clone() for p in model.parameters()], [b.clone() for b in model.buffers()],
        [p.grad for p in model.parameters()], [m.training for m in model.modules()],
        [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
    ]  # fmt: skip


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.RReLU(), nn.Dropout(), nn.Flatten(),
                          nn.Linear(216, CLASSES)).double().train()  # fmt: skip
    model[3].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    images, target = samples(40, 0)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, target), 16, shuffle=True, generator=torch.Generator().manual_seed(0)
    )

    def refused() -> None:
        with pytest.raises(ValueError, match="target holds"):
            separability(model, [(images, target), (images, target - 1)], layers=["2"])
        with pytest.raises(RuntimeError):
            gradient_norms(model, images[..., :4], target)

    probes: list[Callable[[], Any]] = [
        lambda: separability(model, loader, loader, layers=["2"]),
        lambda: gradient_norms(model, images, target),
        refused,
    ]
    for run in probes:
        before, states = state_of(model), (torch.get_rng_state(), loader.generator.get_state())
        run()
        for a, b in zip(before, state_of(model), strict=True):
            assert all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))
        assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(loader.generator.get_state(), states[1])
    assert probes[0]() == probes[0]()  # the order of the samples does not matter either
    assert probes[1]() == probes[1]()


def test_results_as_dictionaries_and_tables() -> None:
    model = lw.models.vgg([4, "M", 4], image_size=(8, 8), hidden=None, seed=0).double()
    data = samples(30, 0)
    found, norms = separability(model, batches(data)), gradient_norms(model, *data)
    assert json.loads(json.dumps(found.to_dict()))["layers"][1]["layer"] == "stages.1"
    assert str(found).splitlines()[0].split()[:2] == ["layer", "features"] and len(str(found).splitlines()) == 3
    assert norms.to_dict()["losses"] == norms.losses
    assert str(norms).splitlines()[1].startswith("stages.0.body.conv")


def test_refusals_of_separability() -> None:
    model, data = nn.Sequential(nn.ReLU(), nn.ReLU()), batches(samples(20, 0))
    shared = nn.Sequential(model[0], model[0])
    staged = lw.models.vgg([4], image_size=(8, 8), hidden=None, seed=0).double()
    for error, match, arguments, options in [
        (ValueError, "layers is None, but Sequential has no stages", (model, data), {}),
        (ValueError, r"layers\[1\] is '7', which Sequential has no module of", (model, data), {"layers": ["0", "7"]}),
        (ValueError, "layers is '0'; allowed: a list", (model, data), {"layers": "0"}),
        (ValueError, "'0', is called 2 times per batch", (shared, data), {"layers": ["0"]}),
        (ValueError, r"'stages.0.body.conv', is called 0 times", (staged, data), {"layers": ["stages.0.body.conv"]}),
        (ValueError, "model is a list of stages", (list(staged), data), {"layers": ["0"]}),
        (ValueError, r"gives shape \[16, 3, 64\]",
         (nn.Sequential(nn.Flatten(2)), data), {"layers": ["0"]}),
        (ValueError, "dim is 0; it must be at least 1", (staged, data), {"dim": 0}),
        (ValueError, "ridge is 0.0; it must be positive", (staged, data), {"ridge": 0.0}),
        (ValueError, "model is empty", ([], data), {}),
        (TypeError, "model is list; allowed: an nn.Module, or a list of LocalStage", ([model], data), {}),
        (TypeError, "the loader gave a Tensor", (staged, data[0][0]), {}),
        (TypeError, "target has dtype torch.float32", (staged, [(data[0][0], torch.ones(16))]), {}),
        (ValueError, r"target has shape \(3,\); allowed: \(16,\)", (staged, [(data[0][0], torch.arange(3))]), {}),
        (ValueError, "target holds -9; allowed: class indices from 0", (staged, [(data[0][0], data[0][1] - 9)]), {}),
        (ValueError, "the output of 'stages.0' is not finite", (staged, [(data[0][0] * math.inf, data[0][1])]), {}),
        (RuntimeError, "loader gave no batches", (staged, []), {}),
        (RuntimeError, "an iterator is used up after one pass", (staged, data, iter([])), {}),
        (ValueError, "loader is a list_iterator, used up after one pass", (staged, iter(data)), {}),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            separability(*arguments, **options)


# -- Gradient norms ----------------------------------------------------------------------------------------------------


def norm(t: Tensor) -> float:
    return t.square().sum().sqrt().item()


def test_a_plain_network_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(64, CLASSES),
    ).double()  # fmt: skip
    images, target = samples(20, 0)
    found = gradient_norms(model, images, target)
    peer = copy.deepcopy(model)
    peer[2], peer[4] = nn.ReLU(), nn.ReLU()
    values, x = [], images
    for module in peer:
        x = module(x)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            x.retain_grad()
            values.append((module.weight, x))
    loss = F.cross_entropy(x, target)
    loss.backward()
    assert found.losses == [pytest.approx(loss.item())]
    assert [row.layer for row in found.layers] == ["0", "3", "6"]
    for row, (weight, y) in zip(found.layers, values, strict=True):
        assert row.gradient == pytest.approx(norm(weight.grad)) and row.weight == pytest.approx(norm(weight))
        assert row.ratio == pytest.approx(norm(weight.grad) / norm(weight))
        assert row.activation_gradient == pytest.approx(norm(y.grad))
    squared = gradient_norms(model, images, target, loss=lambda y, t: y.square().mean() * 3)
    assert squared.layers[2].gradient != found.layers[2].gradient
    model.eval()  # with the statistics that are there
    assert gradient_norms(model, images, target).layers[0].gradient != pytest.approx(found.layers[0].gradient)


def test_joint_networks_fused_and_plain() -> None:
    images, target = samples(12, 0)
    results = []
    for fused in (True, False):
        model = lw.models.resnet((1, 1), width=4, image_size=(8, 8), num_classes=CLASSES, fused=fused, seed=0).double()
        lw.init.lsuv_(model, images, generator=torch.Generator().manual_seed(0))
        results.append(gradient_norms(model, images, target))
        assert gradient_norms(list(model), images, target) == results[-1]
        F.cross_entropy(model(images), target).backward()
        trained = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
                   and m.weight.grad is not None]  # fmt: skip
        assert [row.layer for row in results[-1].layers] == [name for name, _ in trained]
        for row, (_, m) in zip(results[-1].layers, trained, strict=True):
            assert row.gradient == pytest.approx(norm(m.weight.grad), rel=1e-9)
    assert [row.gradient for row in results[0].layers] == pytest.approx([row.gradient for row in results[1].layers])
    assert all(row.activation_gradient > 0 for row in results[0].layers[:-1])
    own = gradient_norms(model, images, target, loss=lambda logits, t: F.cross_entropy(logits, t) * 2)
    assert own.layers[0].gradient == pytest.approx(2 * results[1].layers[0].gradient)


def test_local_losses() -> None:
    torch.manual_seed(0)
    chain = FusedChain(ConvBNReLU2d(4, 6, 3), ConvBNReLU2d(6, 5, 3))
    stages = [
        LocalStage(ConvBNReLU2d(3, 4, 3, padding=1), GoodnessHead(4), downsample=("max", 2), dropout=0.4),
        LocalStage(chain, PooledLinearHead(5, CLASSES, 1), detach=False),
    ]
    model = nn.ModuleList(stages).double()
    images, target = samples(12, 0, size=12)
    target = target.gt(0).long()  # goodness tells positive samples from negative ones
    torch.manual_seed(1)
    found = gradient_norms(stages, images, target, local=True)
    torch.manual_seed(1)
    features, losses = images, []
    for stage in stages:
        features, loss, _ = stage(features.detach(), target)
        loss.backward()
        losses.append(loss.item())
    assert found.losses == pytest.approx(losses)
    weights = {f"stages.{n}": p for n, p in model.named_parameters() if n.endswith("weight") and ".bn." not in n}
    assert [f"{row.layer}.weight" for row in found.layers] == list(weights)
    for row, weight in zip(found.layers, weights.values(), strict=True):
        assert row.gradient == pytest.approx(norm(weight.grad))
        assert math.isnan(row.activation_gradient) == row.layer.endswith("head.linear")


def test_fused_models_and_frozen_layers() -> None:
    model = fuse_models.build("resnet")
    data = samples(6, 0)
    plain = gradient_norms(model, *data)
    lw.fuse_(model)
    for a, b in zip(gradient_norms(model, *data).layers, plain.layers, strict=True):
        assert a.layer == b.layer and a.gradient == pytest.approx(b.gradient)
        assert a.activation_gradient == pytest.approx(b.activation_gradient)
    model.conv1.weight.requires_grad_(False)
    assert [row.layer for row in gradient_norms(model, *data).layers] == [row.layer for row in plain.layers[1:]]


def test_refusals_of_gradient_norms() -> None:
    images, target = samples(8, 0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)).double()
    staged = lw.models.vgg([4], image_size=(8, 8), hidden=None, seed=0).double()
    with pytest.raises(ValueError, match="local is True, but Sequential has no stages"):
        gradient_norms(model, images, target, local=True)
    with pytest.raises(ValueError, match="leave loss out"):
        gradient_norms(staged, images, target, local=True, loss=F.cross_entropy)
    with pytest.raises(ValueError, match=r"the loss has shape \[\[8\]\]; a scalar is needed"):
        gradient_norms(model, images, target, loss=lambda y, t: F.cross_entropy(y, t, reduction="none"))
    with pytest.raises(ValueError, match="depends on no trainable weight"):
        gradient_norms(model.requires_grad_(False), images, target)
    with pytest.raises(TypeError, match="model is int"):
        gradient_norms(3, images, target)
