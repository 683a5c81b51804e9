"""Joint training steps of whole networks, by this package and its peers: the same parameters, input and loss for all.

A network is a chain of layers (convolution without bias, batch norm, ReLU), 2x2 max-pools and residual blocks for
images of 32x32 with three channels, then average pooling over the whole map, a linear layer and cross-entropy to 10
classes. A step is forward, loss, backward, and the gradients of all parameters; no optimizer.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from peers import COMPILE, EAGER, OURS, TrainingStep, use_channels_last
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NUM_CLASSES = 10
IMAGE_SIZE = 32

# The chain whose layers or blocks before the last index are run again, in parts that begin at the others; that in so
# many segments, all but the last run again.
SEGMENTS = ("again:2", "again:3,5", "segments:8", "segments:all")
CHAINS = (OURS, *SEGMENTS)
LAYERS = "layers"  # this package's layers one by one, without a chain
CHECKPOINTS = ("checkpoint:1", "checkpoint:2", "checkpoint:4")  # eager, that many layers or blocks to a segment
STEPS = (*CHAINS, LAYERS, EAGER, COMPILE, *CHECKPOINTS)

# Output channels in multiples of the width: of a layer, and (kind, channels, stride) of a block; "M" is a max-pool.
Item = int | str | tuple[str, int, int]


def _residual(kind: str, blocks: Sequence[int], expansion: int) -> tuple[Item, ...]:
    """Stem and four stages, each but the first with stride 2 and twice the channels."""
    items: list[Item] = [1]
    for stage, count in enumerate(blocks):
        strides = [1 if stage == 0 else 2] + [1] * (count - 1)
        items += [(kind, expansion * 2**stage, stride) for stride in strides]
    return tuple(items)


NETWORKS: dict[str, tuple[Item, ...]] = {
    "vgg16": (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8),  # Simonyan & Zisserman 2014, arXiv 1409.1556
    "resnet18": _residual("basic", (2, 2, 2, 2), 1),  # He et al. 2016, arXiv 1512.03385, with a stem for small images
    "resnet50": _residual("bottleneck", (3, 4, 6, 3), 4),
    "resnet20": _residual("basic", (3, 3, 3), 1),  # width 16
}


class Case(NamedTuple):
    """One row of the benchmark."""

    network: str
    batch: int
    width: int = 64

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads ``NETWORK,BATCH[,WIDTH]``."""
        network, *numbers = text.split(",")
        if network not in NETWORKS or len(numbers) not in (1, 2) or not all(n.isdecimal() and int(n) for n in numbers):
            raise ValueError(
                f"case must be NETWORK,BATCH[,WIDTH] with a network of {', '.join(NETWORKS)} and positive integers, "
                f"got {text!r}"
            )
        return cls(network, *map(int, numbers))

    def __str__(self) -> str:
        return f"{self.network} {self.batch}" + (f" width {self.width}" if self.width != 64 else "")


CASES = (Case("vgg16", 128), Case("resnet18", 128), Case("resnet50", 32), Case("resnet20", 128, 16))


# -- Networks ----------------------------------------------------------------------------------------------------------


def layer(in_channels: int, out_channels: int, kernel: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *([nn.ReLU(inplace=True)] if relu else []))


