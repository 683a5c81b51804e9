"""Results do not depend on the number of threads, nor on the run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from layerwise_ext import _C, functional
from layerwise_ext._ops import Form
from torch import Tensor


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensors(layout: torch.memory_format, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(8, 64, 32, 30, generator=g).to(dtype).contiguous(memory_format=layout)
    return z, torch.randn(8, 64, 4, 4, generator=g), torch.randn(8, 64, 32, 30, generator=g).to(dtype)


def bn_step(layout: torch.memory_format, dtype: torch.dtype) -> list[Tensor]:
    z, p, g = tensors(layout, dtype)
    z.requires_grad_()
    gamma, beta = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    y, m1, m2 = functional.bn_act_moments(z, weight=gamma, bias=beta, training=True, bins=4)
    ((m1 * p).sum() + (m2 * p).sum() + (y * g).sum()).backward()
    return [y.detach(), m1.detach(), m2.detach(), z.grad, gamma.grad, beta.grad]


def fused_weight_gradient(layout: torch.memory_format, dtype: torch.dtype) -> list[Tensor]:
    """The kernel alone: the library's convolution in front of it is not under test."""
    operators = torch.ops.layerwise_ext
    z, p, _ = tensors(layout, dtype)
    x = (
        torch.randn(8, 32, 32, 30, generator=torch.Generator().manual_seed(1))
        .to(dtype)
        .contiguous(memory_format=layout)
    )
    mean, var = operators.batch_norm_statistics(z)
    rest = (None, None, *Form(bins=[4, 4]), 1000.0, x, torch.empty(64, 32, 3, 3), [1, 1], [1, 1], [1, 1], 1)
    zero = torch.zeros(64)
    return list(
        operators.conv_bn_act_moments_backward(
            z, None, p, None, zero, zero, mean, var, *rest, False, True, False, False
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_bit_identical_over_threads_and_runs(layout: torch.memory_format, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    expected = bn_step(layout, dtype)
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        for actual, value in zip(bn_step(layout, dtype), expected, strict=True):
            assert torch.equal(actual, value)


@pytest.mark.skipif(not _C.cpu_capability().startswith("avx512"), reason="the fused weight gradient needs AVX-512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_weight_gradient_is_bit_identical(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and _C.cpu_capability() != "avx512_bf16":
        pytest.skip("the fused weight gradient of bfloat16 needs AVX512-BF16")
    torch.set_num_threads(1)
    expected = fused_weight_gradient(torch.channels_last, dtype)[1]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(fused_weight_gradient(torch.channels_last, dtype)[1], expected)


def test_same_statistics_and_sums_after_the_convolution() -> None:
    x, w = torch.randn(8, 3, 40, 40), torch.randn(32, 3, 3, 3)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(functional.conv_bn_act_moments(x, w, padding=1, training=True, bins=4))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)
