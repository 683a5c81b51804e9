"""Cuts a network that is a row of modules into stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerwise_ext.models.build import OF_NETWORKS, Heads, evaluating
from layerwise_ext.models.staged import StagedModel
from layerwise_ext.models.summary import Cost, _size, costs
from layerwise_ext.nn import (
    AcceleratedDownsample2d,
    ClassifierHead,
    FusedChain,
    LocalHead,
    LocalStage,
    ModuleHead,
    PooledLinearHead,
)

BALANCES = ("memory", "operations", "units")


def split(
    model: nn.Module,
    stages: int | str | Sequence[int] = "unit",
    *,
    input_size: tuple[int, int, int],
    balance: str = "memory",
    head: str = "pooled_linear",
    head_depth: int = 2,
    bins: int | tuple[int, int] | None = None,
    dim: int = 1024,
    beta: float = 0.99,
    label_smoothing: float = 0.0,
    image_mean: float | Sequence[float] = 0.0,
    image_std: float | Sequence[float] = 1.0,
) -> StagedModel:
    """Cut a network into stages with local losses; within a stage it is trained jointly.

    The network is taken for a row of units. Those of a :class:`StagedModel` are its stages; a stage made of several
    keeps the head and the settings of the last one. Those of any other module are its children in order, where an
    nn.Sequential stands for its own children; a unit begins with a module that convolves, or, in a network without
    convolutions, with a linear layer. What comes behind the last feature map (pooling, flatten, linear layers), or the
    last linear layer, is the output's head. That this row gives what the module gives is
    checked on two random images, in evaluation and in training: ResNets and VGGs of torchvision and timm, also after
    :func:`layerwise_ext.fuse_`, can be cut, a DenseNet, which calls functions between its modules, cannot, nor can a
    model with dropout that is not a module.

    Modules and parameters are shared with ``model``, which is trained with the stages.

    Args:
        model: a StagedModel or a network that maps images ``[N, C, H, W]`` to logits ``[N, num_classes]``.
        stages: ``'unit'``, a stage for each; a number of stages; or the units, numbered from 0, at which a new stage
            begins, other than the first.
        input_size: ``(C, H, W)`` of an image.
        balance: with a number of stages, what the most expensive stage is to have least of: ``'memory'``, the outputs
            of convolutions, which training keeps; ``'operations'``; or ``'units'``.
        head, head_depth, bins, dim, beta, label_smoothing, image_mean, image_std: of the local heads that are added,
            see :func:`~layerwise_ext.models.vgg`.

    Raises:
        TypeError: ``model`` does not give logits ``[N, num_classes]``.
        ValueError: an unknown ``stages``, ``balance`` or ``head``; more stages than units; a network that is not the
            row of its children.
    """
    if balance not in BALANCES:
        raise ValueError(f"balance is {balance!r}; allowed: {', '.join(map(repr, BALANCES))}")
    if len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"input_size is {tuple(input_size)}; allowed: three positive numbers (C, H, W)")
    if head in OF_NETWORKS:
        raise ValueError(f"head is {head!r}, which is made with a network's units: give it to models.vgg or resnet")
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError(f"{type(model).__name__} has no parameters to train")
    images = torch.rand(2, *input_size, device=parameter.device, dtype=parameter.dtype)
    with evaluating(model), torch.no_grad():
        logits = model(images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise TypeError(f"{type(model).__name__} must give logits [N, num_classes] of {list(images.shape)}")
        image = (input_size[0], image_mean, image_std)
        heads = Heads(head, head_depth, logits.shape[1], bins, dim, beta, label_smoothing, *image)
        heads.check()
        if isinstance(model, StagedModel):
            units = [_Unit([stage.body], stage) for stage in model]
            output: list[nn.Module] = []
        else:
            units, output = _units(model)
            _check_row(model, [m for unit in units for m in unit.modules], output, images)
        found, sizes = _costs(units, images[:1])
    starts = _starts(stages, [_cost(unit_costs, balance) for unit_costs in found])
    result: list[LocalStage] = []
    for start, end in itertools.pairwise([*starts, len(units)]):
        last, size = units[end - 1], sizes[end - 1]
        body = _row(units[start:end])
        if last.stage is not None:
            result.append(_regrouped(last.stage, body))
            continue
        if end == len(units):
            local: LocalHead = _output_head(output, size)
        else:
            local = heads.build(size[0], size[1:], len(result), len(starts), pooled_output=True)
            local.to(parameter.device, parameter.dtype)
        result.append(LocalStage(body, local))
    staged = StagedModel(result, model.downsampling if isinstance(model, StagedModel) else None)
    given = set(model.modules())
    for module in staged.modules():
        if module not in given:
            module.training = model.training
    return staged


class _Unit(NamedTuple):
    modules: list[nn.Module]
    stage: LocalStage | None = None  # that it is the body of


def _units(model: nn.Module) -> tuple[list[_Unit], list[nn.Module]]:
    """The units, and what comes behind the last map."""
    row = list(_flat(model))
    starts = _holding(row, nn.Conv2d)
    if starts:
        end = next((i for i in range(starts[-1] + 1, len(row)) if _is_output(row[i])), len(row))
    else:
        *starts, end = _holding(row, nn.Linear) or [0]
        if not starts:
            raise ValueError(
                f"{type(model).__name__} has no convolution among its children, nor two linear layers; a unit and the "
                "output need one each"
            )
    starts[0] = 0  # what comes before the first layer is the first unit's
    return [_Unit(row[a:b]) for a, b in itertools.pairwise([*starts, end])], row[end:]


def _holding(row: Sequence[nn.Module], kind: type[nn.Module]) -> list[int]:
    """Where the row has a module of this kind, or one with such a module inside."""
    return [i for i, module in enumerate(row) if any(isinstance(m, kind) for m in module.modules())]


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    """The children in order, a child that is there twice included."""
    for child in module._modules.values():
        if isinstance(child, nn.Sequential) and type(child).forward is nn.Sequential.forward:
            yield from _flat(child)
        elif child is not None:
            yield child


def _is_output(module: nn.Module) -> bool:
    """Of a module behind the last convolution."""
    kinds = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Linear, nn.Dropout)
    return any(isinstance(m, kinds) or hasattr(m, "pool_type") for m in module.modules())


def _output_head(modules: Sequence[nn.Module], size: tuple[int, int, int]) -> ClassifierHead:
    """The classifier of a map ``size``, as the fused one where it is average pooling and a linear layer."""
    effective = [m for m in modules if not isinstance(m, (nn.Flatten, nn.Identity)) and not _drops_nothing(m)]
    if size[1:] == (1, 1) and len(effective) == 1:
        effective.insert(0, nn.AdaptiveAvgPool2d(1))  # which changes nothing
    if len(effective) == 2 and isinstance(effective[1], nn.Linear):
        cells = _average_pooling(effective[0])
        if cells is not None and cells[0] <= size[1] and cells[1] <= size[2]:
            linear = effective[1]
            head = PooledLinearHead(size[0], linear.out_features, cells)
            head.linear = linear
            return head
    return ModuleHead(nn.Sequential(*_with_flatten(modules)))


def _with_flatten(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """In front of the first linear layer or its dropout, where the model calls torch.flatten."""
    row = list(modules)
    at = next((i for i, m in enumerate(row) if isinstance(m, (nn.Linear, nn.Dropout))), len(row))
    if at < len(row) and not any(isinstance(m, nn.Flatten) for m in row[:at]):
        row.insert(at, nn.Flatten())
    return row


def _drops_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p == 0


def _average_pooling(module: nn.Module) -> tuple[int, int] | None:
    """Cells of an adaptive average pooling, timm's own one included; None of anything else."""
    if isinstance(module, nn.AdaptiveAvgPool2d):
        size = module.output_size
        rows, columns = size if isinstance(size, (tuple, list)) else (size, size)
        return None if rows is None or columns is None else (rows, columns)
    return (1, 1) if getattr(module, "pool_type", None) == "avg" else None


