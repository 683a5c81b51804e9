"""ConvBNReLU2d, PooledMoments and PooledLinearHead against the plain PyTorch modules that they stand for."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import backends
import pytest
import torch
import torch.nn.functional as F
from layerwise_ext import functional
from layerwise_ext.nn import AcceleratedDownsample2d, ConvBNReLU2d, LocalHead, PooledLinearHead, PooledMoments
from torch import nn

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}  # everything here is float64 unless said otherwise


def plain(layer: ConvBNReLU2d) -> nn.Sequential:
    """An independent nn.Sequential(Conv2d, BatchNorm2d, activation) with the same values."""
    return copy.deepcopy(nn.Sequential(*layer.to_modules()))


def randomise(layer: nn.Module) -> nn.Module:
    """Parameters and running statistics away from their initial zeros and ones."""
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    return layer


def gradients(module: nn.Module, y: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return list(torch.autograd.grad((y * weights).sum(), list(module.parameters())))


GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 1), "padding": (1, 0), "bias": True},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (4, 3), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 2, "padding": "same", "padding_mode": "replicate"},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_layer_equals_sequential(options: dict, training: bool) -> None:
    torch.manual_seed(0)
    layer = randomise(ConvBNReLU2d(4, 6, **options, dtype=torch.float64)).train(training)
    peer = plain(layer)
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    y, expected = layer(x), peer(x)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    torch.testing.assert_close(gradients(layer, y), gradients(peer, expected), **TOLERANCE)
    torch.testing.assert_close(list(layer.buffers()), list(peer.buffers()), **TOLERANCE)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "identity"])
def test_activations(activation: str) -> None:
    layer = ConvBNReLU2d(2, 3, 3, activation=activation, negative_slope=0.2, dtype=torch.float64)
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(layer)(x), **TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.3, "eps": 1e-2},
        {"track_running_stats": False},
        {"affine": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_batch_norm_options_over_training_and_evaluation(options: dict) -> None:
    torch.manual_seed(0)
    layer = ConvBNReLU2d(2, 3, 3, **options, dtype=torch.float64)
    peer = plain(layer)
    for _ in range(3):
        x = torch.randn(4, 2, 6, 6, dtype=torch.float64) + 1
        torch.testing.assert_close(layer(x), peer(x), **TOLERANCE)
    torch.testing.assert_close(list(layer.buffers()), list(peer.buffers()), **TOLERANCE)
    layer.eval()
    peer.eval()
    torch.testing.assert_close(layer(x), peer(x), **TOLERANCE)
    torch.testing.assert_close(list(layer.buffers()), list(peer.buffers()), **TOLERANCE)


def test_batch_norm_child_decides_its_own_mode_and_geometry_may_change() -> None:
    layer = randomise(ConvBNReLU2d(2, 3, 3, padding=1, dtype=torch.float64))
    layer.bn.eval()  # frozen statistics inside a training layer
    layer.conv.stride, layer.conv.dilation, layer.conv.padding = (2, 2), (2, 2), (2, 2)
    x = torch.randn(2, 2, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(layer)(x), **TOLERANCE)
    assert layer.bn.num_batches_tracked == 0


def test_tracking_switched_off_after_construction_leaves_the_statistics() -> None:
    layer = ConvBNReLU2d(2, 3, 3, dtype=torch.float64)
    layer.bn.track_running_stats = False
    peer = plain(layer)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64) + 1
    torch.testing.assert_close(layer(x), peer(x), **TOLERANCE)
    assert torch.equal(layer.bn.running_mean, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(list(layer.buffers()), list(peer.buffers()), **TOLERANCE)


def test_parametrised_weight_is_used() -> None:
    layer = ConvBNReLU2d(2, 3, 3, dtype=torch.float64)
    torch.nn.utils.parametrizations.weight_norm(layer.conv)
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    y, expected = layer(x), plain(layer)(x)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    assert all(g is not None for g in gradients(layer, y))


def test_checkpoints_of_a_sequential_load_at_any_depth() -> None:
    old = nn.Sequential(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), nn.Flatten())
    new = nn.Sequential(ConvBNReLU2d(2, 3, 3, bias=True), nn.Flatten())
    new.load_state_dict(randomise(old).state_dict())
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(new.eval()(x), old.eval()(x), rtol=1e-5, atol=1e-5)
    new.load_state_dict(new.state_dict())
    assert list(new[0].state_dict()) == [
        "conv.weight",
        "conv.bias",
        "bn.weight",
        "bn.bias",
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
    ]


def test_loading_is_strict_in_both_directions() -> None:
    state = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)).state_dict()
    layer = ConvBNReLU2d(2, 3, 3)
    layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected.*2\.weight"):
        layer.load_state_dict({**state, "2.weight": torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r"Unexpected.*conv\.bias"):
        layer.load_state_dict({**state, "0.bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match=r"Missing.*bn\.running_var"):
        layer.load_state_dict({key: value for key, value in state.items() if key != "1.running_var"})
    with pytest.raises(RuntimeError, match=r"Unexpected.*0\.weight"):
        layer.load_state_dict({**layer.state_dict(), "0.weight": state["0.weight"]})


def test_from_modules_shares_and_to_modules_gives_back() -> None:
    conv, bn = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval()
    layer = ConvBNReLU2d.from_modules(conv, bn, nn.LeakyReLU(0.3))
    assert not layer.training
    assert (layer.activation, layer.negative_slope) == ("leaky_relu", 0.3)
    back = layer.to_modules()
    assert back[0] is conv
    assert back[1] is bn
    assert isinstance(back[2], nn.LeakyReLU)
    assert back[2].negative_slope == 0.3
    assert ConvBNReLU2d.from_modules(conv, bn, nn.ReLU(inplace=True)).activation == "relu"
    assert ConvBNReLU2d.from_modules(conv, bn).activation == "identity"
    layer.train()(torch.randn(2, 2, 5, 5))
    assert bn.num_batches_tracked == 1


ACTIVATIONS = [
    nn.ReLU(), nn.LeakyReLU(0.2), nn.Identity(), nn.PReLU(), nn.PReLU(6, init=0.1), nn.RReLU(0.1, 0.3), nn.ReLU6(),
    nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Hardswish(),
]  # fmt: skip
DOWNSAMPLES = [None, ("max", 2), ("avg", (2, 3)), ("stride", 2), ("space_to_depth", (1, 2))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation_equals_its_module(activation: nn.Module, training: bool) -> None:
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(4, 6, 3, dtype=torch.float64), nn.BatchNorm2d(6, dtype=torch.float64)
    act = copy.deepcopy(activation).double()
    layer = randomise(ConvBNReLU2d.from_modules(conv, bn, act)).train(training)
    if isinstance(act, nn.PReLU):
        assert [name for name, _ in layer.named_parameters()][-1] == "act.weight"
        sequential = {"conv": "0", "bn": "1", "act": "2"}
        state = layer.state_dict().items()
        layer.load_state_dict({sequential[key.split(".")[0]] + key[key.index(".") :]: value for key, value in state})
    peer = plain(layer)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    y = layer(x)
    if isinstance(act, nn.RReLU) and training:
        u = peer[1](peer[0](x))
        slopes = y / u
        torch.testing.assert_close(slopes[u > 0], torch.ones_like(slopes[u > 0]))
        assert ((slopes[u < 0] > 0.1) & (slopes[u < 0] < 0.3)).all()
        return
    torch.testing.assert_close(y, peer(x), **TOLERANCE)
    for ours, theirs in zip(gradients(layer, y), gradients(peer, peer(x)), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("downsample", DOWNSAMPLES, ids=str)
def test_downsampling_and_residual_equal_modules(downsample: Any, memory_format: Any, training: bool) -> None:
    torch.manual_seed(0)
    layer = randomise(ConvBNReLU2d(4, 6, 3, padding=1, dtype=torch.float64, downsample=downsample)).train(training)
    conv, bn, act, *pool = plain(layer)
    x = torch.randn(3, 4, 8, 12, dtype=torch.float64).contiguous(memory_format=memory_format)
    residual = torch.randn_like(conv(x)).requires_grad_()
    y = layer(x, residual)
    expected = nn.Sequential(*pool)(act(bn(conv(x)) + residual))
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    ours = torch.autograd.grad((y * weights).sum(), [*layer.parameters(), residual])
    theirs = torch.autograd.grad((expected * weights).sum(), [*conv.parameters(), *bn.parameters(), residual])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    for one, other in zip(layer.buffers(), bn.buffers(), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    moments = layer.eval().forward_moments(x, (2, 2), residual=residual)
    area = functional.cell_area(moments[0].shape[2:], (2, 2))
    torch.testing.assert_close(moments[1], F.adaptive_avg_pool2d(moments[0], 2) * area, **TOLERANCE)


def test_stride_in_plain_modules() -> None:
    layer = ConvBNReLU2d(3, 8, 3, padding="same", downsample=("stride", 2), dtype=torch.float64).eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(layer)(x), **TOLERANCE)
    with pytest.raises(ValueError, match=r"no padding='same' for kernel_size \(2, 2\)"):
        ConvBNReLU2d(3, 8, 2, padding="same", downsample=("stride", 2)).to_modules()


def test_residual_under_autocast() -> None:
    layer = ConvBNReLU2d(4, 8, 3, padding=1)
    x, residual = torch.randn(2, 4, 6, 6), torch.randn(2, 8, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, residual)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert residual.grad is not None and residual.grad.dtype == torch.float32
    with pytest.raises(RuntimeError, match="residual must have shape"):
        layer(x, residual.bfloat16())


@pytest.mark.parametrize("mode", ["max", "avg", "stride", "space_to_depth"])
def test_downsample_stands_alone(mode: str) -> None:
    x = torch.randn(2, 3, 6, 9).contiguous(memory_format=torch.channels_last)
    layer = AcceleratedDownsample2d(mode, (2, 3))
    y = layer(x)
    square = AcceleratedDownsample2d(mode, 3)(x)
    expected = {
        "max": lambda: F.max_pool2d(x, 3),
        "avg": lambda: F.avg_pool2d(x, 3),
        "stride": lambda: x[..., ::3, ::3],
        "space_to_depth": lambda: F.pixel_unshuffle(x, 3),
    }[mode]()
    assert torch.equal(square, expected)
    assert y.shape == (2, 18 if mode == "space_to_depth" else 3, 3, 3)
    if mode == "space_to_depth":
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(layer.inverse(y), x)
        with pytest.raises(ValueError, match="multiple of 6 channels"):
            layer.inverse(x)
        with pytest.raises(ValueError, match=r"size is a multiple of \(2, 3\), got \[2, 3, 6, 8\]"):
            layer(x[..., :8])
    else:
        with pytest.raises(ValueError, match="only 'space_to_depth' has an inverse"):
            layer.inverse(y)
    if mode in ("max", "avg"):
        assert AcceleratedDownsample2d(mode, 4, ceil_mode=True)(x).shape == (2, 3, 2, 3)
    with pytest.raises(ValueError, match="downsample mode is 'mean'"):
        AcceleratedDownsample2d("mean")


def test_from_modules_refuses_what_it_would_change() -> None:
    conv, bn = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

    class Scaled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match=r"act is Softplus; allowed: nn.ReLU, .*nn.Hardswish, None"):
        ConvBNReLU2d.from_modules(conv, bn, nn.Softplus())
    with pytest.raises(ValueError, match=r"nn\.PReLU with 2 slopes; allowed: 1 or 3"):
        ConvBNReLU2d.from_modules(conv, bn, nn.PReLU(2))
    with pytest.raises(TypeError, match="conv is Scaled"):
        ConvBNReLU2d.from_modules(Scaled(2, 3, 3), bn)
    with pytest.raises(TypeError, match="bn is BatchNorm1d"):
        ConvBNReLU2d.from_modules(conv, nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="uninitialised LazyConv2d"):
        ConvBNReLU2d.from_modules(nn.LazyConv2d(3, 3), bn)
    with pytest.raises(ValueError, match="3 channels but bn normalises 4"):
        ConvBNReLU2d.from_modules(conv, nn.BatchNorm2d(4))
    conv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="conv has hooks"):
        ConvBNReLU2d.from_modules(conv, bn)


def test_copies_and_pickles() -> None:
    layer = randomise(ConvBNReLU2d(2, 3, 3, activation="leaky_relu")).eval()
    x = torch.randn(2, 2, 5, 5)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), layer(x))
        assert other.conv.weight is not layer.conv.weight
    assert "activation='leaky_relu', negative_slope=0.01" in repr(layer)


def test_bad_layer_arguments() -> None:
    with pytest.raises(ValueError, match="activation is 'elu'; allowed: 'relu'"):
        ConvBNReLU2d(2, 3, 3, activation="elu")
    with pytest.raises(ValueError, match="padding='same' is not supported for strided"):
        ConvBNReLU2d(2, 3, 3, padding="same", stride=2)
    with pytest.raises(TypeError):
        ConvBNReLU2d(2, 3, 3, residual=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(("size", "bins"), [((8, 6), (2, 3)), ((7, 5), (3, 2)), ((5, 5), (5, 5)), ((4, 4), (1, 1))])
def test_moments_agree_with_pooling(size: tuple[int, int], bins: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = ConvBNReLU2d(2, 3, 1, dtype=torch.float64)
    y, m1, m2 = layer.forward_moments(torch.randn(4, 2, *size, dtype=torch.float64), bins)
    fused, dense = PooledMoments(m1, m2, size), PooledMoments.of(y, bins)
    torch.testing.assert_close(fused.mean, F.adaptive_avg_pool2d(y, bins), **TOLERANCE)
    assert fused.bins == dense.bins == bins
    assert fused.size == dense.size == size
    for name in ("m1", "m2", "area", "mean", "second_moment", "variance", "std"):
        torch.testing.assert_close(getattr(fused, name), getattr(dense, name), **TOLERANCE)
    if bins == (1, 1):
        torch.testing.assert_close(fused.std, y.std(dim=(2, 3), keepdim=True), **TOLERANCE)
    if bins == size:
        assert fused.std.count_nonzero() == 0


def test_std_of_a_constant_map_has_a_finite_gradient() -> None:
    y = torch.full((1, 1, 4, 4), 3.0, requires_grad=True)
    PooledMoments.of(y, (2, 2)).std.sum().backward()
    assert torch.equal(y.grad, torch.zeros_like(y))


def test_moments_of_bad_maps() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\); moments need \[N, C, H, W\] or \[N, C\]"):
        PooledMoments.of(torch.zeros(2, 3, 4), (1, 1))
    with pytest.raises(ValueError, match=r"\(2, 2\) cells but the map is only \(1, 1\)"):
        PooledMoments.of(torch.zeros(2, 3), (2, 2))
    with pytest.raises(ValueError, match=r"\(4, 2\) cells but the map is only \(3, 3\)"):
        PooledMoments.of(torch.zeros(2, 3, 3, 3), (4, 2))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_head_equals_pool_flatten_linear(label_smoothing: float) -> None:
    torch.manual_seed(0)
    head = PooledLinearHead(3, 5, bins=(2, 3), label_smoothing=label_smoothing, dtype=torch.float64)
    y, target = torch.randn(4, 3, 8, 7, dtype=torch.float64), torch.tensor([0, 4, 2, 2])
    expected = head.linear(F.adaptive_avg_pool2d(y, (2, 3)).flatten(1))
    output = head(PooledMoments.of(y, (2, 3)), target)
    torch.testing.assert_close(output.logits, expected, **TOLERANCE)
    loss = F.cross_entropy(expected, target, label_smoothing=label_smoothing)
    torch.testing.assert_close(output.loss, loss, **TOLERANCE)
    torch.testing.assert_close(head.to_modules()(y), expected, **TOLERANCE)
    assert head(PooledMoments.of(y, (2, 3))).loss is None


def test_head_stays_in_float32_under_autocast() -> None:
    head = PooledLinearHead(3, 5, bins=2)
    y = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(PooledMoments.of(y, (2, 2)), torch.zeros(4, dtype=torch.int64))
    assert output.logits.dtype == output.loss.dtype == torch.float32
    torch.testing.assert_close(output.logits, head(PooledMoments.of(y, (2, 2))).logits)


def test_head_of_a_bfloat16_stage() -> None:
    head = PooledLinearHead(3, 5, bins=2).bfloat16()
    moments = PooledMoments.of(torch.randn(4, 3, 8, 8, dtype=torch.bfloat16), (2, 2))
    assert moments.mean.dtype == torch.float32
    assert head(moments, torch.zeros(4, dtype=torch.int64)).logits.dtype == torch.bfloat16


def test_zero_initialised_head() -> None:
    head = PooledLinearHead(3, 5, zero_init=True)
    assert all(p.count_nonzero() == 0 for p in head.parameters())
    assert head.linear.bias is not None
    assert PooledLinearHead(3, 5, bias=False).linear.bias is None


def test_head_rejects_bad_input() -> None:
    head = PooledLinearHead(3, 5, bins=(2, 2))
    moments = PooledMoments.of(torch.randn(4, 3, 8, 8), (2, 2))
    target = torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"\[3, 2, 2\].*stage gives \[6, 2, 2\]"):
        head(PooledMoments.of(torch.randn(4, 6, 8, 8), (2, 2)), target)
    with pytest.raises(ValueError, match=r"\[3, 2, 2\].*stage gives \[3, 4, 4\]"):
        head(PooledMoments.of(torch.randn(4, 3, 8, 8), (4, 4)), target)
    with pytest.raises(TypeError, match=r"target has dtype torch\.int32"):
        head(moments, target.int())
    with pytest.raises(ValueError, match=r"target has shape \(4, 5\); allowed: \(4,\)"):
        head(moments, F.one_hot(target, 5))
    with pytest.raises(ValueError, match="must be at least 1"):
        PooledLinearHead(3, 5, bins=0)
    with pytest.raises(ValueError, match="label_smoothing is 2"):
        PooledLinearHead(3, 5, label_smoothing=2)


@pytest.mark.skipif(
    backends.installed() is not None, reason="on CUDA a device-side assertion, which test_head.py plants"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # by the operator, and by PyTorch
@pytest.mark.parametrize("label", [5, -1])
def test_head_rejects_a_target_out_of_range(label: int, dtype: torch.dtype) -> None:
    head = PooledLinearHead(3, 5, bins=(2, 2), dtype=dtype)
    moments = PooledMoments.of(torch.randn(4, 3, 8, 8), (2, 2))
    with pytest.raises(ValueError, match=r"target is out of range.*allowed: 0 to 4"):
        head(moments, torch.tensor([0, 1, 2, label]))


def test_a_head_without_a_forward_is_refused() -> None:
    class Half(LocalHead):
        bins = (1, 1)

    with pytest.raises(TypeError, match=r"abstract method '?forward"):
        Half()


def test_half_precision_heads_do_not_overflow() -> None:
    """The sum over a cell of 112x112 leaves the range of float16, its mean does not."""
    y = torch.full((2, 8, 112, 112), 6.0)
    m1 = y.sum((2, 3), keepdim=True)
    head = PooledLinearHead(8, 10, (1, 1), dtype=torch.float16)
    logits = head(PooledMoments(m1, None, (112, 112))).logits
    torch.testing.assert_close(logits, head.to_modules()(y.half()), rtol=2e-3, atol=2e-3)
