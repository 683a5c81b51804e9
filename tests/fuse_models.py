"""Networks in the manner of torchvision, timm and mmcv, a block or two each, for the tests of fuse_."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """torchvision: one ReLU for two calls, in place, and an addition in place."""

    def __init__(self, width: int, stride: int = 1, channels: int | None = None) -> None:
        super().__init__()
        channels = channels or width
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2 * width, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(6), BasicBlock(8, 2, 6))
        self.layer2 = nn.Sequential(Bottleneck(4))
        self.fc = nn.Linear(8, 5)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


def vgg() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(8), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(8, 8, (2, 3), padding="same"), nn.BatchNorm2d(8, momentum=None), nn.Tanh(),
        nn.Conv2d(8, 8, 3), nn.ReLU(),
    )  # fmt: skip
    return nn.Sequential(OrderedDict(features=features, pool=nn.AdaptiveAvgPool2d(1), head=nn.Flatten()))


class ConvNormActivation(nn.Sequential):
    def __init__(self, channels: int, out: int, size: int, groups: int = 1, act: Any = nn.ReLU6) -> None:
        super().__init__(
            nn.Conv2d(channels, out, size, padding=size // 2, groups=groups, bias=False), nn.BatchNorm2d(out)
        )
        if act is not None:
            self.append(act(inplace=True))


class InvertedResidual(nn.Module):
    """MobileNetV2: the convolutions are in a Sequential, the addition is outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            ConvNormActivation(3, 8, 1), ConvNormActivation(8, 8, 3, groups=8),
            nn.Conv2d(8, 3, 1, bias=False), nn.BatchNorm2d(3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, 2, 1)
        self.fc2 = nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(F.silu(self.fc1(F.adaptive_avg_pool2d(x, 1))))) * x


class MBConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            ConvNormActivation(3, 8, 1, act=nn.SiLU), ConvNormActivation(8, 8, 5, 8, nn.SiLU), SqueezeExcitation(8),
            ConvNormActivation(8, 3, 1, act=None),
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        result = self.block(input)
        result += input
        return result


class RegNetBlock(nn.Module):
    """torchvision's ResBottleneckBlock: two batch norms are added."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = ConvNormActivation(3, 8, 1, act=None)
        self.f = nn.Sequential(
            OrderedDict(a=ConvNormActivation(3, 8, 1, act=nn.ReLU), se=SqueezeExcitation(8),
                        c=ConvNormActivation(8, 8, 3, act=None))
        )  # fmt: skip
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.proj(x) + self.f(x))


class DenseLayer(nn.Module):
    """torchvision's _DenseLayer: takes a list of maps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, 8, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        maps = [input] if isinstance(input, Tensor) else input
        bottleneck = self.conv1(self.relu1(self.norm1(torch.cat(maps, 1))))
        return self.conv2(self.relu2(self.norm2(bottleneck)))


class DenseBlock(nn.ModuleDict):
    def __init__(self) -> None:
        super().__init__({f"denselayer{i}": DenseLayer(3 + 4 * i) for i in range(3)})

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.values():
            maps.append(layer(maps))
        return torch.cat(maps, 1)


class BatchNormAct2d(nn.BatchNorm2d):
    """timm: batch norm with the activation inside."""

    def __init__(self, channels: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act(inplace=True) if act is not nn.Identity else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            factor,
            self.eps,
        )
        return self.act(self.drop(x))


class ConvNormAct(nn.Module):
    """timm's; mmcv's ConvModule, too, finds its norm by name."""

    def __init__(self, channels: int, out: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.norm_name = "bn"
        self.add_module(self.norm_name, BatchNormAct2d(out, act))
        self.aa = None

    @property
    def norm(self) -> nn.Module:
        return getattr(self, self.norm_name)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x if self.aa is None else self.aa(x)


class Csp(nn.Module):
    """ConvNormActs whose last has no activation, added before one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(3, 6)
        self.conv2 = ConvNormAct(6, 6, nn.SiLU)
        self.conv3 = ConvNormAct(6, 6, nn.Identity)
        self.attn = nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.conv1(x)
        x = self.attn(self.conv3(self.conv2(shortcut)))
        return self.act(x + shortcut)


class Functional(nn.Module):
    """As many write their ResNets: activations are calls."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, dilation=1)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)])
        self.shortcut = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6, track_running_stats=False))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        out = F.relu(self.bns[0](self.convs[0](x)))
        out = self.bns[1](self.convs[1](out))
        out += self.shortcut(x)
        return F.leaky_relu(out, 0.1) * scale


# Each with how many of its convolutions are fused: now, and how many with activation and addition once the operator
# has all activations and takes a residual.
NETWORKS: dict[str, tuple[Any, int, int, int]] = {
    "resnet": (ResNet, 9, 8, 3),
    "vgg": (vgg, 3, 3, 0),
    "inverted_residual": (InvertedResidual, 3, 2, 1),
    "mbconv": (MBConv, 3, 2, 1),
    "regnet": (RegNetBlock, 3, 2, 1),
    "densenet": (DenseBlock, 3, 3, 0),
    "timm": (Csp, 3, 3, 1),
    "functional": (Functional, 3, 2, 1),
}


def build(name: str) -> nn.Module:
    """In float64, with parameters and running statistics away from zero and one."""
    torch.manual_seed(0)
    model = NETWORKS[name][0]().double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for t in (module.weight, module.running_var):
                    if t is not None:
                        t.uniform_(0.5, 1.5)
                for t in (module.bias, module.running_mean):
                    if t is not None:
                        t.uniform_(-0.5, 0.5)
    return model
