"""Losses of features and labels, against the formulas of their papers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from graph_recorder import Recorder
from layerwise_ext import functional, reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CLASSES = 4
# N, D: fewer samples than features, more, as many; one of each
SHAPES = {
    "few samples": (7, 20),
    "many samples": (23, 5),
    "square": (6, 6),
    "one sample": (1, 3),
    "one feature": (5, 1),
}


def make(shape: str = "many samples", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    n, d = SHAPES[shape]
    x = torch.rand(n, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return x, torch.randint(CLASSES, (n,), generator=g)


def run(function: Any, x: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and three times its gradient."""
    x = x.detach().clone().requires_grad_()
    loss = function(x, target, **options)
    (3 * loss).backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def similarity(x: Tensor, target: Tensor) -> Tensor:
    return functional.similarity_matching_loss(x, target, num_classes=CLASSES)


def pair_by_pair(x: Tensor, target: Tensor) -> Tensor:
    """The definition, one pair at a time."""
    terms = []
    for (a, i), (b, j) in itertools.product(zip(x, target.tolist(), strict=True), repeat=2):
        if i == -100 or j == -100:
            continue
        a, b = a - a.mean(), b - b.mean()
        cosine = a @ b / ((a.norm() + 1e-8) * (b.norm() + 1e-8))
        terms.append((cosine - (1 if i == j else -1 / (CLASSES - 1))) ** 2)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_similarity_is_its_definition(shape: str, left_out: bool) -> None:
    x, target = make(shape)
    if left_out:
        target[1::3] = -100
    expected = run(pair_by_pair, x, target)
    torch.testing.assert_close(run(similarity, x, target), expected, rtol=1e-9, atol=1e-12)
    specification = run(reference.similarity_matching_loss, x, target, num_classes=CLASSES)
    torch.testing.assert_close(specification, expected, rtol=1e-6, atol=1e-9)  # the clamp


@pytest.mark.parametrize("shape", ["few samples", "many samples", "square"])
def test_similarity_gradcheck(shape: str) -> None:
    x, target = make(shape)
    target[2] = -100
    assert torch.autograd.gradcheck(lambda x: similarity(x, target), x)
    assert torch.autograd.gradgradcheck(lambda x: similarity(x, target), x)


@pytest.mark.parametrize("size", [(64, 512), (600, 48)])
@pytest.mark.parametrize("noise", [1.0, 0.01])  # classes that are nearly told apart: the loss is a small difference
def test_similarity_in_float32_is_as_exact_as_pytorch(size: tuple[int, int], noise: float) -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.randint(10, size[:1], generator=g)
    centres = torch.randn(10, size[1], generator=g)
    x = (centres[target] + noise * torch.randn(size, generator=g)).abs()
    exact_loss, exact = run(reference.similarity_matching_loss, x.double(), target, num_classes=10)
    loss, gradient = run(functional.similarity_matching_loss, x, target, num_classes=10)
    _, peer = run(reference.similarity_matching_loss, x, target, num_classes=10)
    assert loss.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=0)
    assert (gradient - exact).norm() <= 2 * (peer - exact).norm()


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that an operator makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize(("n", "d"), [(8192, 16), (16, 4096), (64, 64)])
def test_similarity_makes_nothing_larger_than_its_features(n: int, d: int) -> None:
    x, target = torch.rand(n, d), torch.arange(n) % CLASSES
    with Largest() as largest:
        run(similarity, x, target)
    assert largest.numel == n * d


def test_a_sample_without_direction_has_no_gradient() -> None:
    x, target = make()
    with torch.no_grad():
        x[3], x[5] = 0, 2.5
    expected = run(pair_by_pair, x, target)
    loss, gradient = run(similarity, x, target)
    torch.testing.assert_close(loss, expected[0])
    assert not gradient[[3, 5]].any()
    others = [i for i in range(len(x)) if i not in (3, 5)]
    torch.testing.assert_close(gradient[others], expected[1][others])


@pytest.mark.parametrize("shape", ["few samples", "many samples"])
def test_similarity_of_nothing(shape: str) -> None:
    x, target = make(shape)
    loss, gradient = run(similarity, x, torch.full_like(target, -100))
    assert loss.isnan() and not gradient.any()


@pytest.mark.parametrize("shape", ["few samples", "many samples"])
def test_similarity_does_not_wait_for_the_device(shape: str) -> None:
    x, target = make(shape)
    with Recorder():  # it fails at what a CUDA graph cannot hold
        run(similarity, x, target)


@pytest.mark.parametrize("shape", ["few samples", "many samples"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_similarity_compiles(shape: str, backend: str) -> None:
    torch.compiler.reset()
    x, target = make(shape)
    target[0] = -100
    compiled = torch.compile(similarity, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(compiled, x, target), run(similarity, x, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_is_not_rounded_under_autocast(dtype: torch.dtype) -> None:
    x, target = make(dtype=dtype)
    loss, gradient = run(similarity, x, target)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        low = run(similarity, x, target)
    assert torch.equal(low[0], loss) and torch.equal(low[1], gradient)


X, TARGET = torch.ones(4, 6), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"features": X[0]}, ValueError, r"features must have 2 dimensions \[N, D\], got shape \[6\]"),
    ({"features": X.long()}, TypeError, "features must be floating-point, got torch.int64"),
    ({"target": TARGET[:3]}, ValueError, r"target must have shape \[4\], got \[3\]"),
    ({"target": TARGET.int()}, TypeError, "target must be int64, got torch.int32"),
    ({"target": TARGET + 5}, ValueError, "target is out of range.*allowed: 0 to 4, or -100"),
    ({"target": TARGET - 1}, ValueError, "target is out of range.*allowed: 0 to 4, or -100"),
    ({"num_classes": 1}, ValueError, "num_classes must be at least 2, got 1"),
])  # fmt: skip
def test_bad_input_of_similarity(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.similarity_matching_loss(**{"features": X, "target": TARGET, "num_classes": 5, **change})
