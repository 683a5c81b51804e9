"""The convolution in front: every form of it, both ways of its weight gradient, large batches in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layerwise_ext import functional, reference
from operator_cases import DTYPES, LAYOUTS, check, draw, loss_of, off_zero, parameters, quarters
from operator_cases import eager as eager_bn
from torch import Tensor

EPS = 1e-3
HALVES = [torch.bfloat16, torch.float16]

# input, weight, stride, padding, dilation, groups, bins
CONVOLUTIONS: dict[str, Any] = {
    "3x3": ((2, 5, 6, 7), (18, 5, 3, 3), 1, 1, 1, 1, (2, 3)),
    "1x1": ((2, 16, 5, 5), (32, 16, 1, 1), 1, 0, 1, 1, (2, 2)),
    "1x1 of many pixels": ((2, 48, 13, 11), (80, 48, 1, 1), 1, 0, 1, 1, (2, 3)),
    "1x1, stride 2": ((3, 16, 9, 8), (48, 16, 1, 1), 2, 0, 1, 1, (2, 2)),
    "1x1, stride 3x2, dense product": ((3, 80, 10, 7), (64, 80, 1, 1), (3, 2), 0, 1, 1, (2, 2)),
    "1x1, stride 1x2, groups": ((2, 12, 5, 6), (20, 6, 1, 1), (1, 2), 0, 1, 2, (2, 2)),
    "stride 2": ((2, 16, 9, 8), (48, 16, 3, 3), 2, 1, 1, 1, (3, 2)),
    "dilation 2": ((2, 17, 9, 9), (32, 17, 3, 3), 1, 2, 2, 1, (4, 4)),
    "rectangular": ((2, 16, 8, 9), (64, 16, 5, 3), (1, 2), (0, 1), 1, 1, (2, 2)),
    "kernel larger than the map": ((3, 20, 3, 4), (80, 20, 7, 7), 1, 3, 1, 1, (1, 1)),
    "one column": ((2, 16, 9, 1), (32, 16, 3, 3), 1, 1, 1, 1, (2, 1)),
    "wide": ((2, 70, 4, 20), (128, 70, 3, 3), 1, 1, 1, 1, (2, 4)),
    "groups": ((2, 8, 6, 6), (16, 4, 3, 3), 1, 1, 1, 2, (3, 3)),
    "depthwise": ((2, 16, 6, 6), (16, 1, 3, 3), 1, 1, 1, 16, (2, 2)),
    "one input channel": ((3, 1, 8, 8), (32, 1, 3, 3), 1, 1, 1, 1, (4, 4)),
    "no padding": ((2, 24, 7, 7), (96, 24, 3, 3), 1, 0, 1, 1, (5, 5)),
}


def case(name: str, training: bool, conv_bias: bool) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """float64 tensors and the convolution's options; the convolution of these values is exact in every dtype."""
    size, weight_size, stride, padding, dilation, groups, bins = CONVOLUTIONS[name]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    taps = weight_size[1] * weight_size[2] * weight_size[3]

    def make(g: torch.Generator) -> dict[str, Tensor | None]:
        # Few non-zero inputs where many are summed: bfloat16 holds eight bits.
        x = torch.randint(-2, 3, size, generator=g).double() * (torch.rand(size, generator=g) < 12 / taps)
        w = torch.randint(-2, 3, weight_size, generator=g).double()
        b = quarters(weight_size[0], generator=g) if conv_bias else None
        return {"input": x, "conv_weight": w, "conv_bias": b, **parameters(weight_size[0], g)}

    def accept(t: dict[str, Tensor | None]) -> bool:
        z = F.conv2d(t["input"], t["conv_weight"], t["conv_bias"], **options)
        norm = {k: t[k] for k in ("running_mean", "running_var", "weight", "bias")}
        return off_zero(z, norm, training, EPS)

    return draw(make, accept), {**options, "bins": bins}


