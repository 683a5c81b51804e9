"""Local heads and, for each, a few lines of plain PyTorch on the map itself; shared by the tests of heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from graph_recorder import Recorder, recorded_graphs  # noqa: F401  # a fixture
from layerwise_ext import functional
from layerwise_ext.nn import (
    ContrastiveHead,
    ConvBNReLU2d,
    ConvHead,
    FunctionHead,
    GoodnessHead,
    InfoProHead,
    LocalHead,
    LocalStage,
    MLPSRHead,
    ModuleHead,
    PooledMoments,
    PredSimHead,
    ReconstructionHead,
    SimilarityHead,
)
from torch import Tensor, nn

N, C, CLASSES = 9, 6, 3
TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}


# -- What the heads compute, from the map y ----------------------------------------------------------------------------


def std(y: Tensor) -> Tensor:
    return y.flatten(2).std(2) if y.shape[2] * y.shape[3] > 1 else y.flatten(1)


def match(features: Tensor, target: Tensor) -> Tensor:
    features, target = features[target != -100], target[target != -100]
    x = features - features.mean(1, keepdim=True)
    x = x / (x.norm(dim=1, keepdim=True) + 1e-8)
    wanted = torch.where(target[:, None] == target, 1, torch.tensor(-1 / (CLASSES - 1), dtype=torch.float64))
    return (x @ x.T - wanted).square().mean()


def similarity(head: Any, y: Tensor, target: Tensor) -> Tensor:
    return match(std(y), target)


def projected(head: Any, y: Tensor, target: Tensor) -> Tensor:
    return match(std(F.conv2d(y, head.projection.weight, padding=1)), target)


def pred(head: Any, y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(head.linear(F.adaptive_avg_pool2d(y, head.bins).flatten(1)), target)


def predsim(head: Any, y: Tensor, target: Tensor) -> Tensor:
    sim = projected if head.sim.projection is not None else similarity
    return 0.25 * pred(head.pred, y, target) + 0.75 * sim(head.sim, y, target)


def goodness(head: Any, y: Tensor, target: Tensor) -> Tensor:
    z = y.square().mean((1, 2, 3)) - head.threshold
    sign = torch.where(target == 1, -1, 1)
    return F.softplus(sign * z)[target != -100].mean()


def contrastive(head: Any, y: Tensor, target: Tensor) -> Tensor:
    x = F.adaptive_avg_pool2d(y, head.bins).flatten(1)
    if head.first is not None:
        x = head.second(F.relu(head.first(x)))
    x, labels = F.normalize(x)[target != -100], target[target != -100]
    losses = []
    for i in range(len(x)):
        cosines = x @ x[i] / head.temperature
        partners = [j for j in range(len(x)) if j != i and labels[j] == labels[i]]
        others = cosines[torch.arange(len(x)) != i]
        if partners:
            losses.append(torch.stack([others.exp().sum().log() - cosines[j] for j in partners]).mean())
    return torch.stack(losses).mean()


def normalised(x: Tensor, norm: Any) -> Tensor:
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)


def conv(head: Any, y: Tensor, target: Tensor) -> Tensor:
    for layer in head.layers:
        y = F.relu(normalised(F.conv2d(y, layer.conv.weight, padding=1), layer.bn))
    norm, _, linear = head.output
    return F.cross_entropy(linear(normalised(F.adaptive_avg_pool2d(y, 2), norm).flatten(1)), target)


def mlp_sr(head: Any, y: Tensor, target: Tensor) -> Tensor:
    y = F.avg_pool2d(y, 4)
    *convolutions, _, _ = head.layers[:5]
    for layer in convolutions:
        y = F.relu(normalised(torch.einsum("nchw,kc->nkhw", y, layer.conv.weight[:, :, 0, 0]), layer.bn))
    x = F.adaptive_avg_pool2d(y, 2).flatten(1)
    for i in (5, 8, 11):
        x = F.relu(normalised(head.layers[i](x), head.layers[i + 1]))
    return F.cross_entropy(head.layers[14](x), target)


def module(head: Any, y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(head.module[2](F.adaptive_avg_pool2d(y, 2).flatten(1)), target)


def reconstruction(head: Any, y: Tensor, target: Tensor) -> Tensor:
    first, second = head.decoder
    hidden = F.relu(normalised(F.conv2d(y, first.conv.weight, padding=1), first.bn))
    decoded, image = F.conv2d(hidden, second.weight, second.bias, padding=1), images(n=len(y))
    if head.loss == "mse":
        return (decoded - image).square().mean()
    return F.binary_cross_entropy(decoded.sigmoid(), (image * head.std + head.mean).clamp(0, 1))


def infopro(head: Any, y: Tensor, target: Tensor) -> Tensor:
    x = F.relu(normalised(F.conv2d(y, head.conv.conv.weight, padding=1), head.conv.bn)).mean((2, 3))
    first, _, second = head.projection
    x = second(F.relu(first(x)))
    if head.task == "softmax":
        task = F.cross_entropy(x, target, label_smoothing=head.label_smoothing)
    else:
        task = functional.supervised_contrastive_loss(x, target, temperature=head.temperature)
    return 0.3 * reconstruction(head.reconstruction, y, target) + 0.7 * task


def norm_ratio(moments: PooledMoments, target: Tensor) -> Tensor:
    return (moments.m1.square().sum() / moments.m2.sum()) + (moments.std[..., 0, 0] * target[:, None]).mean()


def norm_ratio_of_map(head: Any, y: Tensor, target: Tensor) -> Tensor:
    cells = [part for rows in y.chunk(2, 2) for part in rows.chunk(2, 3)]
    m1 = torch.stack([cell.sum((2, 3)) for cell in cells])
    return m1.square().sum() / y.square().sum() + (std(cells[0]) * target[:, None]).mean()


Make = Callable[[], LocalHead]
Peer = Callable[[Any, Tensor, Tensor], Tensor]
DOUBLE = {"dtype": torch.float64}
HEADS: dict[str, tuple[Make, Peer]] = {
    "similarity": (lambda: SimilarityHead(C, CLASSES), similarity),
    "similarity, projected": (lambda: SimilarityHead(C, CLASSES, project=True, **DOUBLE), projected),
    "predsim": (lambda: PredSimHead(C, CLASSES, 2, beta=0.75, **DOUBLE), predsim),
    "predsim, projected": (lambda: PredSimHead(C, CLASSES, (2, 4), beta=0.75, project=True, **DOUBLE), predsim),
    "goodness": (lambda: GoodnessHead(threshold=0.4), goodness),
    "contrastive": (lambda: ContrastiveHead(C, 2, 5, hidden=7, temperature=0.3, **DOUBLE), contrastive),
    "contrastive, without a network": (lambda: ContrastiveHead(C, features=None), contrastive),
    "function": (lambda: FunctionHead(norm_ratio, 2), norm_ratio_of_map),
    "conv, depth 1": (lambda: ConvHead(C, CLASSES, 1, **DOUBLE), conv),
    "conv, depth 3": (lambda: ConvHead(C, CLASSES, 3, channels=5, **DOUBLE), conv),
    "mlp_sr": (lambda: MLPSRHead(C, CLASSES, (8, 8), hidden=7, **DOUBLE), mlp_sr),
    "module": (
        lambda: ModuleHead(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * C, CLASSES, **DOUBLE))),
        module,
    ),
    "reconstruction": (lambda: ReconstructionHead(C, mean=[0.1, 0.2, 0.3], std=0.5, **DOUBLE), reconstruction),
    "reconstruction, mse": (lambda: ReconstructionHead(C, 3, 4, loss="mse", **DOUBLE), reconstruction),
    "infopro": (lambda: InfoProHead(C, CLASSES, weights=(0.3, 0.7), label_smoothing=0.2, **DOUBLE), infopro),
    "infopro, contrastive": (
        lambda: InfoProHead(C, CLASSES, "contrastive", weights=(0.3, 0.7), features=5, temperature=0.4, **DOUBLE),
        infopro,
    ),
}


def targets(name: str) -> Tensor:
    return torch.arange(N) % (2 if name == "goodness" else CLASSES)


def make_body(fused: bool = True, activation: str = "relu") -> nn.Module:
    torch.manual_seed(0)
    layer = ConvBNReLU2d(3, C, 3, padding=1, activation=activation, dtype=torch.float64)
    nn.init.normal_(layer.bn.weight)
    nn.init.normal_(layer.bn.bias)
    return layer if fused else nn.Sequential(*layer.to_modules())


def make_stage(name: str, **options: Any) -> LocalStage:
    body = make_body()
    torch.manual_seed(1)
    return LocalStage(body, HEADS[name][0](), **options)


def images(size: tuple[int, int] = (8, 8), n: int = N) -> Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True))
