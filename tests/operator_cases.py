"""Inputs and the criterion of the operator tests.

Values are multiples of a quarter, small enough that a convolution of them is exact in every dtype, and drawn again
until no u lies near zero: the activation's mask is then the same everywhere, and what is compared is arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import backends
import torch
import torch.nn.functional as F
from layerwise_ext import _C, functional, reference
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "float16": torch.float16,
}
CAPABILITIES = [_C.cpu_capability()] if backends.installed() else _C.cpu_capabilities()  # the CUDA code has one
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
MARGIN = 1e-3

# Which of y, m1, m2 the loss looks at.
LOSSES = {"m1": "p", "m2": "q", "m1+m2": "pq", "y": "y", "y+m1": "yp", "y+m1+m2": "ypq"}


def quarters(*shape: int, generator: torch.Generator, limit: int = 8) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=generator).double() / 4


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest expected value."""
    scale = expected.abs().max().item() or 1.0
    return (actual.double() - expected).abs().max().item() / scale


def check(name: str, ours: Tensor, expected: Tensor, peer: Tensor | None, terms: float = 0.0) -> None:
    """At most twice the peer's error against float64, plus a few roundings of the result's own dtype.

    ``terms`` is the sum of the magnitudes that the largest result is summed from. Where they nearly cancel, roundings
    are relative to them, not to what is left: with one channel, a sum of 30 terms can come out a tenth of one.
    """
    scale = expected.abs().max().item() or 1.0
    floor = 8 * torch.finfo(ours.dtype).eps * max(1.0, terms / scale)
    limit = floor + (2 * error(peer, expected) if peer is not None else 0)
    assert ours.shape == expected.shape, name
    assert error(ours, expected) <= limit, f"{name}: error {error(ours, expected):.2e}, allowed {limit:.2e}"


def loss_of(outputs: Any, kind: str, weights: dict[str, Tensor]) -> Tensor:
    """Inner product of (y, m1, m2) with fixed random weights, those parts that `kind` names."""
    parts = {"y": outputs[0], "p": outputs[1], "q": outputs[2]}
    dtype = torch.promote_types(outputs[0].dtype, torch.float32)
    return sum((parts[key].to(dtype) * weights[key].to(dtype)).sum() for key in LOSSES[kind])  # type: ignore[return-value]


def eager(z: Tensor, parameters: dict[str, Tensor | None], options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What a user of plain PyTorch writes."""
    bins, activation = options["bins"], options["activation"]
    y = F.batch_norm(
        z, parameters["running_mean"], parameters["running_var"], parameters["weight"], parameters["bias"],
        options["training"], options["momentum"], options["eps"],
    )  # fmt: skip
    y = {"relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, options["negative_slope"]), "identity": lambda t: t}[
        activation
    ](y)
    area = functional.cell_area(z.shape[2:], bins).to(z.dtype)
    return y, F.adaptive_avg_pool2d(y, bins) * area, F.adaptive_avg_pool2d(y * y, bins) * area


def parameters(channels: int, generator: torch.Generator, affine: bool = True) -> dict[str, Tensor | None]:
    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(channels, generator=generator, dtype=torch.float64)

    return {
        "running_mean": uniform(-0.5, 0.5),
        "running_var": uniform(0.5, 2.0),
        "weight": uniform(0.5, 1.5) * torch.where(torch.rand(channels, generator=generator) < 0.2, -1, 1)
        if affine
        else None,
        "bias": uniform(-0.4, 0.4) if affine else None,
    }


def off_zero(z: Tensor, params: dict[str, Tensor | None], training: bool, eps: float) -> bool:
    mean, var = reference.batch_statistics(z) if training else (params["running_mean"], params["running_var"])
    assert mean is not None and var is not None
    u = (z - mean[:, None, None]) * torch.rsqrt(var + eps)[:, None, None]
    if params["weight"] is not None and params["bias"] is not None:
        u = u * params["weight"][:, None, None] + params["bias"][:, None, None]
    return bool((u.abs() > MARGIN).all())


def draw(make: Callable[[torch.Generator], Any], accept: Callable[[Any], bool]) -> Any:
    """The first draw that `accept` takes."""
    for seed in range(500):
        value = make(torch.Generator().manual_seed(seed))
        if accept(value):
            return value
    raise AssertionError("no draw keeps u off zero")
