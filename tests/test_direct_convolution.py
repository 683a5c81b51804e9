"""Direct convolutions of bfloat16 maps: no worse than twice eager's own error, whatever the shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolution_cases import compare, tensors
from layerwise_ext import _C, functional
from layerwise_ext._ops import Form
from torch import Tensor

# On processors that do not multiply bfloat16 the same tests hold the library's convolution to them.
HERE = "avx512_bf16" in _C.cpu_capabilities()
needs_kernel = pytest.mark.skipif(not HERE, reason="no kernel for this machine (AVX-512 with bfloat16)")

# N, C_in, C_out, H, W, padding, bins, kernel, stride
SHAPES: dict[str, tuple[Any, ...]] = {
    "images": (5, 3, 64, 11, 13, 1, (2, 3), (3, 3), 1),
    "stem": (3, 3, 64, 29, 30, 3, (4, 4), (7, 7), 2),
    "two channels": (40, 2, 16, 12, 10, 0, (1, 1), (5, 5), 1),
    "narrow": (9, 16, 16, 17, 19, 1, (2, 2), (3, 3), 1),
    "odd channels": (7, 13, 48, 9, 9, 1, (3, 3), (3, 3), 1),
    "stride 2, two blocks": (4, 64, 128, 15, 14, 1, (2, 2), (3, 3), 2),
    "a block of 64 and one of 32": (5, 20, 96, 14, 16, 1, (2, 2), (3, 3), 2),
    "stride beyond the kernel": (6, 40, 32, 18, 17, 0, (2, 2), (1, 1), 3),
    "rectangles": (8, 10, 32, 13, 17, (2, 1), (3, 2), (2, 5), (1, 2)),
    "padding beyond the kernel": (30, 6, 16, 5, 4, 3, (2, 2), (2, 2), 1),
    "long rows, statistics of many blocks": (1, 4, 16, 3, 1100, 1, (1, 4), (3, 3), 1),
    "tall, groups of rows": (2, 24, 16, 700, 3, 1, (5, 1), (3, 3), 1),
    "one column": (90, 8, 32, 7, 1, 1, (1, 1), (3, 3), 1),
}


def pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def convolution(x: Tensor, weight: Tensor, padding: Any, stride: Any) -> Tensor:
    z = torch.ops.layerwise_ext.conv_bn_act_moments(
        x, weight, *([None] * 5), pair(stride), pair(padding), [1, 1], 1, *Form(bins=[1, 1]), False, True
    )[-1]
    assert isinstance(z, Tensor)
    return z


@pytest.mark.parametrize("needs_input", [False, True], ids=["local", "joint"])
@pytest.mark.parametrize("shape", SHAPES)
def test_table(shape: str, needs_input: bool) -> None:
    *case, stride = SHAPES[shape]
    t = tensors(tuple(case), torch.bfloat16)
    compare(t, {"training": True, "padding": case[5], "bins": case[6], "stride": stride}, needs_input)


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_on_small_integers(shape: str) -> None:
    """An error in one place shows."""
    *case, stride = SHAPES[shape]
    t = tensors(tuple(case), torch.bfloat16)
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-1, 2, t["x"].shape, generator=g).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-1, 2, t["conv_weight"].shape, generator=g).bfloat16()
    expected = F.conv2d(x.float(), weight.float(), None, stride, case[5])
    assert expected.abs().max() < 256, "not every value is a bfloat16"
    assert torch.equal(convolution(x, weight, case[5], stride).float(), expected)


@needs_kernel
def test_which_convolutions_it_takes() -> None:
    """Its results are the library's but for the last bit of few values, which hardly tells the two apart."""
    for channels, inputs in ((64, 3), (16, 16), (64, 64), (48, 2)):
        assert _C.has_convolution(8, channels, 32, 32, inputs, bfloat16=True)
    assert not _C.has_convolution(8, 24, 32, 32, 3, bfloat16=True)
    assert not _C.has_convolution(8, 64, 32, 32, 3, bfloat16=False)