class Block(nn.Module):
    """Residual block as in torchvision: the sum and its ReLU in place."""

    def __init__(self, kind: str, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        inner = out_channels if kind == "basic" else out_channels // 4
        first = layer(in_channels, inner, 3, stride) if kind == "basic" else layer(in_channels, inner, 1)
        middle = [] if kind == "basic" else [layer(inner, inner, 3, stride)]
        self.body = nn.Sequential(first, *middle, layer(inner, out_channels, 3 if kind == "basic" else 1, relu=False))
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = layer(in_channels, out_channels, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        y += x if self.shortcut is None else self.shortcut(x)
        return F.relu(y, inplace=True)


def eager_network(case: Case, seed: int = 0) -> nn.Sequential:
    """``features`` and ``head``; batch norm is not at its initial ones and zeros, where errors would not show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        channels = 3
        for item in NETWORKS[case.network]:
            if item == "M":
                modules.append(nn.MaxPool2d(2))
                continue
            kind, multiple, stride = item if isinstance(item, tuple) else ("", int(item), 1)
            out_channels = multiple * case.width
            modules.append(Block(kind, channels, out_channels, stride) if kind else layer(channels, out_channels, 3))
            channels = out_channels
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, NUM_CLASSES))
        network = nn.Sequential(nn.Sequential(*modules), head)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.normal_(module.bias, std=0.2)
    return network


def _fused(module: nn.Module) -> nn.Module:
    """The same module in layers of this package, with its parameters."""
    import layerwise_ext as lw  # here, so that the peers run in processes that have not loaded the package

    if isinstance(module, Block):
        *first, (conv, bn) = module.body
        last = lw.nn.ConvBNReLU2d.from_modules(conv, bn, nn.ReLU())  # the ReLU behind the sum
        return lw.nn.Residual(*map(_fused, first), last, shortcut=module.shortcut and _fused(module.shortcut))
    if isinstance(module, nn.Sequential):
        return lw.nn.ConvBNReLU2d.from_modules(*module)
    return module


def _fused_features(features: nn.Sequential) -> list[nn.Module]:
    """Each pool belongs to the layer before it."""
    fused: list[nn.Module] = []
    for module in features:
        if isinstance(module, nn.MaxPool2d):
            fused[-1].downsample = ("max", 2)
        else:
            fused.append(_fused(module))
    return fused


def _segments(modules: Sequence[nn.Module], count: int) -> Iterator[nn.Module]:
    """That many layers or blocks each; a pool belongs to the segment before it."""
    starts = [i for i, module in enumerate(modules) if not isinstance(module, nn.MaxPool2d)][::count]
    for start, end in itertools.pairwise([*starts, len(modules)]):
        yield nn.Sequential(*modules[start:end])


def _chain_segments(name: str, children: int) -> int | tuple[int, ...]:
    """The argument of a FusedChain."""
    kind, _, number = name.partition(":")
    if kind == "again":
        return tuple(map(int, number.split(",")))
    return children if number == "all" else min(int(number or 1), children)


class Checkpointed(nn.Module):
    """``features`` in segments whose inputs alone are kept (torch.utils.checkpoint)."""

    def __init__(self, features: nn.Sequential, count: int) -> None:
        super().__init__()
        self.features = features
        self.segments = list(_segments(list(features), count))  # not registered: the parameters are those of features

    def forward(self, x: Tensor) -> Tensor:
        for segment in self.segments:
            x = checkpoint(segment, x, use_reentrant=False, preserve_rng_state=False)
        return x


# -- Steps -------------------------------------------------------------------------------------------------------------


def inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32], float32, channels_last, and targets [N]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    target = torch.randint(0, NUM_CLASSES, (case.batch,), generator=generator)
    return x.to(device).contiguous(memory_format=torch.channels_last), target.to(device)


def training_step(name: str, case: Case, dtype: torch.dtype, x: Tensor, target: Tensor) -> TrainingStep:
    """The step of contestant ``name``; bfloat16 is autocast, any other dtype that of parameters and input.

    All start from the same parameters; those of the module come in the same order for every contestant.
    """
    network = eager_network(case).to(x.device)
    features, head = network
    forward: Callable[[Tensor], Tensor] = network
    if name in (OURS, *SEGMENTS, LAYERS):
        import layerwise_ext as lw

        fused = _fused_features(features)
        chain = nn.Sequential(*fused)
        if name != LAYERS:
            chain = lw.nn.FusedChain(*fused, segments=_chain_segments(name, len(fused)))
        network = nn.Sequential(chain, head)
        forward = network
    elif name in CHECKPOINTS:
        network = nn.Sequential(Checkpointed(features, int(name.partition(":")[2])), head)
        forward = network
    elif name == COMPILE:
        forward = torch.compile(network, dynamic=False)
    elif name != EAGER:
        raise ValueError(f"unknown contestant {name!r}, choose from {', '.join(STEPS)}")
    use_channels_last(network)
    autocast = dtype == torch.bfloat16
    if not autocast:
        network.to(dtype)
        x = x.to(dtype)

    def loss() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            value = F.cross_entropy(forward(x), target)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def run() -> None:
        loss()

    def drop_gradients() -> None:
        for parameter in network.parameters():
            parameter.grad = None

    return TrainingStep(run, drop_gradients, network, loss)


def reference_step(case: Case, x: Tensor, target: Tensor) -> list[Tensor]:
    """Loss and gradients of eager PyTorch in float64."""
    return outcome(training_step(EAGER, case, torch.float64, x, target))


def outcome(step: TrainingStep) -> list[Tensor]:
    """Loss and gradients of one step, in float64; the running statistics are put back."""
    state = copy.deepcopy(step.module.state_dict())
    step.prepare()
    results = [step.loss().double(), *(p.grad.double() for p in step.module.parameters() if p.grad is not None)]
    step.prepare()
    step.module.load_state_dict(state)
    return results
