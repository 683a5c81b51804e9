"""What the tests of this package's own convolutions share: an operator's step against eager PyTorch's and float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from layerwise_ext import functional
from torch import Tensor


def tensors(shape: tuple[Any, ...], dtype: torch.dtype, offset: float = 0.0) -> dict[str, Tensor]:
    """Of ``N, C_in, C_out, H, W, padding, bins[, kernel]``."""
    n, c_in, c_out, h, w, _, bins, *rest = shape
    rows, columns = rest[0] if rest else (3, 3)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, c_in, h, w, generator=g) + offset
    weight = torch.randn(c_out, c_in, rows, columns, generator=g) / (rows * columns * c_in) ** 0.5
    return {
        "x": x.to(dtype).contiguous(memory_format=torch.channels_last),
        "conv_weight": weight.to(dtype),
        "weight": torch.rand(c_out, generator=g) + 0.5,
        "bias": torch.randn(c_out, generator=g),
        "p": torch.randn(n, c_out, *bins, generator=g),
    }


def fused(x: Tensor, conv_weight: Tensor, weight: Tensor, bias: Tensor, options: dict[str, Any]) -> Any:
    # The identity has no mask, so nothing but arithmetic differs.
    return functional.conv_bn_act_moments(x, conv_weight, weight=weight, bias=bias, activation="identity", **options)


def eager(x: Tensor, conv_weight: Tensor, weight: Tensor, bias: Tensor, options: dict[str, Any]) -> Any:
    z = F.conv2d(x, conv_weight, stride=options.get("stride", 1), padding=options["padding"])
    y = F.batch_norm(z, options.get("running_mean"), options.get("running_var"), weight, bias, options["training"])
    area = functional.cell_area(z.shape[2:], options["bins"]).to(z.dtype)
    return y, F.adaptive_avg_pool2d(y, options["bins"]) * area


def step(function: Any, t: dict[str, Tensor], options: dict[str, Any], needs_input: bool = False) -> dict[str, Tensor]:
    names = (*(["x"] if needs_input else []), "conv_weight", "weight", "bias")
    leaves = {k: t[k].detach().requires_grad_() for k in names}
    y, m1, *_ = function(*({**t, **leaves}[k] for k in ("x", "conv_weight", "weight", "bias")), options)
    (m1 * t["p"].to(m1.dtype)).sum().backward()
    return {"y": y.detach(), "m1": m1.detach(), **{f"d {k}": v.grad for k, v in leaves.items()}}


def compare(t: dict[str, Tensor], options: dict[str, Any], needs_input: bool = False) -> None:
    expected = step(eager, {k: v.double() for k, v in t.items()}, options, needs_input)
    ours, peer = step(fused, t, options, needs_input), step(eager, t, options, needs_input)
    for name, value in expected.items():
        error, allowed = (((a.double() - value).norm() / value.norm()).item() for a in (ours[name], peer[name]))
        allowed = 2 * allowed + torch.finfo(ours[name].dtype).eps
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