def test_views() -> None:
    """Strides of every dimension but the channels are the caller's, as is the layout of the weight; nothing beside is
    read."""
    t = tensors((6, 10, 32, 9, 7, 1, (1, 1)), torch.bfloat16)
    around = torch.full((14, 24, 12, 11), float("nan"), dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    view = around[1:13:2, 5:15, 2:11, 3:10]
    view.copy_(t["x"])
    weights_around = torch.full((34, 12, 5, 4), float("nan"), dtype=torch.bfloat16)
    weight_view = weights_around[1:33, 1:11, 1:4, 0:3]
    weight_view.copy_(t["conv_weight"])
    for stride in (1, 2):
        expected = convolution(t["x"], t["conv_weight"], 1, stride)
        assert expected.isfinite().all()
        for weight in (weight_view, t["conv_weight"].contiguous(memory_format=torch.channels_last)):
            assert torch.equal(convolution(view, weight, 1, stride), expected)


def test_infinity_stays_in_its_window() -> None:
    """A pair of an odd number of values is not filled with its neighbour."""
    t = tensors((4, 3, 16, 8, 9, 1, (1, 1)), torch.bfloat16)
    t["x"][1, 0, 4, 5] = float("inf")
    z = convolution(t["x"], t["conv_weight"], 1, 1)
    finite = z.isfinite()
    assert not finite[1, :, 3:6, 4:7].any()
    finite[1, :, 3:6, 4:7] = True
    assert finite.all()


def test_threads_and_runs() -> None:
    before = torch.get_num_threads()
    try:
        for shape in ("narrow", "stem"):
            *case, stride = SHAPES[shape]
            t = tensors((32, *case[1:]), torch.bfloat16)
            results = []
            for threads in (1, 2, 2, 3):
                torch.set_num_threads(threads)
                results.append(convolution(t["x"], t["conv_weight"], case[5], stride))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


POOLS = {"max": F.max_pool2d, "avg": F.avg_pool2d, "space_to_depth": F.pixel_unshuffle}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["residual", "input and residual", "max", "avg", "space_to_depth"])
def test_weight_gradient_of_a_written_gradient(form: str, dtype: torch.dtype) -> None:
    """Where dz is written for somebody else, the weight gradient reads it; by tiles and without."""
    g = torch.Generator().manual_seed(0)
    for channels, size, kernel, stride in ((32, 16, 3, 1), (32, 12, 3, 2), (48, 9, 1, 1)):
        if form == "space_to_depth" and (size - 1) // stride % 2 == 0:
            size += 1
        x = torch.randn(14, 24, size, size, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = (torch.randn(channels, 24, kernel, kernel, generator=g) / (5 * kernel)).to(dtype)
        out = (size - 1) // stride + 1
        residual = torch.randn(14, channels, out, out, generator=g).to(dtype)
        residual = residual.contiguous(memory_format=torch.channels_last)

        def plain(x: Tensor, weight: Tensor, residual: Tensor, kernel: int = kernel, stride: int = stride) -> Tensor:
            z = F.conv2d(x, weight, None, stride, kernel // 2)
            u = F.batch_norm(z, None, None, training=True)
            return POOLS[form](u, 2) if form in POOLS else u + residual

        def fused(x: Tensor, weight: Tensor, residual: Tensor, kernel: int = kernel, stride: int = stride) -> Tensor:
            options: dict[str, Any] = {"downsample": (form, 2)} if form in POOLS else {"residual": residual}
            y: Tensor = functional.conv_bn_act(
                x, weight, stride=stride, padding=kernel // 2, training=True, activation="identity", **options
            )
            return y

        def gradients(function: Any, *tensors: Tensor) -> list[Tensor]:
            leaves = [t.detach().requires_grad_() for t in tensors]
            y = function(*(leaves if form != "residual" else [leaves[0].detach(), *leaves[1:]]))
            direction = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y)
            wanted = leaves[1:2] if form in POOLS else leaves[1:] if form == "residual" else leaves
            return list(torch.autograd.grad((y * direction).sum(), wanted))

        exact = gradients(plain, *(t.double() for t in (x, weight, residual)))
        eager = gradients(plain, x, weight, residual)
        for ours, theirs, expected in zip(gradients(fused, x, weight, residual), eager, exact, strict=True):
            error, allowed = ((t.double() - expected).norm() / expected.norm() for t in (ours, theirs))
            assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps
