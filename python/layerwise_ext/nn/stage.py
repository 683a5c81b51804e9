"""One stage of a network with a loss of its own."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from layerwise_ext import _graphs, functional
from layerwise_ext.nn.chain import gives_moments
from layerwise_ext.nn.conv import AcceleratedDownsample2d, ConvBNReLU2d
from layerwise_ext.nn.heads import LocalHead
from layerwise_ext.nn.moments import PooledMoments


class StageOutput(NamedTuple):
    """``features [N, C, H, W]`` or ``[N, C]`` for the next stage, the scalar local ``loss`` (None without a target),
    ``logits`` (None where the head has no classifier)."""

    features: Tensor
    loss: Tensor | None
    logits: Tensor | None


class LocalStage(nn.Module):
    """A part of a network (``body``) and its local loss (``head``).

        features, loss, logits = stage(x, target)
        loss.backward()             # gradients of this stage only, when detach=True

    A body that is a :class:`ConvBNReLU2d`, a :class:`Residual` or a :class:`FusedChain`, or an ``nn.Sequential`` ending
    in one, gives the head its moments from the fused operator; any other body works through plain pooling of its
    output. The head is a sibling of the body, never inside it: the body's state_dict is that of the plain network. The
    moments come from a method of the last layer, not from a call of the body: hooks on that layer, and on an
    ``nn.Sequential`` around it, run in :meth:`features` only.

    Args:
        body: maps ``[N, C_in, H_in, W_in]`` to ``[N, C, H, W]``, or anything to vectors ``[N, C]``, as linear layers
            do: to the head they are maps of one element.
        head: a :class:`LocalHead`; :class:`FunctionHead` makes one of any function of the moments.
        detach: cut the graph at the stage's input and at ``features``, so that no gradient crosses stages. With
            ``detach=False`` gradients flow to the input and back from later uses of ``features`` (deep supervision).
        downsample: ``(mode, factor)`` of :func:`layerwise_ext.functional.downsample`: what the next stage gets of the
            body's output, while the head sees all of it. Behind a :class:`ConvBNReLU2d` and with ``detach`` the
            activation is then written in the reduced form only.
        dropout: probability with which each channel of what the next stage gets is zero while training
            (``torch.nn.Dropout2d``); the head sees the output without it, as in Nokland & Eidnes 2019 (arXiv
            1901.06656).
        cuda_graph: on a CUDA device, run training steps as a CUDA graph, for maps so small that launching kernels is
            what takes the time. Forward and backward pass are captured together at the fourth call in a row with inputs
            of one shape; other inputs (a last smaller batch) and evaluation run as usual. ``features`` is then memory
            of the graph, overwritten by the next call, and ``loss.backward()`` must come before that call.

    Raises:
        TypeError: ``head`` is not a LocalHead.
        ValueError: an unknown ``downsample``; a ``dropout`` outside [0, 1); ``cuda_graph`` without ``detach`` or with a
            batch norm of ``momentum=None``; (when run) the head was built for another shape, or pools to more cells
            than the map has.
        RuntimeError: (when run) the head pools to more cells than the map of a :class:`ConvBNReLU2d`, residual block or
            chain has; with ``cuda_graph``, something in the stage waits for the device.
    """

    def __init__(
        self,
        body: nn.Module,
        head: LocalHead,
        detach: bool = True,
        *,
        downsample: functional.Downsample = None,
        dropout: float = 0.0,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; allowed: 0 to below 1, the probability of a channel to be zero")
        if not isinstance(head, LocalHead):
            raise TypeError(f"head is {type(head).__name__}; a LocalHead is needed")
        if cuda_graph and not detach:
            raise ValueError("cuda_graph=True needs detach=True: the graph holds the whole backward pass of the stage")
        self.body = body
        self.head = head
        self.detach = detach
        functional._downsampling(downsample)  # checks it
        self.downsample = None if downsample is None else AcceleratedDownsample2d(*downsample)
        self.dropout = _ChannelDropout(dropout) if dropout else None
        self.cuda_graph = cuda_graph
        self._captured: _graphs.CapturedFunction | None = None
        self._used: list[nn.Parameter] = []  # those that have a gradient in the captured step

    def forward(self, x: Tensor, target: Tensor | None = None, image: Tensor | None = None) -> StageOutput:
        """
        Args:
            x: ``[N, C_in, H, W]``.
            target: what the head compares with, ``[N]`` class indices for most; without it there is no loss.
            image: the network's image, for heads that look at it (``head.needs_image``); None: they get x.
        """
        if self.detach and x.requires_grad:
            x = x.detach()
        inputs = [x] if image is None or not self.head.needs_image else [x, image]
        if self.cuda_graph and target is not None and self.training and _can_replay(x) and _is_trained(self):
            return self._replay(target, *inputs)
        features, moments = self.moments(*inputs)
        logits, loss = self.head(moments, target)
        return StageOutput(features.detach() if self.detach else features, loss, logits)

    def features(self, x: Tensor) -> Tensor:
        """Without the head, with its graph: what joint training and frozen stages need."""
        features: Tensor = self.body(x)
        if self.downsample is not None:
            features = self.downsample(features)
        return features if self.dropout is None else self.dropout(features)

    def moments(
        self, x: Tensor, image: Tensor | None = None, *, detach: bool | None = None
    ) -> tuple[Tensor, PooledMoments]:
        """The features, and the moments over ``head.bins`` of the body's output.

        Without ``downsample`` or without ``detach``, by default the stage's own, the features have their graph.
        """
        features, moments = self._moments(x, self.detach if detach is None else detach)
        if self.head.needs_image:
            moments.image = x if image is None else image
        return features if self.dropout is None else self.dropout(features), moments

    def _moments(self, x: Tensor, detach: bool) -> tuple[Tensor, PooledMoments]:
        body, head, downsample = self.body, self.head, self.downsample
        while type(body) is nn.Sequential and len(body):
            *first, body = body
            for module in first:
                x = module(x)
        if downsample is not None and detach and _may_skip_map(body, head):
            y, m1, m2 = body.forward_moments(
                x, head.bins, head.second_moment, detached_downsample=(downsample.mode, downsample.factor)
            )
            return y, PooledMoments(m1, m2, body.map_size(x))
        if gives_moments(body):
            y, m1, m2 = body.forward_moments(x, head.bins, head.second_moment)
            moments = PooledMoments(m1, m2, (y.shape[2], y.shape[3]), y if head.needs_map else None)
        else:
            y = body(x)
            moments = PooledMoments.of(y, head.bins, second_moment=head.second_moment)
        if downsample is not None:
            y = downsample(y.detach() if detach else y)
        return y, moments

    def _replay(self, target: Tensor, *inputs: Tensor) -> StageOutput:
        if self._captured is None:
            _graphs.check_capturable([self])
            self._captured = _graphs.CapturedFunction(self._step, self._settings)
        features, loss, *rest = self._captured(target, *inputs)
        gradients, logits = rest[: len(self._used)], rest[len(self._used) :]
        loss = _Captured.apply(loss, self._captured, gradients, *self._used)
        return StageOutput(features, loss, logits[0].clone() if logits else None)

    def _step(self, target: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The whole step: features, loss, the gradients of the parameters that the loss depends on, logits if any."""
        # Leaves of its own: those of the parameters may belong to a loss that is still alive and to another stream.
        leaves = {name: p.detach().requires_grad_(p.requires_grad) for name, p in self.named_parameters()}
        with _graphs.without_cast_cache(target.device):
            names = {f"stage.{name}": leaf for name, leaf in leaves.items()}
            features, loss, logits = torch.func.functional_call(_Step(self), names, (target, *inputs))
        trainable = [(p, leaves[name]) for name, p in self.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [leaf for _, leaf in trainable], allow_unused=True)
        self._used = [p for (p, _), gradient in zip(trainable, gradients, strict=True) if gradient is not None]
        used = [gradient for gradient in gradients if gradient is not None]
        return features.detach(), loss.detach(), *used, *([] if logits is None else [logits.detach()])

    def _settings(self) -> Any:
        device = next(self.parameters()).device.type
        return _graphs.settings_of([self]), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": None, "_used": []}  # a copy captures its own

    def extra_repr(self) -> str:
        return f"detach={self.detach}" + (", cuda_graph=True" if self.cuda_graph else "")


