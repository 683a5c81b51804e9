"""Stacked autoencoders: decoders, denoising, one layer after another, resuming."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import layerwise_ext as lw
import pytest
import torch
import torch.nn.functional as F
from layerwise_ext.nn import AcceleratedDownsample2d, ConvBNReLU2d, LocalStage, PooledLinearHead
from layerwise_ext.train import AutoencoderPretrainer, EarlyStopping, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def pretrainer(layers: Any, *arguments: Any, **options: Any) -> AutoencoderPretrainer:
    return AutoencoderPretrainer(layers, *arguments, **{"seed": 0, "progress": False, **options})


def images(n: int = 24, shape: tuple[int, ...] = (3, 8, 8)) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


def loader(x: Tensor, size: int = 8) -> DataLoader[Any]:
    data = TensorDataset(x, torch.zeros(len(x), dtype=torch.int64))
    return DataLoader(data, size, shuffle=True, generator=torch.Generator().manual_seed(1))


# -- Decoders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [
    nn.Linear(6, 4, bias=False),
    nn.Conv2d(3, 5, 3, bias=False),
    nn.Conv2d(3, 5, 3, 2, 1, bias=False),
    nn.Conv2d(3, 5, (2, 3), (3, 2), (1, 0), (2, 1), bias=False),
    nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2, bias=False),
])  # fmt: skip
def test_a_tied_decoder_is_the_transpose(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer).double()
    decoder = pretrainer([layer], tied=True).decoders[0]
    shape = (2, 6) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 9, 8)
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    z = torch.randn_like(y)
    torch.testing.assert_close((y * z).sum(), (x * decoder.decode(z, x.shape)).sum())
    assert [name for name, _ in decoder.named_parameters()] == ["bias"]
    decoder.bias.data += 1
    torch.testing.assert_close((y * z).sum() + x.sum(), (x * decoder.decode(z, x.shape)).sum())


def test_decoders_of_pooled_codes() -> None:
    x = images(2).double()
    plain = nn.Conv2d(3, 5, 3, padding=1, bias=False).double()
    decoder = pretrainer([plain], tied=True).decoders[0]
    layer = nn.Sequential(plain, AcceleratedDownsample2d("space_to_depth", 2))
    torch.testing.assert_close(decoder.decode(layer(x), x.shape), decoder.decode(plain(x), x.shape))
    pooled = F.avg_pool2d(plain(x), 2)
    torch.testing.assert_close(
        decoder.decode(pooled, x.shape), decoder.decode(pooled.repeat_interleave(2, 2).repeat_interleave(2, 3), x.shape)
    )
    strided = ConvBNReLU2d(3, 5, 3, padding=1, downsample=("stride", 2)).double()
    peer = copy.deepcopy(strided.to_modules()[0])
    torch.testing.assert_close(
        pretrainer([strided], tied=True).decoders[0].decode(pooled, x.shape),
        pretrainer([peer], tied=True).decoders[0].decode(pooled, x.shape),
    )


# -- Training ----------------------------------------------------------------------------------------------------------


def test_a_linear_autoencoder_finds_the_plane_of_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(64, 2, generator=generator) @ torch.randn(2, 6, generator=generator) + 0.5
    flat = torch.randn(64, 6, generator=generator)
    for tied in (False, True):
        for x, limit in ((plane, 1e-3), (flat, None)):
            torch.manual_seed(0)
            trainer = pretrainer(
                [nn.Linear(6, 2)], lambda p: torch.optim.Adam(p, lr=0.03), tied=tied, channels_last=False
            )
            history = trainer.fit([x] * 20, 40)
            # What the two first principal components leave of it: no linear autoencoder is better.
            least = torch.linalg.svdvals((x - x.mean(0)).double())[2:].square().sum().item() / x.numel()
            assert history[-1]["train_loss"][0] > least - 1e-6
            assert history[-1]["train_loss"][0] < (limit or 1.05 * least)
            assert [record["stages"] for record in history] == [[0]] * 40


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_by_hand(tied: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    trainer = pretrainer([layer], sgd, tied=tied, noise=0.3)
    peer, decoder, x = copy.deepcopy(layer), copy.deepcopy(trainer.decoders[0]), images(8)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)  # is left over from something else
    torch.manual_seed(5)
    history = trainer.fit([(x, None)], 1)
    torch.manual_seed(5)
    noisy = F.dropout(x.contiguous(memory_format=torch.channels_last), 0.3) * 0.7
    assert 0.2 < (noisy == 0).float().mean() < 0.4
    torch.testing.assert_close(noisy[noisy != 0], x[noisy != 0])
    weight = peer[0].weight if tied else decoder.weight
    loss = F.mse_loss(F.conv_transpose2d(peer(noisy), weight, decoder.bias, padding=1), x)  # of the input itself
    parameters = [*peer.parameters(), decoder.bias, *([] if tied else [decoder.weight])]
    gradients = torch.autograd.grad(loss, parameters)
    assert history[0]["train_loss"] == [pytest.approx(loss.item())] and math.isnan(history[0]["train_accuracy"][0])
    trained = [*layer.parameters(), trainer.decoders[0].bias, *([] if tied else [trainer.decoders[0].weight])]
    for p, q, g in zip(trained, parameters, gradients, strict=True):
        torch.testing.assert_close(p, q - 0.05 * g, rtol=1e-4, atol=1e-6)
        assert p.grad is None
    torch.testing.assert_close(layer[1].running_mean, peer[1].running_mean)


def test_layers_one_after_another_on_codes_of_the_clean_data() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(10, 8), nn.Dropout(0.5), nn.ReLU()), nn.Sequential(nn.Linear(8, 4), nn.ReLU())]
    x = images(shape=(10,))
    trainer = pretrainer(layers, noise=0.25)
    seen: list[Tensor] = []
    first: list[Tensor] = []
    step = trainer.step

    def watch(inputs: Tensor, target: Tensor, **options: Any) -> Any:
        if trainer.stage == 1:
            seen.append(inputs)
            first.append(layers[0][0].weight.clone())
        return step(inputs, target, **options)

    trainer.step = watch  # type: ignore[method-assign]
    history = trainer.fit(loader(x), 2)
    assert [record["stages"] for record in history] == [[0], [0], [1], [1]]
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    assert all(torch.equal(w, layers[0][0].weight) for w in first) and not any(m.training for m in layers[0].modules())
    codes = layers[0](x)
    for epoch in (torch.cat(seen[:3]), torch.cat(seen[3:])):  # each code once per epoch, in another order
        torch.testing.assert_close(epoch.sort(0).values, codes.sort(0).values)
    assert not torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))
    assert trainer.stage == 2 and not any(optimizer.state for optimizer in trainer.optimizers)


def test_a_network_is_pretrained_and_then_trained_by_others() -> None:
    model = lw.models.vgg([6, "M", 8], image_size=(8, 8), hidden=10, pool="space_to_depth", num_classes=2, seed=0)
    heads = copy.deepcopy([stage.head.state_dict() for stage in model])
    before = copy.deepcopy(model.state_dict())
    x = images()
    trainer = pretrainer(model, noise=0.2)
    history = trainer.fit(loader(x), 12)
    for layer in range(3):
        losses = [record["train_loss"][0] for record in history if record["stages"] == [layer]]
        assert len(losses) == 12 and losses[-1] < losses[0]
    assert all(torch.equal(h[k], stage.head.state_dict()[k]) for h, stage in zip(heads, model, strict=True) for k in h)
    changed = [k for k, v in model.state_dict().items() if k.endswith("conv.weight") and not torch.equal(v, before[k])]
    assert len(changed) == 3
    data = [(x, (x[:, 0, 0, 0] > 0).long())]
    for kind in (lw.train.JointTrainer, lw.train.LocalTrainer):
        kind(model, progress=False).fit(data, 1)


def test_dense_layers_are_pretrained_and_then_trained_by_others() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in ((20, 12), (12, 8))]
    x = torch.randn(32, 20)
    data = [(x, (x[:, :10].sum(1) > 0).long())]
    pretrainer(layers).fit(data, 5)
    for kind in (lw.train.JointTrainer, lw.train.LocalTrainer, lw.train.GreedyTrainer):
        stages = [LocalStage(copy.deepcopy(layers[0]), PooledLinearHead(12, 2, bins=1), dropout=0.1),
                  LocalStage(copy.deepcopy(layers[1]), PooledLinearHead(8, 2, bins=1))]  # fmt: skip
        model = lw.models.StagedModel(stages)
        trainer = kind(model, lambda p: torch.optim.Adam(p, lr=0.02), progress=False)
        history = trainer.fit(data, 40, data)
        assert history[-1]["val_accuracy"][-1] > 0.9
        torch.testing.assert_close(model.eval().backbone()(x), model(x))


@pytest.mark.parametrize("cache", [True, False])
def test_resuming_equals_one_run(cache: bool) -> None:
    def build() -> tuple[AutoencoderPretrainer, list[nn.Module]]:
        torch.manual_seed(0)
        layers = [ConvBNReLU2d(3, 4, 3, padding=1, downsample=("max", 2)), ConvBNReLU2d(4, 4, 3)]
        return pretrainer(layers, noise=0.2, cache=cache), layers

    states: list[io.BytesIO] = []

    def save(trainer: Trainer, record: Any) -> None:
        states.append(io.BytesIO())
        torch.save(trainer.state_dict(), states[-1])

    whole, expected = build()
    whole.fit(loader(images()), 2, on_epoch_end=save)
    assert len(states) == 4
    for state in states:
        state.seek(0)
        parts, layers = build()
        torch.manual_seed(99)
        parts.load_state_dict(torch.load(state, weights_only=True))
        parts.fit(loader(images()), 2)
        assert [r["train_loss"] for r in parts.history] == [r["train_loss"] for r in whole.history]
        assert not any(layer.training for layer in [*layers, *expected])
        for a, b in zip(layers, expected, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_options_of_the_other_trainers() -> None:
    """Two batches to an update, clipped; a schedule for each layer; averaged weights, of which the next layer gets the
    codes; a layer that stops early; what is told of the validation data."""

    def layers() -> list[nn.Module]:
        torch.manual_seed(0)
        return [ConvBNReLU2d(3, 4, 3, padding=1, downsample=("max", 2)), ConvBNReLU2d(4, 4, 3)]

    schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # noqa: E731
    trainer = pretrainer(
        layers(), sgd, accumulate=3, clip_norm=0.01, scheduler=schedule, ema_decay=0.5, tied=True, noise=0.2
    )
    before = copy.deepcopy([p for stage in trainer.stages for p in stage.parameters()])
    x = images()
    history = trainer.fit(loader(x), 2, loader(x))
    # One update of at most 0.01 * lr in an epoch; the averages are half of the first update and half of the second.
    moved = torch.cat([(p - q).flatten() for p, q in zip(trainer.stages[0].parameters(), before, strict=False)])
    assert 0 < moved.norm() <= 0.01 * 0.05 * (1 + 0.5 * 0.5) + 1e-8
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers] == [0.0125, 0.0125]
    assert [record["stages"] for record in history] == [[0], [0], [1], [1]]
    assert [len(record["val_loss"]) for record in history] == [1, 1, 2, 2]
    codes = trainer.stages[0].eval().features(x)
    scores = trainer.evaluate([x])  # without noise, images alone
    for loss, stage, inputs in zip(scores["loss"], trainer.ema_stages, (x, codes), strict=True):
        expected = F.mse_loss(stage.head.decode(stage.eval().features(inputs), inputs.shape), inputs)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert all(map(math.isnan, scores["accuracy"]))
    with pytest.raises(ValueError, match=r"stages\[1\] predicts nothing"):
        trainer.predict(x)

    stopping = pretrainer(layers(), sgd, early_stopping=EarlyStopping(1, min_delta=1e9))
    assert [record["stages"] for record in stopping.fit(loader(x), 5, loader(x))] == [[0], [0], [1], [1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_in_a_file_and_in_fewer_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    losses = []
    for options in ({}, {"autocast_dtype": dtype}, {"autocast_dtype": dtype, "cache_dir": tmp_path}):
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(12, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 4), nn.ReLU())]
        seen: list[torch.dtype] = []
        layers[1].register_forward_hook(lambda _, args, output, seen=seen: seen.append(args[0].dtype))
        trainer = pretrainer(layers, sgd, **options)
        losses.append([record["train_loss"][0] for record in trainer.fit(loader(images(shape=(12,))), 3)])
        assert set(seen) == {options.get("autocast_dtype", torch.float32)}
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]
    assert not list(tmp_path.iterdir())


def test_codes_that_do_not_fit_are_computed_in_each_epoch(caplog: pytest.LogCaptureFixture) -> None:
    results = []
    for options in ({"cache": False}, {"cache_limit_bytes": 100}):
        torch.manual_seed(0)
        trainer = pretrainer([nn.Linear(4, 4), nn.Linear(4, 2)], **options)
        results.append([record["train_loss"] for record in trainer.fit([images(shape=(4,))] * 2, 2)])
    assert results[0] == results[1]
    assert len([r for r in caplog.records if "cache_limit_bytes is 0.0 MiB" in r.message]) == 1


def test_refusals() -> None:
    linear = nn.Linear(4, 2)
    residual = lw.models.resnet((1,), width=4, image_size=(8, 8), seed=0)
    for error, match, layers, options in [
        (ValueError, "layers is empty", [], {}),
        (TypeError, r"layers\[1\] is str", [linear, "linear"], {}),
        (ValueError, r"layers\[1\] has 0 convolutions and linear layers; 1 is needed", [linear, nn.ReLU()], {}),
        (ValueError, r"layers\[1\] has 2 convolutions and linear layers", residual, {}),
        (ValueError, r"layers\[0\] has a Conv1d that a decoder cannot undo", [nn.Conv1d(2, 2, 3)], {}),
        (ValueError, "padding='same' and kernel_size", [nn.Conv2d(2, 2, 2, padding="same")], {}),
        (ValueError, r"layers\[1\] has a lazy module", [linear, nn.LazyConv2d(2, 3)], {}),
        (ValueError, "noise is 1.0; allowed: 0 to below 1", [linear], {"noise": 1.0}),
    ]:
        with pytest.raises(error, match=match):
            pretrainer(layers, **options)
    trainer = pretrainer([linear])
    with pytest.raises(ValueError, match="epochs is 0; allowed: 1 or more"):
        trainer.fit([images(shape=(4,))], 0)
    with pytest.raises(RuntimeError, match="loader gave no batches"):
        trainer.fit([], 1)
    with pytest.raises(TypeError, match="the loader gave a str"):
        trainer.fit(["x"], 1)
    for layer, x, match in [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), images(), r"\[24, 144\] that .*; \[N, 4, H, W\]"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.PixelShuffle(2)), images(), r"\[24, 1, 12, 12\] that"),
        (nn.Sequential(nn.Linear(4, 4), nn.GLU()), images(shape=(4,)), r"\[24, 2\] that .*; \[N, 4\]"),
    ]:
        with pytest.raises(ValueError, match=r"layers\[0\] gives a code " + match):
            pretrainer([layer]).fit([x], 1)
    state = trainer.state_dict()
    with pytest.raises(ValueError, match="the state has 1 stages; this trainer has 2"):
        pretrainer([nn.Linear(4, 2), nn.Linear(2, 2)]).load_state_dict(state)
    with pytest.raises(ValueError, match="the state is of a JointTrainer"):
        trainer.load_state_dict({**state, "trainer": "JointTrainer"})
    stage = LocalStage(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), PooledLinearHead(4, 2, 1))
    assert pretrainer([stage]).fit([images()], 1)[0]["stages"] == [0]
