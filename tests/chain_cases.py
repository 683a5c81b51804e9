"""Networks and the criterion of the tests of chains: a chain against its layers in an nn.Sequential."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layerwise_ext.nn import ConvBNReLU2d, FusedChain, Residual
from torch import Tensor, nn

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def conv3(in_channels: int, out_channels: int, **options: Any) -> ConvBNReLU2d:
    return ConvBNReLU2d(in_channels, out_channels, 3, padding=1, **options)


def basic(in_channels: int, out_channels: int, stride: int = 1) -> Residual:
    shortcut = None
    if stride > 1 or in_channels != out_channels:
        shortcut = ConvBNReLU2d(in_channels, out_channels, 1, stride, activation="identity")
    return Residual(
        conv3(in_channels, out_channels, stride=stride), conv3(out_channels, out_channels), shortcut=shortcut
    )


def bottleneck(channels: int) -> Residual:
    body = ConvBNReLU2d(channels, channels // 2, 1), conv3(channels // 2, channels // 2)
    return Residual(*body, ConvBNReLU2d(channels // 2, channels, 1))


NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "vgg": lambda: [conv3(3, 8), conv3(8, 8), nn.MaxPool2d(2), conv3(8, 12), conv3(12, 6, bias=True)],
    "padding": lambda: [
        conv3(3, 6, padding_mode="reflect"),
        ConvBNReLU2d(6, 6, 3, padding="same", dilation=2, activation="leaky_relu", negative_slope=0.2),
        ConvBNReLU2d(6, 5, 2, padding="same", padding_mode="circular"),
        ConvBNReLU2d(5, 4, (4, 3), padding="same", groups=1, activation="identity"),
    ],
    "pools": lambda: [nn.AvgPool2d(2), conv3(3, 4, groups=1), nn.Identity(), conv3(4, 4, groups=2), nn.AvgPool2d(2)],
    "resnet": lambda: [
        conv3(3, 8),
        basic(8, 8),
        basic(8, 8),
        basic(8, 8),
        basic(8, 12, 2),
        basic(12, 12),
        conv3(12, 4),
    ],
    "bottlenecks": lambda: [conv3(3, 8), bottleneck(8), bottleneck(8), bottleneck(8), nn.MaxPool2d(2), bottleneck(8)],
    "residual first": lambda: [basic(3, 3), nn.Sequential(basic(3, 3), FusedChain(basic(3, 6)))],
    "linear": lambda: [
        conv3(3, 4),
        Residual(conv3(4, 8), conv3(8, 4, activation="identity")),
        Residual(conv3(4, 8), conv3(8, 4, activation="leaky_relu")),
        Residual(conv3(4, 8), conv3(8, 4, activation="identity")),
    ],
    "downsampling": lambda: [
        conv3(3, 8, downsample=("max", 2)),
        Residual(conv3(8, 8), conv3(8, 8, downsample=("avg", (1, 2)))),
        conv3(8, 3, downsample=("space_to_depth", (2, 1))),
        conv3(6, 6, downsample=("stride", (1, 2))),
    ],
    "activations": lambda: [
        conv3(3, 4, activation="prelu"),
        Residual(conv3(4, 8, activation="silu"), conv3(8, 4, activation="prelu")),
        Residual(conv3(4, 8, activation="rrelu"), conv3(8, 4, activation="gelu")),
        conv3(4, 4, activation="tanh"),
    ],
    "nested": lambda: [conv3(3, 4), Residual(basic(4, 4), nn.AvgPool2d(3, 1, 1), conv3(4, 4), shortcut=basic(4, 4))],
}
even_kernel = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def randomise(module: nn.Module) -> nn.Module:
    """Parameters and running statistics away from their initial zeros and ones."""
    with torch.no_grad():
        for t in [*module.parameters(), *module.buffers()]:
            if t.is_floating_point() and t.dim() == 1:
                t.uniform_(0.5, 1.5)
    return module


def pair(net: str | list[nn.Module], dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> Any:
    """The layers in an nn.Sequential, and copies of them in a FusedChain."""
    layers = NETS[net]() if isinstance(net, str) else net
    peer = randomise(nn.Sequential(*layers)).to(dtype=dtype, memory_format=LAYOUTS[layout])
    return peer, FusedChain(*copy.deepcopy(peer))


def images(n: int = 4, size: int = 8, dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> Tensor:
    return torch.randn(n, 3, size, size, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])


def weighted(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()


def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.random.fork_rng(devices=[]):  # the same random slopes for all
        y = module(x)
    weighted(y).backward()
    named = {"output": y.detach(), "gradient of the input": x.grad, **dict(module.named_buffers())}
    return named | {f"gradient of {name}": p.grad for name, p in module.named_parameters()}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Outputs and statistics are the same numbers, gradients agree to ``tolerance`` in their norm."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].stride() == value.stride(), name
        if name.startswith("gradient"):
            difference = (actual[name].double() - value.double()).norm()
            size = value.double().norm()
            limit = tolerance * size + 1e-12
            # A learned slope's gradient is one number, a sum of many that nearly cancel; its terms are of order one.
            if tolerance and value.numel() == 1:
                scale = max(size, 1.0) if value.dtype == torch.float16 else size
                limit += 4 * torch.finfo(value.dtype).eps * scale
            assert difference <= limit, name
        else:
            assert torch.equal(actual[name], value), name


# The backward pass has mean and variance in float32, here as in a layer by itself. The forward pass has them in double,
# so that an activation recomputed from float32 maps may differ from the first one in its last bit.
TOLERANCE = {torch.float64: 0.0, torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-4}


class Plain(nn.Module):
    """A residual block in plain layers."""

    def __init__(self, block: Residual) -> None:
        super().__init__()
        *first, last = block.body
        conv, bn, self.act, *pool = last.to_modules()
        self.pool = nn.Sequential(*pool)
        self.body = nn.Sequential(*map(unfused, first), conv, bn)
        self.shortcut = nn.Identity() if block.shortcut is None else unfused(block.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.body(x) + self.shortcut(x)))


def unfused(module: nn.Module) -> nn.Module:
    if isinstance(module, ConvBNReLU2d):
        return nn.Sequential(*module.to_modules())
    if isinstance(module, Residual):
        return Plain(module)
    return nn.Sequential(*map(unfused, module)) if isinstance(module, nn.Sequential) else module
