"""Bad input: an error that names the argument, before any work."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from layerwise_ext import _C, functional
from layerwise_ext._ops import Form

Z = torch.randn(2, 4, 5, 6)
W = torch.randn(8, 4, 3, 3)
# What Python checks before the operator is called; the operator's own checks are RuntimeErrors.
VALUE_ERRORS = re.compile(
    "must have 4 dimensions|Expected more than 1 value|must be given|must be an int or two ints|momentum must lie"
)


def documented_error(message: str) -> type[Exception]:
    if "must have the dtype of input" in message:
        return TypeError
    return ValueError if VALUE_ERRORS.search(message) else RuntimeError


@pytest.mark.parametrize(("change", "message"), [
    ({"z": torch.randn(4, 5, 6)}, r"z must have 4 dimensions .* \[4, 5, 6\]"),
    ({"z": torch.randint(0, 5, (2, 4, 5, 6))}, "z must be float32, bfloat16.* or float64, got Long"),
    ({"z": Z.to(torch.complex64)}, "z must be float32"),
    ({"z": torch.empty(0, 4, 5, 6)}, "z must not be empty"),
    ({"z": torch.randn(1, 4, 1, 1)}, "Expected more than 1 value per channel when training"),
    ({"weight": torch.ones(3)}, r"weight must have shape \[4\].* got \[3\]"),
    ({"bias": torch.ones(4, 1)}, r"bias must have shape \[4\]"),
    ({"weight": torch.ones(4, dtype=torch.int64)}, "weight must be float32"),
    ({"running_mean": torch.zeros(4)}, "running_mean and running_var must be given together"),
    ({"running_mean": torch.zeros(5), "running_var": torch.ones(5), "training": False},
     r"running_mean must have shape \[4\]"),
    ({"training": False}, "must be given with training=False"),
    ({"bins": (6, 1)}, r"bins must lie between \(1, 1\) and \(5, 6\).* got \(6, 1\)"),
    ({"bins": (0, 1)}, "bins must lie between"),
    ({"bins": (1, 2, 3)}, "bins must be an int or two ints"),
    ({"momentum": 1.5}, "momentum must lie between 0 and 1, got 1.5"),
    ({"momentum": float("nan")}, "momentum must lie between"),
    ({"eps": -1e-5}, "eps must be at least 0"),
    ({"eps": float("nan")}, "eps must be at least 0"),
    ({"activation": "softmax"}, "activation must be one of .*got 'softmax'"),
    ({"negative_slope": float("inf")}, "negative_slope must be finite"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_bn_act_moments(change: dict[str, Any], message: str) -> None:
    arguments = {"z": Z, "training": True, **change}
    with pytest.raises(documented_error(message), match=message):
        functional.bn_act_moments(**arguments)


@pytest.mark.parametrize(("change", "message"), [
    ({"input": torch.randn(4, 5, 6)}, "input must have 4 dimensions"),
    ({"input": torch.randn(2, 3, 5, 6)}, r"input must have 4 channels .* got shape \[2, 3, 5, 6\]"),
    ({"input": torch.empty(0, 4, 5, 6)}, "input must not be empty"),
    ({"input": torch.randn(1, 4, 3, 3)}, "Expected more than 1 value per channel when training"),
    ({"input": torch.randn(2, 4, 2, 2)}, "smaller than the convolution kernel"),
    ({"input": Z.double()}, "conv_weight must have the dtype of input, torch.float64, got torch.float32"),
    ({"conv_weight": torch.randn(8, 4, 3)}, "conv_weight must have 4 dimensions"),
    ({"conv_bias": torch.randn(3)}, r"conv_bias must have shape \[8\]"),
    ({"weight": torch.randn(3)}, r"weight must have shape \[8\]"),
    ({"groups": 3}, "groups must divide out_channels 8, got 3"),
    ({"stride": 0}, "stride and dilation must be at least 1"),
    ({"padding": (1, -1)}, "padding at least 0"),
    ({"dilation": (1, 1, 1)}, "dilation must be an int or two ints"),
    ({"bins": (4, 1)}, r"bins must lie between \(1, 1\) and \(3, 4\)"),
    ({"activation": "ReLU"}, "activation must be"),
    ({"momentum": -0.1}, "momentum must lie between"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_conv_bn_act_moments(change: dict[str, Any], message: str) -> None:
    arguments = {"input": Z, "conv_weight": W, "training": True, **change}
    with pytest.raises(documented_error(message), match=message):
        functional.conv_bn_act_moments(**arguments)


def test_failure_leaves_running_statistics_alone() -> None:
    mean, var = torch.zeros(4), torch.ones(4)
    with pytest.raises(RuntimeError, match="bins must lie between"):
        functional.bn_act_moments(Z, mean, var, training=True, bins=9)
    assert not mean.any() and bool((var == 1).all())


def test_devices_must_agree() -> None:
    with pytest.raises(RuntimeError, match="weight must be on cpu, as the map is, got meta"):
        functional.bn_act_moments(Z, weight=torch.ones(4, device="meta"), training=True)


def test_capability_must_exist() -> None:
    with pytest.raises(ValueError, match=r"'avx9000' is not available; .*portable"):
        _C.set_cpu_capability("avx9000")


@pytest.mark.cpu_kernels
def test_cache_of_activations() -> None:
    """Large activations come from a pool that keeps them for the next step."""
    limit = _C.cache_limit()
    z = torch.randn(8, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    try:
        _C.empty_cache()
        assert _C.cached_bytes() == 0
        y = functional.bn_act_moments(z, training=True).y
        address = y.data_ptr()
        size = y.numel() * y.element_size()
        kept = y[3]
        del y
        assert _C.cached_bytes() == 0, "a view keeps the memory"
        expected = kept.clone()
        other = functional.bn_act_moments(z + 1, training=True).y
        assert torch.equal(kept, expected) and other.data_ptr() != address
        del kept, other
        assert _C.cached_bytes() >= 2 * size
        assert functional.bn_act_moments(z, training=True).y.data_ptr() != 0
        cached = _C.cached_bytes()
        functional.bn_act_moments(z, training=True)
        assert _C.cached_bytes() == cached, "the second step takes what the first one freed"
        _C.set_cache_limit(0)
        assert _C.cached_bytes() == 0
        functional.bn_act_moments(z, training=True)
        assert _C.cached_bytes() == 0
        with pytest.raises(ValueError, match="cache limit must be at least 0"):
            _C.set_cache_limit(-1)
    finally:
        _C.set_cache_limit(limit)


def test_moment_gradients_need_bins() -> None:
    mean, sums = torch.zeros(4), torch.zeros(0)
    with pytest.raises(RuntimeError, match="must not be given without bins"):
        torch.ops.layerwise_ext.bn_act_moments_backward_sums(
            Z, None, torch.tensor(0.0), None, sums, mean, mean, None, None, *Form()
        )


@pytest.mark.parametrize("shape", [(4, 32, 0, 1), (0, 32, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_empty_weight(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x, weight = (t.contiguous(memory_format=layout) for t in (torch.randn(1, 32, 4, 4), torch.empty(shape)))
    with pytest.raises(RuntimeError, match="conv_weight must not be empty, got shape"):
        functional.conv_bn_act(x, weight, training=True)


def test_something_must_be_wanted() -> None:
    z = torch.randn(2, 16, 4, 4)
    with pytest.raises(RuntimeError, match="needs_y=False needs bins"):
        torch.ops.layerwise_ext.bn_act_moments(z, *([None] * 4), *Form(), False, False)
