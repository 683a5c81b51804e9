"""Training steps of a whole VGG8b, by this package and in plain PyTorch, from the same parameters and images.

A step is the forward passes of all stages, their losses, and the gradients of all parameters; no optimizer.  *Joint* is
backpropagation from one cross-entropy at the output.  *Local* gives each stage a loss and its backward pass before the
next stage runs on its detached output, so one stage's activations are alive at a time; the gradients of all stages are
kept to the end of the step.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import layerwise_ext as lw
import torch
from peers import NUM_CLASSES, TrainingStep
from torch import Tensor, nn
from torch.nn import functional as F

BETA = 0.99
DIM = 2048  # pooled features of a classifier, the paper's for CIFAR

JOINT = "joint, eager channels_last"
JOINT_COMPILE = "joint, compile"
JOINTS = (JOINT, JOINT_COMPILE)
# Local loss -> the head of lw.models.vgg
KINDS = {"pred": "pooled_linear", "predsim": "predsim", "predsim projected": "predsim_projected"}
PLAIN = {kind: f"local {kind}, eager channels_last" for kind in KINDS}
OURS = {kind: f"local {kind}, layerwise_ext" for kind in KINDS}
STEPS = (*JOINTS, *PLAIN.values(), *OURS.values())


class Case(NamedTuple):
    """What is trained: vgg8b, every width times ``width``, on ``batch`` images of 3x32x32."""

    batch: int
    width: float = 1.0

    def data(self, device: str) -> tuple[Tensor, Tensor]:
        """Images [N, 3, 32, 32], channels_last, and targets [N]; the same on every device."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, 32, 32, generator=generator)
        target = torch.randint(NUM_CLASSES, (self.batch,), generator=generator)
        return images.to(device).contiguous(memory_format=torch.channels_last), target.to(device)

    def fused(self, kind: str) -> lw.models.StagedModel:
        """The network of this package, away from its first values, at which some gradients are zero."""
        model = lw.models.vgg("vgg8b", width_multiplier=self.width, dim=DIM, head=KINDS[kind], beta=BETA, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.2, generator=generator)
                elif isinstance(module, nn.Linear):
                    module.weight.normal_(0, module.in_features**-0.5, generator=generator)
        return model


class PlainHead(nn.Module):
    """The local loss as one writes it in PyTorch."""

    def __init__(self, head: lw.nn.ClassifierHead) -> None:
        super().__init__()
        pred = head.pred if isinstance(head, lw.nn.PredSimHead) else head
        assert isinstance(pred, lw.nn.PooledLinearHead)
        self.bins = pred.bins
        self.linear = copy.deepcopy(pred.linear)
        self.matches = isinstance(head, lw.nn.PredSimHead)
        self.projection: nn.Module | None = None
        if isinstance(head, lw.nn.PredSimHead) and head.sim.projection is not None:
            self.projection = _dense(head.sim.projection)

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        """y [N, C, H, W], or [N, C] of the fully connected stage, target [N] -> loss []."""
        pooled = y if y.dim() == 2 else F.adaptive_avg_pool2d(y, self.bins).flatten(1)
        pred = F.cross_entropy(self.linear(pooled), target)
        if not self.matches:
            return pred
        z = y if self.projection is None else self.projection(y)
        # The clamp keeps the gradient of a constant channel finite.
        features = z if z.dim() == 2 else z.flatten(2).var(2).clamp(min=1e-12).sqrt()
        x = features - features.mean(1, keepdim=True)
        x = x / (x.norm(dim=1, keepdim=True) + 1e-8)
        wanted = torch.where(target[:, None] == target, 1.0, -1 / (NUM_CLASSES - 1))
        return (1 - BETA) * pred + BETA * F.mse_loss((x @ x.T).clamp(-1, 1), wanted)


class PlainStage(nn.Module):
    """A stage in plain layers, with copies of the parameters of ``stage``, in the same order."""

    def __init__(self, stage: lw.nn.LocalStage) -> None:
        super().__init__()
        layer = stage.body
        assert isinstance(layer, lw.nn.ConvBNReLU2d)
        conv, bn, act = copy.deepcopy(layer).to_modules()
        layers: list[nn.Module] = []
        if conv.padding == (0, 0):  # its kernel covers the map: the paper's fully connected layer
            dense_bn = nn.BatchNorm1d(bn.num_features)
            dense_bn.load_state_dict(bn.state_dict())
            layers += [nn.Flatten(), _dense(conv), dense_bn, act]
        else:
            layers += [conv, bn, act]
        self.body = nn.Sequential(*layers)
        self.pool = nn.Identity() if stage.downsample is None else nn.MaxPool2d(2)
        assert isinstance(stage.head, lw.nn.ClassifierHead)
        self.head = PlainHead(stage.head)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, C_in, H, W], target [N] -> features (detached), loss []."""
        y = self.body(x)
        return self.pool(y.detach()), self.head(y, target)


class PlainJoint(nn.Module):
    """The bodies of plain stages in a row, and the classifier of the last one."""

    def __init__(self, stages: list[PlainStage]) -> None:
        super().__init__()
        self.bodies = nn.Sequential(*(nn.Sequential(stage.body, stage.pool) for stage in stages))
        self.linear = stages[-1].head.linear

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(self.bodies(images)), target)


def _dense(conv: nn.Conv2d) -> nn.Module:
    """A copy of a convolution without padding, whose kernel covers the map, as a linear layer; of any other, a copy."""
    if conv.padding != (0, 0):
        return copy.deepcopy(conv)
    linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, conv.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        if conv.bias is not None:
            linear.bias.copy_(conv.bias)
    return linear


def training_step(name: str, case: Case, dtype: torch.dtype, device: str = "cpu") -> TrainingStep:
    """The step of contestant ``name``; its ``loss`` gives the losses of all stages, ``[S]`` (joint: ``[1]``)."""
    images, target = case.data(device)
    module: nn.Module
    if name in JOINTS:
        module = PlainJoint([PlainStage(stage) for stage in case.fused("pred")])
    elif name in PLAIN.values():
        (kind,) = (kind for kind in KINDS if PLAIN[kind] == name)
        module = nn.ModuleList(PlainStage(stage) for stage in case.fused(kind))
    elif name in OURS.values():
        (kind,) = (kind for kind in KINDS if OURS[kind] == name)
        module = case.fused(kind)
    else:
        raise ValueError(f"unknown contestant {name!r}, choose from {', '.join(STEPS)}")
    module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    whole = torch.compile(module, dynamic=False) if name == JOINT_COMPILE else module

    def joint_loss() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = whole(images, target)
        loss.backward()
        return loss.detach()[None]

    def local_losses() -> Tensor:
        x, losses = images, []
        for stage in module:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                x, loss = stage(x, target)[:2]
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    losses = joint_loss if name in JOINTS else local_losses

    def run() -> None:  # frees everything but the gradients before the clock stops
        losses()

    def drop_gradients() -> None:
        for parameter in module.parameters():
            parameter.grad = None

    return TrainingStep(run, drop_gradients, module, losses)
