"""The small head: pooled linear classifier and cross-entropy from the first moments."""

from __future__ import annotations

from typing import Any

import backends
import pytest
import torch
import torch.nn.functional as F
from layerwise_ext import functional, reference
from layerwise_ext.nn import PooledLinearHead, PooledMoments
from operator_cases import LAYOUTS, check
from torch import Tensor

operators = torch.ops.layerwise_ext
DTYPES = {"float32": torch.float32, "float64": torch.float64}

# N, C, bins, size of the map, classes: one cell and several, cells that overlap, fewer and more than the CUDA kernel
# takes at once, more samples and features than a block has threads
SHAPES = {
    "usual": (12, 16, (2, 2), (8, 8), 10),
    "one of each": (1, 1, (1, 1), (3, 2), 1),
    "overlapping cells": (5, 7, (3, 2), (7, 5), 3),
    "one element per cell": (4, 6, (3, 4), (3, 4), 9),
    "one cell": (9, 33, (1, 1), (5, 5), 17),
    "many samples": (300, 5, (2, 1), (4, 4), 8),
    "many features": (3, 150, (4, 4), (9, 9), 11),
    "many classes": (4, 8, (2, 2), (4, 4), 70),
}


def make(shape: str, dtype: torch.dtype, layout: str, bias: bool = True) -> dict[str, Any]:
    n, c, bins, size, classes = SHAPES[shape]
    g = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g, dtype=torch.float64).to(dtype)

    features = c * bins[0] * bins[1]
    m1 = normal(n, c, *bins).contiguous(memory_format=LAYOUTS[layout])
    target = torch.randint(0, classes, (n,), generator=g)
    return {
        "tensors": [m1, normal(classes, features) * features**-0.5, normal(classes) if bias else None],
        "target": target,
        "size": size,
    }


def run(
    function: Any, case: dict[str, Any], dtype: torch.dtype, smoothing: float, use_logits: bool
) -> dict[str, Tensor]:
    leaves = [
        None if t is None else t.detach().to(dtype).clone(memory_format=torch.preserve_format).requires_grad_()
        for t in case["tensors"]
    ]
    loss, logits = function(*leaves, case["target"], size=case["size"], label_smoothing=smoothing)
    total = loss * 3 + (logits.square().mean() if use_logits else 0)
    total.backward()
    names = ("grad_m1", "grad_weight", "grad_bias")
    gradients = {name: t.grad for name, t in zip(names, leaves, strict=True) if t is not None}
    return {"loss": loss.detach(), "logits": logits.detach()} | gradients


def magnitudes(case: dict[str, Any]) -> dict[str, float]:
    """Of the terms that results are summed from: the rounding of a sum is relative to them (``check``)."""
    m1, weight, bias = (None if t is None else t.double().abs() for t in case["tensors"])
    area = functional.cell_area(case["size"], m1.shape[2:]).double()
    features = (m1 / area).flatten(1)
    logits = (F.linear(features, weight, bias)).max().item()
    return {
        "logits": logits,
        "loss": 3 * logits,
        "grad_m1": 3 * (weight.sum(0).max() / area.min()).item() / m1.shape[0],
        "grad_weight": 3 * features.sum(0).max().item() / m1.shape[0],
        "grad_bias": 3.0,
    }