class _ChannelDropout(nn.Dropout2d):
    def forward(self, x: Tensor) -> Tensor:
        return drop_channels(x, self.p, self.training)


def drop_channels(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Of ``[N, C, H, W]`` or ``[N, C]``."""
    return (F.dropout if x.dim() == 2 else F.dropout2d)(x, p, training)


class _Step(nn.Module):
    """A stage as it is without a graph."""

    def __init__(self, stage: LocalStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, target: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        features, moments = self.stage.moments(*inputs)
        logits, loss = self.stage.head(moments, target)
        return features, cast(Tensor, loss), logits


def _can_replay(x: Tensor) -> bool:
    return bool(
        x.is_cuda
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()  # a trainer captures the whole step
    )


class _Captured(torch.autograd.Function):
    """The loss of a captured step, whose gradients are there already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, captured: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.captured, ctx.replays = gradients, captured, captured.replays
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        if ctx.captured.replays != ctx.replays:
            raise RuntimeError(
                "a LocalStage with cuda_graph=True ran again before loss.backward(): the gradients of the first run "
                "are overwritten. Call backward after each run"
            )
        return None, None, None, *torch._foreach_mul(ctx.gradients, grad_loss)


def _is_trained(stage: LocalStage) -> bool:
    return any(parameter.requires_grad for parameter in stage.parameters())


def _may_skip_map(body: nn.Module, head: LocalHead) -> TypeGuard[ConvBNReLU2d]:
    """Whether the operator can leave the body's output unwritten and give what is downsampled of it."""
    if not isinstance(body, ConvBNReLU2d):
        return False
    own, of_package = type(body), ConvBNReLU2d
    if own.forward is not of_package.forward or own.forward_moments is not of_package.forward_moments:
        return False
    return not head.needs_map and body.downsample is None and not body.ceil_mode and body.activation != "rrelu"