# -- Whether a model is the row of its children ------------------------------------------------------------------------


def _check_row(model: nn.Module, body: Sequence[nn.Module], output: Sequence[nn.Module], images: Tensor) -> None:
    """In evaluation and in training every module must be given the same, and the last one give the logits.

    The logits alone would not do: a classifier that starts from zero gives the same of anything.
    """
    row = [*body, *_with_flatten(output)]
    name = type(model).__name__
    for training in (False, True):
        with _undisturbed(model):
            model.train(training)
            expected, logits = _inputs(row, lambda: model(images))
        with _undisturbed(model):
            model.train(training)
            try:
                found, last = _inputs(row, lambda: nn.Sequential(*row)(images))
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{name} is not the row of its children: run in order they fail ({error})") from error
        for module in dict.fromkeys(row):
            if module in expected and not _alike(found[module], expected[module]):
                raise ValueError(
                    f"{name} is not the row of its children: run in order, {type(module).__name__} is given something "
                    f"else in {'training' if training else 'evaluation'}. Put what the model's forward calls in front "
                    "of it into a module of an nn.Sequential"
                )
        if not _alike(last, logits):
            raise ValueError(f"{name} is not the row of its children: run in order they give other logits")


def _inputs(modules: Sequence[nn.Module], run: Callable[[], Tensor]) -> tuple[dict[nn.Module, Tensor], Tensor]:
    """What each module is given first, and what ``run`` gives; random numbers are the same in each call."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if module not in seen:
            seen[module] = arguments[0].detach().clone()

    hooks = [module.register_forward_pre_hook(keep) for module in dict.fromkeys(modules)]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return seen, run()
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Buffers and modes are put back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, training in modes:
            module.training = training


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= 1e-2 * b.norm())


# -- The stages --------------------------------------------------------------------------------------------------------


def _costs(units: Sequence[_Unit], image: Tensor) -> tuple[list[list[Cost]], list[tuple[int, int, int]]]:
    """What the layers of each unit cost, and the size of the map that it gives, before anything reduces it."""
    found: list[list[Cost]] = []
    sizes: list[tuple[int, int, int]] = []
    x = image
    for unit in units:
        found.append([])
        for module in unit.modules:
            x, more = costs(module, x, "")
            found[-1] += more
        if x.dim() not in (2, 4):
            raise ValueError(
                f"{type(unit.modules[-1]).__name__} gives shape {list(x.shape)}; a stage must end in [N, C, H, W] or "
                "[N, C]"
            )
        sizes.append(_size(x))
        if unit.stage is not None and unit.stage.downsample is not None:
            x = unit.stage.downsample(x)
    return found, sizes


def _regrouped(stage: LocalStage, body: nn.Module) -> LocalStage:
    """The stage with another body that ends in its own."""
    reduction = stage.downsample
    return LocalStage(
        body,
        stage.head,
        stage.detach,
        downsample=None if reduction is None else (reduction.mode, reduction.factor),
        dropout=0.0 if stage.dropout is None else stage.dropout.p,
        cuda_graph=stage.cuda_graph,
    )


def _row(units: Sequence[_Unit]) -> nn.Module:
    """One module that runs them: a chain, which keeps less, where all are layers of this package."""
    modules: list[nn.Module] = []
    for unit in units:
        modules += unit.modules
        if unit is not units[-1] and unit.stage is not None:
            modules += [module for module in (unit.stage.downsample, unit.stage.dropout) if module is not None]
    if len(modules) == 1:
        return modules[0]
    try:
        return FusedChain(*map(_as_pool, modules))
    except TypeError:
        return nn.Sequential(*modules)


def _as_pool(module: nn.Module) -> nn.Module:
    """The same downsampling as a module that a chain takes."""
    if isinstance(module, AcceleratedDownsample2d) and module.mode in ("max", "avg"):
        pool = nn.MaxPool2d if module.mode == "max" else nn.AvgPool2d
        return pool(module.factor, ceil_mode=module.ceil_mode)  # type: ignore[arg-type]
    return module


def _cost(unit: Sequence[Cost], balance: str) -> int:
    if balance == "units":
        return 1
    return sum(math.prod(cost.shape) if balance == "memory" else cost.multiply_adds for cost in unit)


def _starts(stages: int | str | Sequence[int], unit_costs: Sequence[int]) -> list[int]:
    """The first unit of each stage."""
    count = len(unit_costs)
    if isinstance(stages, str):
        if stages != "unit":
            raise ValueError(f"stages is {stages!r}; allowed: 'unit', a number of stages, or the units that begin one")
        return list(range(count))
    if isinstance(stages, int):
        if not 1 <= stages <= count:
            raise ValueError(f"stages is {stages}; allowed: 1 to {count}, the number of units")
        return balanced(unit_costs, stages)
    starts = [0, *stages]
    if any(a >= b for a, b in itertools.pairwise([*starts, count])):
        raise ValueError(f"stages is {list(stages)}; allowed: ascending units from 1 to {count - 1}")
    return starts


def balanced(unit_costs: Sequence[float], stages: int) -> list[int]:
    """The first unit of each stage in the cut into so many stages whose most expensive one is cheapest."""
    count = len(unit_costs)
    until = [0, *itertools.accumulate(unit_costs)]
    # best[end] = (cost of the most expensive stage, starts) of units [0, end) in as many stages as there were rounds
    best: list[tuple[float, list[int]]] = [(until[end], [0]) for end in range(count + 1)]
    for used in range(1, stages):
        best = [
            min(
                (max(best[start][0], until[end] - until[start]), [*best[start][1], start]) for start in range(used, end)
            )
            if end > used
            else (0, [])
            for end in range(count + 1)
        ]
    return best[count][1]
