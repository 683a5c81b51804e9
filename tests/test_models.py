"""VGG networks: sizes, initial values, and the fused and plain forms of one network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from layerwise_ext.models import HEADS, StagedModel, resnet, vgg
from layerwise_ext.nn import (
    ContrastiveHead,
    ConvBNReLU2d,
    ConvHead,
    GoodnessHead,
    HeadOutput,
    InfoProHead,
    LocalHead,
    LocalStage,
    MLPSRHead,
    ModuleHead,
    PooledLinearHead,
    PooledMoments,
    PredSimHead,
    ReconstructionHead,
    SimilarityHead,
)
from torch import Tensor, nn

SMALL = {"in_channels": 1, "image_size": (8, 8), "hidden": 16, "seed": 0}


class NormHead(LocalHead):
    bins = (1, 1)

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        return HeadOutput(moments.m2.flatten(1), None if target is None else moments.m2.mean())


@pytest.mark.parametrize(("config", "parameters"), [("vgg8b", 8_903_434), ("vgg11b", 11_559_946)])
def test_parameter_counts_of_the_paper(config: str, parameters: int) -> None:
    model = vgg(config, dim=2048)
    assert sum(p.numel() for p in model.backbone().parameters()) == parameters
    assert len(model) == {"vgg8b": 7, "vgg11b": 10}[config]


def test_cells_follow_the_halving_rule() -> None:
    model = vgg([128, 256, "M", 512, "M", 512], dim=2048, width_multiplier=1.0, hidden=None)
    assert [stage.head.bins for stage in model] == [(4, 4), (2, 4), (2, 2), (2, 2)]
    odd = vgg([16, 16, "M", 16], in_channels=1, image_size=(7, 5), dim=128, hidden=None)
    assert [stage.head.bins for stage in odd] == [(2, 3), (2, 3), (3, 2)]
    explicit = vgg([8, "M", 8, "M", 8], **SMALL, bins=4)
    assert [stage.head.bins for stage in explicit] == [(4, 4), (4, 4), (2, 2), (1, 1)]


def test_fused_and_plain_are_the_same_network() -> None:
    fused, plain = vgg([8, "M", 16], **SMALL), vgg([8, "M", 16], **SMALL, fused=False)
    assert any(isinstance(module, ConvBNReLU2d) for module in fused.modules())
    assert not any(isinstance(module, ConvBNReLU2d) for module in plain.modules())
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), plain.parameters(), strict=True))
    nn.init.normal_(fused[-1].head.linear.weight)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


def test_backbone_is_the_plain_network_without_local_heads() -> None:
    model, other = vgg([8, "M", 16], **SMALL), vgg([8, "M", 16], **{**SMALL, "seed": 1}, fused=False)
    nn.init.normal_(model[-1].head.linear.weight)
    state = model.backbone_state_dict()
    assert not any("head" in key for key in state)
    other.backbone().load_state_dict(state)
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.backbone()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [vgg, resnet])
def test_dropout_lies_between_stages(make: Callable[..., StagedModel]) -> None:
    options = {"image_size": (8, 8), "in_channels": 1, "seed": 0}
    config = [6, "M", 8] if make is vgg else (1, 1)
    model, without = make(config, dropout=0.3, **options), make(config, **options)
    assert [stage.dropout is None for stage in model] == [False] * (len(model) - 1) + [True]
    assert list(model.backbone_state_dict()) == list(without.backbone_state_dict())
    x = torch.rand(4, 1, 8, 8)
    nn.init.normal_(model[-1].head.linear.weight)  # classifiers start from zero
    model.load_state_dict(without.state_dict() | {k: v for k, v in model.state_dict().items() if "head" in k})
    outputs = []
    for network in (model, model.backbone(), without.backbone()):
        torch.manual_seed(3)
        outputs.append(network(x))
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    with pytest.raises(ValueError, match=r"dropout is 1\.5; allowed: 0 to below 1"):
        make(config, dropout=1.5, **options)


def test_a_seed_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = vgg([8], **SMALL), vgg([8], **SMALL)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = vgg([8], **{**SMALL, "seed": 1})
    assert not torch.equal(first[0].body.conv.weight, other[0].body.conv.weight)


def test_gradients_reach_every_body_and_only_the_last_head() -> None:
    model = vgg([8, "M", 16], **SMALL)
    nn.init.normal_(model[-1].head.linear.weight)
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.backbone().parameters())
    assert all(p.grad is None for stage in list(model)[:-1] for p in stage.head.parameters())


def test_width_large_images_and_copies() -> None:
    model = vgg([32, "M", 64], image_size=(66, 66), width_multiplier=0.25, hidden=40, activation="leaky_relu")
    assert [stage.head.in_channels for stage in model] == [8, 16, 10]
    first = model[0].body.conv
    assert (first.kernel_size, first.stride, first.padding) == ((7, 7), (2, 2), (3, 3))
    assert model[2].body.conv.kernel_size == (16, 16)
    assert copy.deepcopy(model)(torch.randn(2, 3, 66, 66)).shape == (2, 10)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("hidden", [16, None])
def test_heads(head: str, hidden: int | None) -> None:
    options = {**SMALL, "hidden": hidden, "head": head, "beta": 0.9, "activation": "leaky_relu"}
    model, plain = vgg([8, "M", 16], **options), vgg([8, "M", 16], **options, fused=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    kinds = {"pooled": PooledLinearHead, "similarity": SimilarityHead, "predsim": PredSimHead, "conv": ConvHead,
             "contrastive": ContrastiveHead, "mlp": MLPSRHead, "auglocal": ModuleHead, "goodness": GoodnessHead,
             "reconstruction": ReconstructionHead, "infopro": InfoProHead}  # fmt: skip
    kind = kinds[head.partition("_")[0]]
    assert all(type(stage.head) is kind for stage in list(model)[:-1])
    own = kind in (PredSimHead, GoodnessHead) or (kind in (ConvHead, MLPSRHead) and hidden is None)
    assert type(model[-1].head) is (kind if own else PooledLinearHead)
    projects = [any(isinstance(m, SimilarityHead) and m.needs_map for m in stage.head.modules()) for stage in model]
    is_last = [stage is model[-1] for stage in model]
    if not head.endswith("projected"):
        assert not any(projects)
    else:
        assert projects == [kind is PredSimHead or not last for last in is_last]
    if kind is PredSimHead:
        assert all(stage.head.beta == 0.9 and not stage.head.pred.linear.weight.any() for stage in model)
    x, target = torch.randn(6, 1, 8, 8), torch.arange(6) % (2 if kind is GoodnessHead else 3)
    logits, y, z = model(x), x, x
    assert logits.shape == (6, 10)
    for stage, peer in zip(model, plain, strict=True):
        y, loss, _ = stage(y, target, x)
        z, expected, _ = peer(z, target, x)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in stage.parameters())
    keys = {key.replace(".block", "") for key in model.backbone_state_dict()}
    usual = vgg([8, "M", 16], **{**SMALL, "hidden": hidden}).backbone_state_dict().keys()
    if kind in (GoodnessHead, ConvHead, MLPSRHead):  # with an output of its own, or none
        keys, usual = ({key for key in each if "output" not in key} for each in (keys, usual))
    assert keys == set(usual)
    if kind is not GoodnessHead:
        model.eval()
        torch.testing.assert_close(model.backbone()(x), model(x), rtol=1e-4, atol=1e-5)


def test_conv_heads_of_other_depths() -> None:
    for depth in (1, 3):
        model = vgg([8, "M", 16], **{**SMALL, "hidden": None}, head="conv", head_depth=depth)
        assert [len(stage.head.layers) for stage in model] == [depth - 1] * len(model)
        assert [stage.head.needs_map for stage in model] == [depth > 1] * len(model)
    with pytest.raises(ValueError, match="head_depth is 0; it must be at least 1"):
        vgg([8], **SMALL, head_depth=0)


@pytest.mark.parametrize("make", [vgg, resnet])
@pytest.mark.parametrize("activation", ["prelu", "rrelu", "gelu", "silu", "tanh"])
def test_activations(activation: str, make: Callable[..., StagedModel]) -> None:
    options = {"image_size": (8, 8), "in_channels": 1, "activation": activation, "seed": 0}
    config = [6, "M", 8] if make is vgg else (1, 1)
    fused, plain = make(config, **options), make(config, fused=False, **options)
    assert list(fused.backbone_state_dict()) == list(plain.backbone_state_dict())
    assert type(fused[0].body).__name__ == "ConvBNReLU2d" and fused[0].body.activation == activation
    x = torch.randn(4, 1, 8, 8)
    if activation == "rrelu":  # its slopes are random while training
        fused.eval(), plain.eval()
    y, z = x, x
    for stage, peer in zip(fused, plain, strict=True):
        y, z = stage.features(y), peer.features(z)
        torch.testing.assert_close(y, z, rtol=1e-3, atol=1e-4)


def test_bad_arguments() -> None:
    for message, config, options in [
        ("config is 'vgg9'; allowed: 'vgg8b'", "vgg9", {}),
        ("config holds 'X'", [8, "X"], {}),
        ("two pools in a row", [8, "M", "M", 8], {}),
        ("at least one number", ["M"], {}),
        ("no layer is left", [8, "M"], {"hidden": None}),
        ("head is 'mlp'; allowed: 'pooled_linear', 'similarity'", [8], {"head": "mlp"}),
        ("activation is 'swish'", [8], {"activation": "swish"}),
        ("width_multiplier is 0", [8], {"width_multiplier": 0}),
        (r"image_size is \(8, 8\), too small for 4 2x2 pools.*at least 16", "vgg8b", {"image_size": (8, 8)}),
        (r"image_size is \(0, 8\)", [8], {"image_size": (0, 8)}),
    ]:
        with pytest.raises(ValueError, match=message):
            vgg(config, **options)
    with pytest.raises(ValueError, match="stages is empty"):
        StagedModel([])
    with pytest.raises(TypeError, match="the output needs a classifier: PooledLinearHead"):
        StagedModel([LocalStage(nn.Identity(), NormHead())])


@pytest.mark.parametrize("head", HEADS)
def test_label_smoothing_reaches_every_cross_entropy(head: str) -> None:
    if head == "goodness":
        with pytest.raises(ValueError, match=r"label_smoothing is 0.1 with head 'goodness'"):
            vgg([8, "M", 16], **SMALL, head=head, label_smoothing=0.1)
        return
    model = vgg([8, "M", 16], **SMALL, head=head, label_smoothing=0.1)
    found = [m.label_smoothing for m in model.modules() if hasattr(m, "label_smoothing")]
    assert 0.1 in found
    assert set(found) == {0.1} or head == "infopro_contrastive"
    assert model[-1].head.to_modules() is not None


@pytest.mark.parametrize("head", ["reconstruction", "infopro", "infopro_contrastive"])
def test_what_is_reconstructed_is_the_image_before_normalisation(head: str) -> None:
    options = {**SMALL, "in_channels": 2, "head": head, "image_mean": [0.25, 0.5], "image_std": [0.5, 0.25]}
    model = vgg([8, "M", 16, 16], **options)
    decoders = [m for stage in model for m in stage.head.modules() if isinstance(m, ReconstructionHead)]
    assert len(decoders) == 3
    for decoder in decoders:
        assert decoder.mean.flatten().tolist() == [0.25, 0.5] and decoder.std.flatten().tolist() == [0.5, 0.25]
    weights = [stage.head.weights for stage in model if isinstance(stage.head, InfoProHead)]
    assert weights == ([] if head == "reconstruction" else [(5.0, 0.5), (3.0, 0.75), (1.0, 1.0)])
    tasks = {stage.head.task for stage in model if isinstance(stage.head, InfoProHead)}
    assert tasks == {"infopro": {"softmax"}, "infopro_contrastive": {"contrastive"}}.get(head, set())
