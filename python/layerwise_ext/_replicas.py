"""Batch norm over the replicas of a data-parallel network: statistics and gradient sums cross processes.

Between statistics and apply, and between the backward sums and the input gradient, the replicas combine a few numbers
per channel, each weighted by the number of its elements: the result is that of one process with the whole batch, as
with :class:`torch.nn.SyncBatchNorm`. Gradients of weight, bias and slope are this replica's own, which
DistributedDataParallel combines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _ops
from ._ops import operators


class LinkError(RuntimeError):
    """Another process is gone."""


@contextmanager
def neighbour(name: str) -> Iterator[None]:
    """Errors of torch.distributed in here are those of a connection."""
    try:
        yield
    except RuntimeError as error:
        raise LinkError(f"the connection to {name} is lost: {error}") from error


class Replicas:
    """The processes of a group; after :meth:`combine` also the number of elements per channel of all of them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.count = torch.zeros(())

    def combine(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance per channel over all replicas, from those of this one's ``count`` elements."""
        own = torch.cat((mean, var, mean.new_tensor([count]))).double()
        every = own.new_empty(self.group.size(), own.numel())
        with neighbour("another replica"):
            dist.all_gather(list(every.unbind()), own, group=self.group)
        means, variances, counts = every.split((len(mean), len(var), 1), 1)
        self.count = counts.sum()
        shares = counts / self.count
        total = (shares * means).sum(0)
        spread = (shares * (variances + (means - total).square())).sum(0)
        return total.to(mean.dtype), spread.to(var.dtype)

    def add(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Sums over all replicas, divided by the number of elements."""
        total = torch.stack(sums).double()
        with neighbour("another replica"):
            dist.all_reduce(total, group=self.group)
        return (total / self.count).to(sums[0].dtype).unbind()

    def update_running_statistics(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        mean: Tensor,
        var: Tensor,
        shift: Tensor | None,
        momentum: float,
    ) -> None:
        """As the operator of that name, with a count that stays on the device."""
        unbiased = var * (self.count / (self.count - 1)).to(var.dtype)
        with torch.no_grad():
            running_mean.lerp_((mean if shift is None else mean + shift).to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def check(group: Any) -> None:
    """
    Raises:
        TypeError: ``group`` is no process group.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group is {type(group).__name__}; allowed: a torch.distributed.ProcessGroup, None")


class _BnActMoments(torch.autograd.Function):
    """``operators.bn_act_moments``, whose arguments follow the replicas."""

    @staticmethod
    def forward(ctx: Any, replicas: Replicas, z: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
        mean, var = operators.batch_norm_statistics(z)
        mean, var = replicas.combine(mean, var, z.numel() // z.size(1))
        output = operators.bn_act_moments(z, weight, bias, mean, var, *rest[2:])
        _ops._setup_bn(ctx, (z, weight, bias, *rest), output)
        ctx.group, ctx.count = replicas, 1.0  # the sums come divided
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, *_ops._backward_bn(ctx, *gradients)


class _ConvBnActMoments(torch.autograd.Function):
    """``operators.conv_bn_act_moments``, whose arguments follow the replicas."""

    @staticmethod
    def forward(ctx: Any, replicas: Replicas, input: Tensor, conv_weight: Tensor, *rest: Any) -> Any:
        _, weight, bias, _, _, *convolution_and_form = rest
        convolution, form = convolution_and_form[:4], convolution_and_form[4:]
        z, mean, var = operators.convolution_statistics(input, conv_weight, *convolution)
        mean, var = replicas.combine(mean, var, z.numel() // z.size(1))
        output = (*operators.bn_act_moments(z, weight, bias, mean, var, *form), z)
        _ops._setup_conv(ctx, (input, conv_weight, *rest), output)
        ctx.group, ctx.count = replicas, 1.0
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, *_ops._backward_conv(ctx, *gradients)


def bn_act_moments(replicas: Replicas, *arguments: Any) -> Any:
    """As the operator, without given statistics."""
    return _BnActMoments.apply(replicas, *arguments)


def conv_bn_act_moments(replicas: Replicas, *arguments: Any) -> Any:
    """As the operator, without given statistics."""
    return _ConvBnActMoments.apply(replicas, *arguments)
