"""Fused convolutions for models that exist: :func:`fuse_` and :func:`unfuse_`."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from . import hooks, plan
from .plan import Skipped

__all__ = ["FuseReport", "Fused", "Skipped", "fuse_", "unfuse_"]


class Fused(NamedTuple):
    """What runs as one operator: module names, whether an addition is in it, the activation or None."""

    conv: str
    bn: str
    add: bool
    activation: str | None


class FuseReport(NamedTuple):
    """What :func:`fuse_` did: ``fused``, and each convolution that was left alone in ``skipped``, with the reason."""

    fused: tuple[Fused, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        count = len(self.fused) + len(self.skipped)
        lines = [f"{len(self.fused)} of {count} convolutions fused"]
        for f in self.fused:
            parts = [f.conv, f.bn, *(["add"] if f.add else []), *([f.activation] if f.activation else [])]
            lines.append("  " + " + ".join(parts))
        return "\n".join([*lines, *(f"  {s.name} left alone: {s.reason}" for s in self.skipped)])


def fuse_(model: nn.Module) -> FuseReport:
    """Runs convolution, batch norm, addition and activation as one operator wherever ``model`` calls them in a row.

    In place, and nothing of the model changes but its speed: the same modules, classes, names, parameters and
    ``state_dict``; its own ``forward`` runs. A convolution that is followed by batch norm returns a promise instead of
    a tensor, and the activation (or batch norm, where no fused activation follows) computes all of it. Copies and
    pickles of the model are fused, too. See ``docs/fuse.md``.

    Args:
        model: any module. Where it calls what is found out by symbolic traces (:mod:`torch.fx`) of a copy without data;
            where a module cannot be traced, by those of its children.

    Returns:
        :class:`FuseReport`: what was fused, and what was left alone and why.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check(model)
    planned = plan.make(model)
    names = {id(m): name for name, m in model.named_modules()}
    owners: dict[int, nn.Module] = {}
    convolutions, fused, skipped = [], [], list(planned.skipped)
    for p in planned.patterns:
        try:
            bn_watched, watched = plan.watch(p, p.bn_watched), plan.watch(p, p.watched)
            conv_path = plan.path(p.owners[0], p.conv)
        except LookupError as error:
            skipped.append(Skipped(names[id(p.conv)], str(error)))
            continue
        convolutions.append((p.conv, hooks.DeferConvolution(conv_path, bn_watched, watched, p.expected)))
        owners |= {id(m): m for m in p.owners}
        fused.append(Fused(names[id(p.conv)], names[id(p.bn)], p.expected.add, p.activation))
    hooks.remove(model)
    hooks.register(list(owners.values()), convolutions)
    return FuseReport(tuple(fused), tuple(skipped))


def unfuse_(model: nn.Module) -> int:
    """Undoes :func:`fuse_` in ``model``, in place; returns the number of convolutions that had been fused.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check(model)
    return hooks.remove(model)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; allowed: an nn.Module")
