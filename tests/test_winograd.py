"""3x3 convolutions with stride 1 by transformed tiles: no worse than twice eager's own error, whatever the shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolution_cases import compare, eager, fused, step, tensors
from layerwise_ext import _C, functional
from layerwise_ext._ops import Form
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CAPABILITIES = [name for name in _C.cpu_capabilities() if name.startswith("avx512")]
pytestmark = pytest.mark.skipif(not CAPABILITIES, reason="no kernels for this machine's instruction set (AVX-512)")

# N, C_in, C_out, H, W, padding, bins
SHAPES = {
    "edges in both directions": (17, 17, 48, 9, 13, 1, (2, 3)),
    "groups of tiles across samples": (50, 32, 32, 6, 6, 1, (2, 2)),
    "no padding": (13, 24, 32, 18, 15, 0, (1, 1)),
    "padding 2": (4, 40, 80, 30, 31, 2, (4, 4)),
    "two blocks of inputs for the gradient": (13, 130, 64, 16, 16, 1, (4, 4)),
    "long rows in pieces": (2, 16, 16, 8, 300, 1, (1, 5)),
    "weights in slabs": (12, 256, 384, 16, 16, 1, (2, 2)),
    "three vectors": (3, 19, 112, 31, 33, 1, (3, 3)),
    "blocks both ways": (3, 80, 144, 30, 33, 1, (3, 3)),
}


@pytest.mark.parametrize("needs_input", [False, True], ids=["local", "joint"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_table(shape: str, dtype: str, needs_input: bool, capability: str) -> None:
    t = tensors(SHAPES[shape], DTYPES[dtype])
    compare(t, {"training": True, "padding": SHAPES[shape][5], "bins": SHAPES[shape][6]}, needs_input)


def test_it_is_not_the_library() -> None:
    """Otherwise the table would say nothing. bfloat16 differs in few places."""
    t = tensors(SHAPES["edges in both directions"], torch.float32)
    z = torch.ops.layerwise_ext.conv_bn_act_moments(
        t["x"], t["conv_weight"], *([None] * 5), [1, 1], [1, 1], [1, 1], 1, *Form(bins=[1, 1]), True, True
    )[-1]
    assert not torch.equal(z, F.conv2d(t["x"], t["conv_weight"], padding=1))
    torch.testing.assert_close(z, F.conv2d(t["x"], t["conv_weight"], padding=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_on_small_integers(dtype: str) -> None:
    """Integers, and weights that the transformation keeps exact up to a few roundings: an error in one place shows."""
    g = torch.Generator().manual_seed(1)
    for h, w in ((11, 14), (12, 16), (13, 17)):
        x = torch.randint(-2, 3, (16, 16, h, w), generator=g).float().contiguous(memory_format=torch.channels_last)
        weight = torch.randint(-1, 2, (32, 16, 3, 3), generator=g).float()
        options: dict[str, Any] = {"padding": 1, "training": False, "activation": "identity", "eps": 0.0}
        options |= {"running_mean": torch.zeros(32), "running_var": torch.ones(32)}
        y = functional.conv_bn_act(x.to(DTYPES[dtype]), weight.to(DTYPES[dtype]), **options).float()
        expected = F.conv2d(x, weight, padding=1)
        assert expected.abs().max() < 256  # every value is a bfloat16
        assert (y - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype: str) -> None:
    """Strides of every dimension but the channels are the caller's; so is the layout of the weight."""
    shape = (16, 24, 48, 13, 11, 1, (2, 2))
    t = tensors(shape, DTYPES[dtype])
    big = torch.zeros(32, 40, 16, 20).to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    view = big[1::2, 8:32, 2:15, 3:14]
    view.copy_(t["x"])
    options = {"training": True, "padding": 1, "bins": (2, 2)}
    expected = step(fused, t, options, True)
    for weight in (t["conv_weight"], t["conv_weight"].contiguous(memory_format=torch.channels_last)):
        actual = step(fused, {**t, "x": view, "conv_weight": weight}, options, True)
        assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert big[0::2].count_nonzero() == 0


def test_large_mean() -> None:
    compare(tensors((4, 32, 32, 16, 16, 1, (2, 2)), torch.float32, 100.0), {"training": True, "padding": 1, "bins": 2})


def test_eval_mode() -> None:
    t = tensors((4, 32, 32, 15, 16, 1, (2, 2)), torch.float32)
    statistics = {"running_mean": torch.randn(32), "running_var": torch.rand(32) + 0.5}

    def run(function: Any, t: dict[str, Tensor]) -> dict[str, Tensor]:
        moved = {k: v.to(t["p"].dtype) for k, v in statistics.items()}
        return step(function, t, {"training": False, "padding": 1, "bins": 2, **moved})

    expected = run(eager, {k: v.double() for k, v in t.items()})
    for name, value in run(fused, t).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-5, atol=2e-5 * scale)


def test_nan_propagates() -> None:
    t = tensors((4, 32, 32, 16, 16, 1, (2, 2)), torch.float32)
    t["x"][1, 3, 5, 6] = float("nan")
    y = functional.conv_bn_act(t["x"], t["conv_weight"], torch.zeros(32), torch.zeros(32), torch.ones(32), padding=1)
    assert y[1, :, 4:7, 5:8].isnan().all()
    assert not y[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_runs(dtype: str) -> None:
    before = torch.get_num_threads()
    try:
        for shape in ("groups of tiles across samples", "weights in slabs"):
            t = tensors(SHAPES[shape], DTYPES[dtype])
            results = []
            for threads in (1, 2, 2, 3):
                torch.set_num_threads(threads)
                results.append(step(fused, t, {"training": True, "padding": 1, "bins": SHAPES[shape][6]}, True))
            for other in results[1:]:
                assert all(torch.equal(results[0][name], other[name]) for name in other)
    finally:
        torch.set_num_threads(before)