def eager(
    input: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    **options: Any,
) -> Any:
    norm = {k: options.pop(k) for k in ("running_mean", "running_var", "weight", "bias")}
    z = F.conv2d(
        input, conv_weight, None if conv_bias is None else conv_bias.to(input.dtype), stride, padding, dilation, groups
    )
    return eager_bn(z, norm, options)


def run(
    function: Any, tensors: dict[str, Tensor | None], wrt: set[str], kind: str, weights: Any, options: Any
) -> dict[str, Tensor]:
    leaves = {
        k: None if v is None else v.detach().clone(memory_format=torch.preserve_format) for k, v in tensors.items()
    }
    for k in wrt:
        if leaves[k] is not None:
            leaves[k].requires_grad_()
    outputs = function(**leaves, **options)
    loss_of(outputs, kind, weights).backward()
    results = dict(zip(("y", "m1", "m2"), (t.detach() for t in outputs), strict=True))
    results |= {f"d {k}": leaves[k].grad for k in wrt if leaves[k] is not None}
    return results | {k: leaves[k] for k in ("running_mean", "running_var")}


@pytest.mark.parametrize("kind", ["m1", "y+m1+m2"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_table(name: str, dtype: str, layout: str, training: bool, kind: str) -> None:
    conv_bias = kind == "m1"
    tensors, options = case(name, training, conv_bias)
    activation = "leaky_relu" if conv_bias else "relu"
    options |= {"training": training, "momentum": 0.3, "eps": EPS, "activation": activation, "negative_slope": 0.2}
    t, accumulation = DTYPES[dtype], torch.promote_types(DTYPES[dtype], torch.float32)
    low = {
        k: None
        if v is None
        else v.to(t).contiguous(memory_format=LAYOUTS[layout])
        if v.dim() == 4
        else v.to(accumulation)
        for k, v in tensors.items()
    }
    exact = {k: None if v is None else v.double() for k, v in low.items()}
    generator = torch.Generator().manual_seed(3)
    shape = reference.conv_bn_act_moments(**exact, **options)
    weights = {key: quarters(*part.shape, generator=generator) for key, part in zip("ypq", shape, strict=True)}
    exact = {k: None if v is None else v.double() for k, v in low.items()}  # the call above moved the statistics
    parameters_only = {"conv_weight", "weight", "bias"} | ({"conv_bias"} if conv_bias else set())
    for wrt in (parameters_only, parameters_only | {"input"}):  # a fused weight gradient where it exists, and not
        expected = run(reference.conv_bn_act_moments, exact, wrt, kind, weights, options)
        ours = run(functional.conv_bn_act_moments, low, wrt, kind, weights, options)
        peer = run(eager, low, wrt, kind, weights, options)
        for key, value in expected.items():
            if key == "d conv_bias" and training:  # zero; eager leaves its rounding there
                assert not ours[key].any()
                continue
            check(key, ours[key], value, peer[key])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)], ids=["input", "weight", "both"])
def test_1x1_with_strides_exactly(dtype: str, needs: tuple[bool, bool]) -> None:
    """Few pixels of a view are read; where none is, the gradient of the input is zero."""
    g = torch.Generator().manual_seed(0)
    for inputs, outputs, stride in ((300, 64, (2, 2)), (40, 32, (1, 3)), (5, 18, (4, 2))):
        around = torch.full((3, inputs + 3, 12, 15), float("nan"), dtype=DTYPES[dtype])
        x = around.contiguous(memory_format=torch.channels_last)[:, 1:-2, 2:, 1:-1]
        x.copy_(torch.randint(-1, 2, x.shape, generator=g) * (torch.rand(x.shape, generator=g) < 0.2))
        weight = torch.randint(-1, 2, (outputs, inputs, 1, 1), generator=g).to(DTYPES[dtype])
        leaves = [x.detach().requires_grad_(needs[0]), weight.requires_grad_(needs[1])]
        exact = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
        statistics = (torch.zeros(outputs), torch.ones(outputs))
        if dtype == "float64":
            statistics = (statistics[0].double(), statistics[1].double())
        y = functional.conv_bn_act(*leaves, None, *statistics, stride=stride, activation="identity", eps=0.0)
        expected = F.conv2d(*exact, stride=stride)
        assert expected.abs().max() < 256, "not every value is a bfloat16"
        assert torch.equal(y.double(), expected)
        grad_y = torch.randint(-1, 2, y.shape, generator=g) * (torch.rand(y.shape, generator=g) < 0.2)
        y.backward(grad_y.to(y))
        expected.backward(grad_y.double())
        for ours, value in zip(leaves, exact, strict=True):
            assert value.grad is None or torch.equal(ours.grad.double(), value.grad)


