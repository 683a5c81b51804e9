"""What only CUDA kernels do: how threads are laid over a map, wide accesses, 64-bit offsets.

Runs with ``--backend=simt`` or ``--backend=cuda`` only; the CPU's kernels pass it as well, and say nothing by it.
"""

from __future__ import annotations

import backends
import pytest
import torch
from layerwise_ext import functional, reference
from operator_cases import DTYPES, LAYOUTS, check, quarters
from torch import Tensor

pytestmark = pytest.mark.skipif(backends.installed() is None, reason="for --backend=simt and --backend=cuda")

# N, C, H, W, bins: a cell for a warp and for a whole block, channels in several pieces, accesses of 16 bytes and not
SHAPES = {
    "block per cell": (2, 16, 34, 31, (1, 1)),
    "block per cell, overlapping": (1, 64, 35, 33, (2, 2)),
    "two pieces of channels": (2, 264, 5, 6, (2, 2)),
    "three pieces, one short": (2, 600, 5, 4, (1, 1)),
    "single channels": (2, 37, 9, 9, (3, 3)),
    "long rows": (1, 8, 3, 1100, (1, 4)),
    "many samples": (300, 8, 3, 3, (1, 1)),
    "many pixels": (4, 8, 100, 101, (4, 4)),
}


def step(function, z: Tensor, gamma: Tensor, beta: Tensor, weights: dict[str, Tensor], bins) -> dict[str, Tensor]:
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (z, gamma, beta)]
    m = function(leaves[0], weight=leaves[1], bias=leaves[2], training=True, activation="identity", bins=bins)
    parts = zip(m, ("y", "p", "q"), strict=True)
    sum((t * weights[k].to(t.dtype)).sum() for t, k in parts).backward()
    gradients = dict(zip(("dz", "dgamma", "dbeta"), (t.grad for t in leaves), strict=True))
    return dict(zip(("y", "m1", "m2"), (t.detach() for t in m), strict=True)) | gradients


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, dtype: str, layout: str) -> None:
    n, c, h, w, bins = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    z = quarters(n, c, h, w, generator=g).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
    accumulation = torch.promote_types(z.dtype, torch.float32)
    gamma, beta = (quarters(c, generator=g).to(accumulation) for _ in range(2))
    sizes = {"y": (n, c, h, w), "p": (n, c, *bins), "q": (n, c, *bins)}
    weights = {key: quarters(*size, generator=g) for key, size in sizes.items()}
    exact = step(reference.bn_act_moments, z.double(), gamma.double(), beta.double(), weights, bins)
    peer = step(reference.bn_act_moments, z, gamma, beta, weights, bins)
    for key, value in step(functional.bn_act_moments, z, gamma, beta, weights, bins).items():
        check(key, value, exact[key], peer[key])


def test_pointers_that_are_not_aligned() -> None:
    """A map that begins one element behind a 16-byte boundary has the same results, by narrower accesses."""
    values = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    shifted = torch.empty(values.numel() + 1)[1:].as_strided(values.shape, values.stride()).copy_(values)
    assert shifted.data_ptr() % 16 == 4
    for a, b in zip(
        functional.bn_act_moments(values, training=True, bins=2),
        functional.bn_act_moments(shifted, training=True, bins=2),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_values_per_channel_that_are_not_aligned() -> None:
    """Parameters that are views into a buffer (flattened ones, say), and a gradient of the moments that is one."""
    torch.manual_seed(0)
    z = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    values = [torch.rand(8) + 0.5 for _ in range(4)]
    shifted = [torch.empty(9)[1:].copy_(t) for t in values]
    gradient = torch.randn(2, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    moved = torch.empty(gradient.numel() + 1)[1:].as_strided(gradient.shape, gradient.stride()).copy_(gradient)
    results = []
    for per_channel, g in ((values, gradient), (shifted, moved)):
        m = functional.bn_act_moments(z, *per_channel, bins=2)
        results.append((m.y, m.m1, *torch.autograd.grad(m.m1, z, g)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_beyond_31_bits(layout: str) -> None:
    """Samples lie 2**31 elements apart; only the pages that are used take memory."""
    values = torch.randn(2, 8, 3, 4).contiguous(memory_format=LAYOUTS[layout])
    strides = (2**31, *values.stride()[1:])
    far = torch.empty(2**31 + 200, dtype=torch.bfloat16).as_strided(values.shape, strides)
    near = far.copy_(values).contiguous(memory_format=LAYOUTS[layout])
    results = []
    for z in (near, far):
        z = z.detach().requires_grad_()
        m = functional.bn_act_moments(z, training=True, bins=1)
        (gradient,) = torch.autograd.grad(m.m1.square().sum() + m.y.float().square().sum(), z)
        results.append((m.y, m.m1, m.m2, gradient))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
