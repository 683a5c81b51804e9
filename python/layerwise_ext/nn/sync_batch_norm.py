"""Batch norm over the processes of a group, on the CPU, too."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from layerwise_ext import functional

Module = TypeVar("Module", bound=nn.Module)


class BatchStatistics(NamedTuple):
    """What a batch norm normalises with: those of the batch (``training``), or the running ones.

    ``mean`` and ``var`` are the running statistics ``[C]`` that are used or moved by ``momentum``, None for neither.
    """

    training: bool
    momentum: float
    mean: Tensor | None
    var: Tensor | None

    @classmethod
    def of(cls, bn: _BatchNorm) -> BatchStatistics:
        """As its forward pass begins; counts the batch, as that does."""
        training, momentum, mean, var = bn.training, bn.momentum, bn.running_mean, bn.running_var
        if not training:
            training = mean is None and var is None
        elif not bn.track_running_stats:
            mean = var = None
        elif bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(bn.num_batches_tracked)
        return cls(training, 0.0 if momentum is None else momentum, mean, var)


def copied_with_group(module: Module, memo: dict[int, Any]) -> Module:
    """``__deepcopy__`` of a module with a ``process_group``, which cannot be copied: the copy has the same one."""
    group = module.process_group
    memo[id(group)] = group
    new = memo[id(module)] = module.__class__.__new__(module.__class__)
    new.__setstate__(copy.deepcopy(module.__dict__, memo))
    return new


class SyncBatchNorm(nn.SyncBatchNorm):
    """What :func:`convert_sync_batchnorm` makes of a batch norm of the class ``plain``."""

    plain: type[_BatchNorm]
    __deepcopy__ = copied_with_group

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, ...]``; on the CPU by the operators of this package, as PyTorch's has none."""
        group = group_of(self)
        if x.is_cuda or not self.training or group is None:
            return super().forward(x)
        statistics = BatchStatistics.of(self)
        y = functional.bn_act_moments(
            x if x.dim() == 4 else x.reshape(*x.shape[:2], -1, 1),
            statistics.mean,
            statistics.var,
            self.weight,
            self.bias,
            training=True,
            momentum=statistics.momentum,
            eps=self.eps,
            activation="identity",
            process_group=group,
            second_moment=False,
        ).y
        return y.view(x.shape)


def group_of(bn: nn.SyncBatchNorm) -> Any:
    """The processes that it normalises over; None without any, as in a script that is not distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.group.WORLD if bn.process_group is None else bn.process_group


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Turns each batch norm of a network into one over all processes of a group, for training data-parallel.

    As :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`, whose layers run on GPUs only, also for the CPU.
    Parameters, buffers and names stay; in evaluation, and where no process group was initialised, nothing changes.

    Args:
        module: changed in place.
        process_group: None: all processes, once they are initialised. A network with another one cannot be pickled.

    Returns:
        ``module``; a new module if it is itself a batch norm.

    Raises:
        TypeError: a lazy batch norm that has not run.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise TypeError(f"module has an uninitialised {type(module).__name__}; run it once before")
        return _exchanged(module, SyncBatchNorm, process_group=process_group, plain=type(module))
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, process_group))
    return module


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Turns each nn.SyncBatchNorm of a network back into a plain batch norm with the same parameters and buffers.

    The inverse of :func:`convert_sync_batchnorm`, and of PyTorch's for networks of 4-D maps.

    Returns:
        ``module``, changed in place; a new module if it is itself an nn.SyncBatchNorm.
    """
    if isinstance(module, nn.SyncBatchNorm):
        return _exchanged(module, module.plain if isinstance(module, SyncBatchNorm) else nn.BatchNorm2d)
    for name, child in module.named_children():
        setattr(module, name, revert_sync_batchnorm(child))
    return module


def _exchanged(bn: _BatchNorm, kind: type[_BatchNorm], **attributes: Any) -> _BatchNorm:
    """A batch norm of another class with the parameters and buffers of ``bn``."""
    new = kind(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, device="meta")
    new._parameters, new._buffers = bn._parameters, bn._buffers
    for name, value in attributes.items():
        setattr(new, name, value)
    return new.train(bn.training)