@pytest.mark.parametrize("use_logits", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(shape: str, dtype: str, layout: str, smoothing: float, use_logits: bool) -> None:
    case = make(shape, DTYPES[dtype], layout, bias=shape != "overlapping cells")
    if shape in ("usual", "many samples"):
        case["target"][::3] = -100
    exact = run(reference.pooled_linear_cross_entropy, case, torch.float64, smoothing, use_logits)
    peer = run(reference.pooled_linear_cross_entropy, case, DTYPES[dtype], smoothing, use_logits)
    ours = run(functional.pooled_linear_cross_entropy, case, DTYPES[dtype], smoothing, use_logits)
    for key, value in ours.items():
        check(key, value, exact[key], peer[key], magnitudes(case)[key])
    assert ours["grad_m1"].stride() == case["tensors"][0].stride() or 1 in case["tensors"][0].shape


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_pytorch(layout: str, smoothing: float) -> None:
    case = make("overlapping cells", torch.float64, layout)
    case["target"][1] = -100
    m1, weight, bias = case["tensors"]
    area = functional.cell_area(case["size"], m1.shape[2:])
    logits = F.linear((m1 / area).flatten(1), weight, bias)
    expected = F.cross_entropy(logits, case["target"], label_smoothing=smoothing), logits
    options = {"size": case["size"], "label_smoothing": smoothing}
    actual = reference.pooled_linear_cross_entropy(m1, weight, bias, case["target"], **options)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("use_logits", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str, use_logits: bool) -> None:
    case = make("overlapping cells", torch.float64, layout)
    case["target"][1] = -100
    tensors = [t.requires_grad_() for t in case["tensors"]]

    def function(m1: Tensor, weight: Tensor, bias: Tensor) -> Any:
        options = {"size": case["size"], "label_smoothing": 0.1}
        loss, logits = functional.pooled_linear_cross_entropy(m1, weight, bias, case["target"], **options)
        return (loss, logits) if use_logits else loss

    assert torch.autograd.gradcheck(function, tensors, check_undefined_grad=False)


def test_opcheck() -> None:
    case = make("usual", torch.float32, "channels_last")
    m1, weight, bias = (t.requires_grad_() for t in case["tensors"])
    forward = operators.pooled_linear_cross_entropy.default
    torch.library.opcheck(forward, (m1, weight, bias, case["target"], list(case["size"]), 0.1))
    gradient, scale = torch.randn(12, 10), torch.tensor(2.0)
    backward = operators.pooled_linear_cross_entropy_backward.default
    m1, weight = m1.detach(), weight.detach()
    torch.library.opcheck(backward, (gradient, scale, m1, weight, list(case["size"]), True, True, True))
    torch.library.opcheck(backward, (gradient, None, m1, weight, list(case["size"]), True, False, False))


def test_only_gradients_that_are_needed() -> None:
    m1, weight, bias = make("usual", torch.float32, "channels_last")["tensors"]
    target = torch.zeros(12, dtype=torch.int64)
    for wanted in (m1, weight, bias):
        wanted.requires_grad_()
        loss, _ = functional.pooled_linear_cross_entropy(m1, weight, bias, target, size=(8, 8))
        (gradient,) = torch.autograd.grad(loss, wanted)
        assert gradient.shape == wanted.shape
        wanted.requires_grad_(False)


def test_all_samples_left_out() -> None:
    """As cross_entropy: the mean of nothing is NaN, and no gradient comes from it."""
    case = make("usual", torch.float32, "contiguous")
    case["target"].fill_(-100)
    results = run(functional.pooled_linear_cross_entropy, case, torch.float32, 0.0, False)
    assert results["loss"].isnan()
    assert all(not results[key].any() for key in ("grad_m1", "grad_weight", "grad_bias"))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_values_out_of_range_propagate_as_in_pytorch(value: float) -> None:
    case = make("usual", torch.float32, "contiguous")
    case["tensors"][0][2, 3] = value
    actual = run(functional.pooled_linear_cross_entropy, case, torch.float32, 0.0, False)
    expected = run(reference.pooled_linear_cross_entropy, case, torch.float32, 0.0, False)
    assert torch.equal(actual["loss"].isfinite(), expected["loss"].isfinite())
    assert actual["grad_weight"].isnan().any() == expected["grad_weight"].isnan().any()


def test_repeated_runs_are_the_same_bits() -> None:
    case = make("many samples", torch.float32, "channels_last")
    first, second = (run(functional.pooled_linear_cross_entropy, case, torch.float32, 0.1, True) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_second_derivative_is_refused() -> None:
    m1, weight, bias = make("usual", torch.float64, "contiguous")["tensors"]
    weight.requires_grad_()
    target = torch.zeros(12, dtype=torch.int64)
    loss, _ = functional.pooled_linear_cross_entropy(m1, weight, bias, target, size=(8, 8))
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


M1, WEIGHT, TARGET = torch.ones(4, 6, 2, 2), torch.ones(5, 24), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(("change", "message"), [
    ({"m1": M1[0]}, r"m1 must have 4 dimensions .* got \[6, 2, 2\]"),
    ({"m1": M1.bfloat16()}, "m1 must be float32 or float64, got BFloat16"),
    ({"weight": WEIGHT[:, :20]}, r"weight must have shape \[classes, 24\].* got \[5, 20\]"),
    ({"weight": WEIGHT.double()}, r"weight must have .* dtype Float, got \[5, 24\], Double"),
    ({"bias": torch.zeros(4)}, r"bias must have shape \[5\] and dtype Float, got \[4\], Float"),
    ({"target": TARGET[:3]}, r"target must have shape \[4\] and dtype Long, got \[3\], Long"),
    ({"target": TARGET.int()}, r"target must have shape \[4\] and dtype Long, got \[4\], Int"),
    ({"target": TARGET + 5}, r"target is out of range"),
    ({"target": TARGET - 1}, r"target is out of range"),
    ({"size": (1, 4)}, r"size must be \(H, W\) of the map, at least \(2, 2\).* got \[1, 4\]"),
    ({"label_smoothing": 1.5}, "label_smoothing must lie between 0 and 1, got 1.5"),
])  # fmt: skip
def test_bad_input(change: dict[str, Any], message: str) -> None:
    if "range" in message and backends.installed() == "cuda":
        pytest.skip("a device-side assertion ends the process's use of the device")
    arguments = {"m1": M1, "weight": WEIGHT, "bias": None, "target": TARGET, "size": (4, 4)} | change
    with pytest.raises(RuntimeError, match=message):
        functional.pooled_linear_cross_entropy(**arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dense", [False, True])
def test_the_layer_uses_it(layout: str, dense: bool) -> None:
    """The fused head and the plain modules it gives back agree, for moments of the operator and of any tensor."""
    torch.manual_seed(0)
    y = torch.randn(6, 8, 7, 5, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout])
    head = PooledLinearHead(8, 10, (3, 2), label_smoothing=0.1, dtype=torch.float64)
    target = torch.tensor([3, -100, 0, 9, 1, 1])
    leaf = y.clone(memory_format=torch.preserve_format).requires_grad_()
    if dense:
        moments = PooledMoments.of(leaf, (3, 2))
    else:
        m1 = functional.bn_act_moments(
            leaf, torch.zeros(8), torch.ones(8), eps=0.0, activation="identity", bins=(3, 2)
        ).m1
        moments = PooledMoments(m1, None, (7, 5))
    logits, loss = head(moments, target)
    assert "pooled_linear_cross_entropy" in type(loss.grad_fn).__name__
    peer = y.clone().requires_grad_()
    expected = head.to_modules()(peer)
    expected_loss = F.cross_entropy(expected, target, label_smoothing=0.1)
    torch.testing.assert_close((logits, loss), (expected, expected_loss))
    actual = torch.autograd.grad(loss, [leaf, *head.parameters()])
    torch.testing.assert_close(actual, torch.autograd.grad(expected_loss, [peer, *head.parameters()]))
