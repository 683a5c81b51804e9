"""One stage of a network with a loss of its own."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from layerwise_ext.nn.conv import ConvBNReLU2d
from layerwise_ext.nn.heads import LocalHead
from layerwise_ext.nn.moments import PooledMoments


class StageOutput(NamedTuple):
    """``features [N, C, H, W]`` for the next stage, the scalar local ``loss`` (None without a target), ``logits``."""

    features: Tensor
    loss: Tensor | None
    logits: Tensor


class LocalStage(nn.Module):
    """A part of a network (``body``) and its local loss (``head``).

        features, loss, logits = stage(x, target)
        loss.backward()             # gradients of this stage only, when detach=True

    A body that is a :class:`ConvBNReLU2d`, or an ``nn.Sequential`` ending in one, gives the head its moments from the
    fused operator; any other body works through plain pooling of its output. The head is a sibling of the body, never
    inside it: the body's state_dict is that of the plain network. The moments come from a method of the last layer, not
    from a call of the body: hooks on that layer, and on an ``nn.Sequential`` around it, run in :meth:`features` only.

    Args:
        body: maps ``[N, C_in, H_in, W_in]`` to ``[N, C, H, W]``.
        head: a :class:`LocalHead`.
        detach: cut the graph at the stage's input and at ``features``, so that no gradient crosses stages. With
            ``detach=False`` gradients flow to the input and back from later uses of ``features`` (deep supervision).

    Raises:
        TypeError: ``head`` is not a LocalHead.
        ValueError: (when run) the head was built for another shape, or pools to more cells than the map has.
    """

    def __init__(self, body: nn.Module, head: LocalHead, detach: bool = True) -> None:
        super().__init__()
        if not isinstance(head, LocalHead):
            raise TypeError(f"head is {type(head).__name__}; a LocalHead is needed")
        self.body = body
        self.head = head
        self.detach = detach

    def forward(self, x: Tensor, target: Tensor | None = None) -> StageOutput:
        if self.detach and x.requires_grad:
            x = x.detach()
        features, moments = self.moments(x)
        logits, loss = self.head(moments, target)
        return StageOutput(features.detach() if self.detach else features, loss, logits)

    def features(self, x: Tensor) -> Tensor:
        """The body alone, with its graph: what joint training and frozen stages need."""
        features: Tensor = self.body(x)
        return features

    def moments(self, x: Tensor) -> tuple[Tensor, PooledMoments]:
        """The features, with their graph, and their moments over ``head.bins``."""
        return _body_moments(self.body, x, self.head)

    def extra_repr(self) -> str:
        return f"detach={self.detach}"


def _body_moments(body: nn.Module, x: Tensor, head: LocalHead) -> tuple[Tensor, PooledMoments]:
    if isinstance(body, ConvBNReLU2d):
        y, m1, m2 = body.forward_moments(x, head.bins, head.second_moment)
        return y, PooledMoments(m1, m2, (y.shape[2], y.shape[3]))
    if type(body) is nn.Sequential and len(body):
        *first, last = body
        for module in first:
            x = module(x)
        return _body_moments(last, x, head)
    y = body(x)
    return y, PooledMoments.of(y, head.bins)
