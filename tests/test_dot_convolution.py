"""Convolutions of small maps by dot products: no worse than twice eager's own error, whatever the shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layerwise_ext import _C, functional
from layerwise_ext._ops import Form
from torch import Tensor

CAPABILITIES = [name for name in _C.cpu_capabilities() if name.startswith("avx512")]
pytestmark = pytest.mark.skipif(not CAPABILITIES, reason="no kernels for this machine's instruction set (AVX-512)")

DTYPES = {  # of the map and of the weight
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16, float32 weight": (torch.bfloat16, torch.float32),
}
# N, C_in, C_out, H, W, kernel, stride, padding, dilation
SHAPES: dict[str, tuple[Any, ...]] = {
    "1x1": (1, 96, 20, 7, 7, 1, 1, 0, 1),
    "1x1 with stride": (3, 64, 12, 9, 7, 1, 2, 0, 1),
    "3x3": (1, 32, 8, 7, 5, 3, 1, 1, 1),
    "3x3 with stride, even size": (2, 32, 16, 8, 10, 3, 2, 1, 1),
    "map smaller than the kernel": (17, 64, 4, 2, 2, 3, 1, 1, 1),
    "kernel that covers the map": (13, 32, 24, 3, 2, (3, 2), 1, 0, 1),
    "dilated rectangle": (2, 32, 8, 9, 8, (2, 3), (1, 2), (0, 3), (3, 2)),
    "one pixel": (1, 64, 8, 1, 1, 1, 1, 0, 1),
    "as many pixels as it takes": (4, 32, 4, 8, 8, 1, 1, 0, 1),
    "padding beyond the kernel": (1, 32, 4, 3, 3, 2, 1, 3, 1),
}


def tensors(shape: tuple[Any, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    n, c_in, c_out, h, w, kernel, *_ = shape
    g = torch.Generator().manual_seed(0)
    rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = torch.randn(n, c_in, h, w, generator=g).to(dtypes[0]).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c_out, c_in, rows, columns, generator=g).to(dtypes[1])
    return x, weight.contiguous(memory_format=torch.channels_last)


def pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def convolution(x: Tensor, weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Tensor:
    geometry = (pair(stride), pair(padding), pair(dilation), 1)
    z = torch.ops.layerwise_ext.conv_bn_act_moments(
        x, weight, *([None] * 5), *geometry, *Form(bins=[1, 1]), False, True
    )[-1]
    assert isinstance(z, Tensor)
    return z


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_table(shape: str, dtype: str, capability: str) -> None:
    x, weight = tensors(SHAPES[shape], DTYPES[dtype])
    geometry = SHAPES[shape][6:]
    z = convolution(x, weight, *geometry)
    rounded = weight.to(x.dtype)
    expected = F.conv2d(x.double(), rounded.double(), None, *geometry)
    eager = F.conv2d(x, rounded, None, *geometry)
    error, allowed = ((actual.double() - expected).norm() / expected.norm() for actual in (z, eager))
    assert z.shape == eager.shape and z.dtype == eager.dtype
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert error <= 2 * allowed + torch.finfo(z.dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_not_the_library(dtype: str) -> None:
    """Otherwise the table would say nothing."""
    if dtype != "float32" and _C.cpu_capability() != "avx512_bf16":
        pytest.skip("this machine does not multiply bfloat16")
    x, weight = tensors((1, 1024, 64, 7, 7, 1), DTYPES[dtype])
    z = convolution(x, weight)
    library = F.conv2d(x, weight.to(x.dtype))
    assert not torch.equal(z, library)
    torch.testing.assert_close(z, library, rtol=1e-4 if dtype == "float32" else 1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_on_small_integers(dtype: str) -> None:
    """An error in one place shows."""
    map_dtype, weight_dtype = DTYPES[dtype]
    g = torch.Generator().manual_seed(1)
    for name, shape in SHAPES.items():
        x, weight = tensors(shape, DTYPES[dtype])
        x = torch.randint(-1, 2, x.shape, generator=g).to(map_dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randint(-1, 2, weight.shape, generator=g).to(weight_dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        expected = F.conv2d(x.float(), weight.float(), None, *shape[6:])
        assert expected.abs().max() < 256, "not every value is a bfloat16"
        assert torch.equal(convolution(x, weight, *shape[6:]).float(), expected), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype: str) -> None:
    """Strides of all dimensions but the channels are the caller's, of map and weight; nothing beside is read."""
    shape = (2, 32, 8, 5, 6, 3, 1, 1, 1)
    x, weight = tensors(shape, DTYPES[dtype])
    around = torch.full((4, 96, 9, 10), float("nan"), dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    view = around[1:3, 32:64, 2:7, 3:9]
    view.copy_(x)
    weights_around = torch.full((10, 64, 5, 4), float("nan"), dtype=weight.dtype)
    weights_around = weights_around.contiguous(memory_format=torch.channels_last)
    weight_view = weights_around[1:9, 16:48, 1:4, 1:4]
    weight_view.copy_(weight)
    assert torch.equal(convolution(view, weight_view, 1, 1), convolution(x, weight, 1, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer(dtype: str) -> None:
    """The whole operator, training and inference, on what this convolution gives."""
    x, weight = tensors((4, 64, 16, 5, 4, 3), DTYPES[dtype])
    weight = weight / 24
    layer: dict[str, Any] = {"padding": 1, "weight": torch.rand(16) + 0.5, "bias": torch.randn(16)}
    running = {"running_mean": torch.zeros(16), "running_var": torch.ones(16)}
    cpu_autocast = torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16)

    def loss_and_gradients(x: Tensor, weight: Tensor, function: Any) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = function(*leaves)
        gradients = torch.autograd.grad((y.to(weight.dtype) * torch.linspace(-1, 1, y.shape[-1])).sum(), leaves)
        return [y, *gradients]

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        z = F.conv2d(x, weight, padding=1)
        return F.batch_norm(z, None, None, layer["weight"].to(z), layer["bias"].to(z), training=True)

    with cpu_autocast:
        actual = loss_and_gradients(
            x, weight, lambda x, w: functional.conv_bn_act(x, w, training=True, activation="identity", **layer)
        )
    expected = loss_and_gradients(x.double(), weight.to(x.dtype).double(), plain)
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).norm() <= (1e-5 if x.dtype == torch.float32 else 2e-2) * e.norm()
    with torch.no_grad(), cpu_autocast:
        y = functional.conv_bn_act(x, weight, activation="identity", eps=0.0, **running, padding=1)
    torch.testing.assert_close(
        y, convolution(x, weight, 1, 1), rtol=1e-6 if y.dtype == torch.float32 else 1e-2, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_runs(dtype: str) -> None:
    before = torch.get_num_threads()
    try:
        x, weight = tensors((5, 512, 52, 7, 7, 3), DTYPES[dtype])
        results = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(convolution(x, weight, 1, 1))
        assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)