@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "transposed", "every other"])
@pytest.mark.parametrize("needs", [("input",), ("conv_weight",), ("input", "conv_weight")], ids="+".join)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_1x1_under_autocast(dtype: torch.dtype, weight_layout: str, needs: tuple[str, ...]) -> None:
    """A float32 weight under any strides with maps of 16 bits: its gradient has its dtype and strides."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 16, 17, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 40, 1, 1, generator=g)
    if weight_layout == "channels_last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif weight_layout == "transposed":
        weight = torch.randn(40, 64, 1, 1, generator=g).transpose(0, 1)
    elif weight_layout == "every other":
        weight = torch.randn(64, 80, 1, 1, generator=g)[:, ::2]
    tensors = {"input": x, "conv_weight": weight}
    for name in needs:
        tensors[name].requires_grad_()
    with torch.autocast("cpu", dtype):
        y, m1, _ = functional.conv_bn_act_moments(*tensors.values(), training=True, activation="identity", bins=(2, 2))
    weights = torch.randn(y.shape, generator=g)
    leaves = [tensors[name] for name in needs]
    gradients = torch.autograd.grad([y, m1], leaves, [weights.to(dtype), torch.ones_like(m1)])
    exact = {name: t.detach().double().requires_grad_(name in needs) for name, t in tensors.items()}
    exact_y, exact_m1, _ = reference.conv_bn_act_moments(
        *exact.values(), training=True, activation="identity", bins=(2, 2)
    )
    expected = torch.autograd.grad(
        [exact_y, exact_m1], [exact[name] for name in needs], [weights.double(), torch.ones_like(exact_m1)]
    )
    assert (y - exact_y).norm() < 0.01 * exact_y.norm()
    for leaf, gradient, value in zip(leaves, gradients, expected, strict=True):
        assert gradient.dtype == leaf.dtype
        assert (gradient - value).norm() < 0.02 * value.norm()
    if "conv_weight" in needs and weight_layout != "every other":  # which is not dense
        assert gradients[-1].stride() == weight.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_bn_act_is_the_same_without_moments(layout: str) -> None:
    tensors, options = case("3x3", True, True)
    del options["bins"]
    low = {k: None if v is None else v.float() for k, v in tensors.items()}
    low["input"] = low["input"].contiguous(memory_format=LAYOUTS[layout])
    y = functional.conv_bn_act(**low, **options, training=True)
    assert torch.equal(y, functional.conv_bn_act_moments(**low, **options, training=True).y)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_batch_in_pieces(layout: str, training: bool) -> None:
    """From 16 MiB on the convolution goes piece by piece; 7 samples do not divide evenly."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (7, 2, 128, 128), generator=g).float().contiguous(memory_format=LAYOUTS[layout])
    w = torch.randint(-2, 3, (40, 2, 3, 3), generator=g).float()
    assert 7 * 40 * 128 * 128 * 4 > 16 << 20
    tensors = {"input": x, "conv_weight": w, "conv_bias": None, **parameters(40, g)}
    low = {k: None if v is None else v.float() for k, v in tensors.items()}
    options: dict[str, Any] = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "training": training}
    options |= {"bins": (3, 3), "momentum": 0.3, "eps": EPS, "activation": "relu", "negative_slope": 0}
    exact = {k: None if v is None else v.double() for k, v in low.items()}
    norm = {k: exact[k] for k in ("running_mean", "running_var", "weight", "bias")}
    assert off_zero(F.conv2d(exact["input"], exact["conv_weight"], padding=1), norm, training, EPS)
    weights = {key: quarters(7, 40, 3, 3, generator=g) for key in "pq"}
    wrt = {"conv_weight", "weight", "bias"}
    expected = run(reference.conv_bn_act_moments, exact, wrt, "m1+m2", weights, options)
    ours = run(functional.conv_bn_act_moments, low, wrt, "m1+m2", weights, options)
    peer = run(eager, low, wrt, "m1+m2", weights, options)
    for key, value in expected.items():
        check(key, ours[key], value, peer[key])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    w = torch.randn(32, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y, m1, _ = functional.conv_bn_act_moments(x, w, training=True, bins=2)
    assert y.dtype == dtype and m1.dtype == torch.float32
    m1.sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [
    {"padding": 1},
    {"stride": 2, "padding": 1, "activation": "leaky_relu"},
    {"groups": 2, "activation": "identity"},
    {"dilation": 2, "padding": 2, "affine": False},
], ids=str)  # fmt: skip
def test_inference(options: dict[str, Any], dtype: str, layout: str) -> None:
    """Without a gradient to keep, batch norm may be folded into the weights: within roundings of what it replaces."""
    options = dict(options)
    g = torch.Generator().manual_seed(0)
    x = quarters(3, 16, 9, 10, generator=g).contiguous(memory_format=LAYOUTS[layout])
    w = quarters(24, 16 // options.get("groups", 1), 3, 3, generator=g)
    conv_bias = quarters(24, generator=g)
    p = parameters(24, g, affine=options.pop("affine", True))
    peer_options = {key: value for key, value in options.items() if key != "activation"}

    def convert(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(DTYPES[dtype])

    def peer(kind: torch.dtype) -> Tensor:
        low = [t.to(kind) for t in (x, w, conv_bias)]
        z = F.conv2d(*low, **peer_options)
        rest = [None if p[name] is None else p[name].to(torch.promote_types(kind, torch.float32))
                for name in ("running_mean", "running_var", "weight", "bias")]  # fmt: skip
        y = F.batch_norm(z, *rest, False, 0.0, 1e-3)
        return {"relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.01), "identity": lambda t: t}[
            options.get("activation", "relu")
        ](y)

    norm = [p[name] for name in ("running_mean", "running_var", "weight", "bias")]
    with torch.no_grad():
        y, kept = (
            functional.conv_bn_act(convert(x), weight, convert(conv_bias), *norm, eps=1e-3, **options)
            for weight in (convert(w), convert(w).requires_grad_())
        )
    scale = (p["running_var"] + 1e-3).rsqrt() * (1 if p["weight"] is None else p["weight"].abs())
    terms = (F.conv2d(x.abs(), w.abs(), conv_bias.abs(), **peer_options) * scale[:, None, None]).max().item()
    exact = peer(torch.float64)
    check("y", y, exact, peer(DTYPES[dtype]), terms)
    assert torch.equal(y, kept)  # no_grad decides, not the parameters


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_inference_of_large_maps(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Beyond 16 MiB the batch goes through in pieces; the numbers are those of the layer with gradients."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 24, 112, 120, generator=g).to(dtype).contiguous(memory_format=layout)
    w = torch.randn(144, 24, 1, 1, generator=g).to(dtype)
    channels = {name: torch.rand(144, generator=g) + 0.5 for name in ("running_mean", "running_var", "weight", "bias")}
    residual = torch.randn(5, 144, 112, 120, generator=g).to(dtype).contiguous(memory_format=layout)
    bias = torch.randn(144, generator=g).to(dtype)
    for options in ({}, {"residual": residual, "activation": "silu"}, {"downsample": ("max", 2)}):
        with torch.no_grad():
            y = functional.conv_bn_act(x, w, bias, **channels, **options)
        expected = functional.conv_bn_act(x, w.clone().requires_grad_(), bias, **channels, **options).detach()
        assert y.is_contiguous(memory_format=layout)
        tolerance = max(1e-5, 2.56 * torch.finfo(dtype).eps)
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
