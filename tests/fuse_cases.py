"""Inputs and the criterion of the tests of fuse_, and what counts the calls of the fused operator."""

from __future__ import annotations

import copy
from typing import Any

import fuse_models
import layerwise_ext as lw
import torch
from layerwise_ext.fuse import hooks
from torch import Tensor, nn

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


class Counter:
    """Counts the calls of the fused operator."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        self.calls.append(options)
        return self.function(*args, **options)

    def take(self) -> int:
        count, self.calls = len(self.calls), []
        return count


def batch(n: int = 2, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, all gradients, buffers."""
    x = x.clone().requires_grad_()
    y = model(x)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum(), inputs)
    return [y.detach(), *grads, *(b.clone() for b in model.buffers())]


def same(model: nn.Module, peer: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(step(model, x), step(peer, x), **TOLERANCE)
    assert hooks._thread.innermost.scope is None


def fused_pair(name: str) -> tuple[nn.Module, nn.Module, lw.FuseReport]:
    peer = fuse_models.build(name)
    model = copy.deepcopy(peer)
    return model, peer, lw.fuse_(model)


def small(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *more).double()
