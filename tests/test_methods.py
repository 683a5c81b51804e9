"""Every method against its twin in plain PyTorch, twins.py."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import twins
from layerwise_ext import models, nn, train
from torch import Tensor

CONFIG: list[int | str] = [4, 4, "M", 6, 6, "M", 6]
HIDDEN, DIM = 8, 64
TRAINERS: dict[str, tuple[type[train.Trainer], dict[str, Any]]] = {
    "joint": (train.JointTrainer, {}),
    "deep supervision": (train.JointTrainer, {"deep_supervision": 0.3}),
    "no detach": (train.LocalTrainer, {"detach": False}),
    "blocks": (train.LocalTrainer, {"blocks": [2, 4]}),
    "greedy": (train.GreedyTrainer, {"cache": False}),
}
LOCAL = (train.LocalTrainer, {})


@functools.cache
def batches() -> list[tuple[Tensor, Tensor]]:
    """Three of digits, the last one smaller; of plain strides, so that noise is drawn in the same order everywhere."""
    training, _, _ = twins.digits(batch_size=20, seed=0)
    found = [(x.double().clone(memory_format=torch.contiguous_format), labels) for x, labels in training]
    return [*found[:2], (found[2][0][:13], found[2][1][:13])]


def adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """With an epsilon that keeps it from making steps of the rounding of gradients that are almost 0."""
    return torch.optim.Adam(parameters, lr=1e-2, eps=1e-3)


def ours_and_twin(name: str) -> tuple[list[nn.LocalStage], list[twins.Stage]]:
    """The same network twice, with the same parameters, none of which is at 0."""
    method = twins.METHODS[name]
    _, _, normalization = twins.digits(batch_size=20, seed=0)
    model = models.vgg(
        CONFIG,
        in_channels=1,
        image_size=(8, 8),
        hidden=HIDDEN,
        dim=DIM,
        head=method.head,
        label_smoothing=method.smoothing,
        image_mean=normalization.mean.tolist(),
        image_std=normalization.std.tolist(),
        activation="leaky_relu" if "sim" in method.head else "relu",
        seed=0,
    )
    ours = [stage.double() for stage in model]
    layers = twins.layers(CONFIG, HIDDEN, twins.activation_of(method))
    options = {"dim": DIM, "smoothing": method.smoothing, "normalization": normalization}
    twin = [stage.double() for stage in twins.network(layers, method.head, **options)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for stage, other in zip(ours, twin, strict=True):
            for parameter in stage.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).double(), alpha=0.1)
            copy(stage, other)
            stage.detach = name != "no detach"
    return ours, twin


def copy(module: torch.nn.Module, other: torch.nn.Module) -> None:
    for value, tensor in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
        assert value.shape == tensor.shape
        tensor.copy_(value)


def assert_same(
    history: list[train.Record], expected: twins.History, ours: Sequence[torch.nn.Module], twin: Sequence[twins.Stage]
) -> None:
    """Losses, parameters and running statistics."""
    assert [record["train_loss"] for record in history] == [pytest.approx(losses, rel=1e-9) for losses in expected]
    for stage, other in zip(ours, twin, strict=True):
        for value, tensor in zip(stage.state_dict().values(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(value, tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [
    name for name in twins.METHODS if name not in ("decoupled", "autoencoder", "denoising", "goodness")
])  # fmt: skip
def test_training_is_that_of_the_twin(name: str) -> None:
    ours, twin = ours_and_twin(name)
    kind, options = TRAINERS.get(name, LOCAL)
    trainer = kind(ours, adam, progress=False, **options)
    history = trainer.fit(batches(), epochs=2)
    assert_same(history, twins.METHODS[name].train(twin, batches(), 2, adam), ours, twin)
    assert trainer.evaluate(batches())["final"] == twins.accuracy(twin, batches())


def test_greedy_training_on_kept_features_is_that_of_the_twin() -> None:
    """One batch, in which their order does not count."""
    ours, twin = ours_and_twin("greedy")
    history = train.GreedyTrainer(ours, adam, progress=False).fit(batches()[:1], epochs=3)
    assert_same(history, twins.fit_greedily(twin, batches()[:1], 3, adam), ours, twin)


def test_forward_forward_is_that_of_the_twin() -> None:
    ours, twin = ours_and_twin("goodness")
    pairs = list(train.LabelledPairs(batches(), 10))
    for (images, labels), (both, kinds) in zip(batches(), pairs, strict=True):
        right, wrong = both[0::2], both[1::2]
        assert torch.equal(right, twins.write_label(images, labels))
        written = wrong.flatten(1)[:, :10].argmax(1)
        assert torch.equal(wrong, twins.write_label(images, written)) and bool((written != labels).all())
        assert kinds.tolist() == [1, 0] * len(images)
    trainer = train.LocalTrainer(ours, adam, progress=False)
    assert_same(trainer.fit(pairs, epochs=2), twins.local(twin, pairs, 2, adam), ours, twin)
    assert trainer.evaluate(batches())["final"] == twins.accuracy(twin, batches())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_pretraining_is_that_of_the_twin(tied: bool, noise: float) -> None:
    ours, twin = ours_and_twin("joint")
    options = {"tied": tied, "noise": noise, "channels_last": False, "cache": False, "progress": False}
    pretrainer = train.AutoencoderPretrainer(ours, adam, **options)
    decoders = [twins.Decoder(stage, tied).double() for stage in twin]
    with torch.no_grad():
        for decoder, other in zip(pretrainer.decoders, decoders, strict=True) if not tied else ():
            other.transpose.weight.copy_(decoder.weight)
    torch.manual_seed(0)  # of the noise
    history = pretrainer.fit(batches(), epochs=2)
    torch.manual_seed(0)
    assert_same(history, twins.pretrain(twin, decoders, batches(), 2, adam, noise), ours, twin)
    history = train.JointTrainer(ours, adam, progress=False).fit(batches(), epochs=1)
    assert_same(history, twins.joint(twin, batches(), 1, adam), ours, twin)
