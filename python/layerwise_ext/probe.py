"""What the layers of a network have learned, and what reaches them: :func:`separability` and :func:`gradient_norms`.

Both leave parameters, gradients, statistics, modes and random generators as they were.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise_ext._modules import call, layers_of
from layerwise_ext.models import StagedModel
from layerwise_ext.models.build import _largest_grid
from layerwise_ext.models.summary import _table
from layerwise_ext.nn import LocalStage, PooledMoments
from layerwise_ext.train import random_state

__all__ = [
    "GradientNorms",
    "LayerGradient",
    "LayerSeparability",
    "Separability",
    "gradient_norms",
    "separability",
]

Batches = Iterable[tuple[Tensor, Tensor]]
Visit = Callable[[int, Tensor], None]


# -- Separability ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSeparability:
    """One layer: its name, the number of ``features`` after pooling, and of these

    - ``accuracy``: of the linear probe, between 0 and 1,
    - ``fisher_ratio``: trace of the scatter between classes over that of the scatter within them,
    - ``cosine_gap``: mean cosine of two samples of one class minus that of two samples of different classes.
    """

    layer: str
    features: int
    accuracy: float
    fisher_ratio: float
    cosine_gap: float


@dataclass(frozen=True)
class Separability:
    """What :func:`separability` found; ``str`` of it is a table. ``samples`` and ``test_samples`` were looked at."""

    layers: list[LayerSeparability]
    samples: int
    test_samples: int

    def to_dict(self) -> dict[str, Any]:
        """Of numbers, strings, lists and dictionaries."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [["layer", "features", "probe accuracy", "Fisher ratio", "cosine gap"]]
        for row in self.layers:
            numbers = [f"{value:.4f}" for value in (row.accuracy, row.fisher_ratio, row.cosine_gap)]
            rows.append([row.layer, str(row.features), *numbers])
        return "\n".join(_table(rows, left=1))


def separability(
    model: nn.Module | Sequence[LocalStage],
    loader: Batches,
    test_loader: Batches | None = None,
    *,
    layers: Sequence[str] | None = None,
    dim: int = 1024,
    ridge: float = 1e-2,
) -> Separability:
    """How well the output of each layer separates the classes, in evaluation mode.

    Maps are pooled as the local heads' are: to the finest grid, halving rows and columns in turn, with which channels *
    cells <= ``dim``. On these features a linear classifier is fitted by ridge regression of the one-hot targets, with
    an intercept, on features scaled to variance 1 (``ridge`` is added to their correlation matrix). That has a closed
    form in sums over the samples: one pass over the data fits the probes of all layers exactly and in float64, without
    a learning rate or an order of the samples, where a classifier trained by gradient steps would have both. What least
    squares are known for: of few features, a class that lies between two others may never win.

    The Fisher ratio and the cosine gap (over all pairs of samples, of the features as they are) come from sums, too, so
    that no matrix of all features is ever in memory: a layer takes 8 * features**2 bytes.

    Args:
        model: a :class:`~layerwise_ext.models.StagedModel`, or stages in a row, whose outputs (what the next stage
            gets) are looked at; or any module, with ``layers``.
        loader: ``(images, target)`` batches that the probes are fitted to and the other two numbers are of; iterated
            once. ``target`` is int64 ``[N]``, from 0.
        test_loader: batches for the accuracy. None: ``loader`` once more, which flatters wide layers and which an
            iterator cannot give.
        layers: names of modules of ``model`` (as in ``named_modules``) whose outputs are looked at: ``[N, C, H, W]`` or
            ``[N, D]``. Children of a ConvBNReLU2d are not called; name the layer itself.
        dim: see above; a layer with more channels has one feature per channel.
        ridge: see above.

    Returns:
        :class:`Separability`, in the order of the stages or of ``layers``. NaN where it has no meaning: the cosine gap
        without two samples of one class, the Fisher ratio of a constant.

    Raises:
        TypeError: ``model`` is neither of these; batches that are not pairs, targets that are not int64.
        ValueError: unknown ``layers``, or such as are not called exactly once per batch or give another shape; ``dim``
            below 1; ``ridge`` not positive; an iterator as ``loader`` without ``test_loader``; a target below 0 or of
            another shape; outputs that are not finite.
        RuntimeError: a loader without batches.
    """
    points = _points(model, layers)
    if dim < 1:
        raise ValueError(f"dim is {dim}; it must be at least 1")
    if not (ridge > 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge is {ridge}; it must be positive and finite")
    if test_loader is None and isinstance(loader, Iterator):
        raise ValueError(f"loader is a {type(loader).__name__}, used up after one pass; give test_loader, too")
    device = next((p.device for p in points.root.parameters()), torch.device("cpu"))
    scatters: list[_Scatter | None] = [None] * len(points.names)
    samples, test_samples = 0, 0

    def fit(i: int, y: Tensor, labels: Tensor, classes: int) -> None:
        features = _pooled(y, dim).double()
        scatter = scatters[i] or _Scatter(features)
        scatters[i] = scatter
        scatter.update(features, labels, classes)

    def score(i: int, y: Tensor, labels: Tensor) -> None:
        weight, bias = probes[i]
        correct[i] += (_pooled(y, dim).double() @ weight + bias).argmax(1).eq(labels).sum()

    with torch.no_grad(), _undisturbed(points.root, device, loader, test_loader):
        points.root.eval()
        for images, target in _batches(loader):
            samples += len(target)
            classes = int(target.max()) + 1  # before it goes to the device
            points.run(images.to(device), partial(fit, labels=target.to(device), classes=classes))
        if samples == 0:
            raise RuntimeError("loader gave no batches; there is nothing to look at")
        found = cast("list[_Scatter]", scatters)
        for name, scatter in zip(points.names, found, strict=True):
            if not bool(scatter.gram.isfinite().all()):
                raise ValueError(f"the output of {name!r} is not finite")
        probes = [scatter.probe(ridge) for scatter in found]
        correct = torch.zeros(len(probes), dtype=torch.int64, device=device)
        for images, target in _batches(loader if test_loader is None else test_loader):
            test_samples += len(target)
            points.run(images.to(device), partial(score, labels=target.to(device)))
        if test_samples == 0:
            raise RuntimeError("the loader for the accuracy gave no batches; an iterator is used up after one pass")
    rows = zip(points.names, found, correct.tolist(), strict=True)
    return Separability(
        [LayerSeparability(n, s.features, c / test_samples, s.fisher_ratio(), s.cosine_gap()) for n, s, c in rows],
        samples,
        test_samples,
    )


class _Scatter:
    """Sums over the samples of one layer, in float64, with K classes and D features.

    The sums of products are of features minus the first batch's mean, so that a large mean costs no digits.
    """

    def __init__(self, first: Tensor) -> None:
        self.features = first.shape[1]
        self.shift = first.mean(0)  # [D]
        self.gram = first.new_zeros(self.features, self.features)  # [D, D]
        self.sums = first.new_zeros(0, self.features)  # [K, D]
        self.unit_sums = first.new_zeros(0, self.features)  # [K, D] of features of length 1
        self.unit_squares = first.new_zeros(())
        self.counts = first.new_zeros(0)  # [K]

    def update(self, x: Tensor, target: Tensor, classes: int) -> None:
        """With x ``[N, D]`` and target ``[N]`` below ``classes``."""
        missing = classes - len(self.counts)
        if missing > 0:
            self.counts = F.pad(self.counts, (0, missing))
            self.sums, self.unit_sums = (F.pad(t, (0, 0, 0, missing)) for t in (self.sums, self.unit_sums))
        members = F.one_hot(target, len(self.counts)).double().T  # a product: index_add has no fixed order on CUDA
        self.counts += members.sum(1)
        unit = F.normalize(x, eps=torch.finfo(x.dtype).tiny)  # zero stays zero
        self.unit_sums.addmm_(members, unit)
        self.unit_squares += unit.square().sum()
        x = x - self.shift
        self.sums.addmm_(members, x)
        self.gram.addmm_(x.T, x)

    def probe(self, ridge: float) -> tuple[Tensor, Tensor]:
        """``(weight [D, K], bias [K])`` of the ridge regression of one-hot targets."""
        n = self.counts.sum()
        mean, share = self.sums.sum(0) / n, self.counts / n
        covariance = self.gram / n - mean.outer(mean)
        variance = covariance.diagonal().clone()
        # That of a constant is exactly 0: it differs from the shift by a few units in the last place, if at all.
        std = torch.where(variance > 0, variance.clamp_min(0).sqrt(), 1)
        correlation = covariance / std.outer(std)
        correlation.diagonal().add_(ridge)
        with_target = (self.sums / n - share.outer(mean)) / std  # [K, D]
        weight = torch.cholesky_solve(with_target.T, torch.linalg.cholesky(correlation)) / std[:, None]
        return weight, share - (self.shift + mean) @ weight

    def fisher_ratio(self) -> float:
        n = self.counts.sum()
        of_classes = (self.sums.square().sum(1) / self.counts.clamp_min(1)).sum()  # sum of n_c |mean_c|^2
        within = (self.gram.trace() - of_classes).clamp_min(0)
        between = (of_classes - self.sums.sum(0).square().sum() / n).clamp_min(0)
        return float(between / within)

    def cosine_gap(self) -> float:
        n, same_squares = self.counts.sum(), self.unit_sums.square().sum()
        pairs = (self.counts * (self.counts - 1)).sum()
        same = (same_squares - self.unit_squares) / pairs  # without a sample's cosine with itself
        different = (self.unit_sums.sum(0).square().sum() - same_squares) / (n.square() - self.counts.square().sum())
        return float(same - different) if pairs > 0 else math.nan


# -- Gradient norms ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerGradient:
    """One convolution or linear layer: Euclidean norms of

    - ``gradient``: the gradient of the loss with respect to its weight,
    - ``weight``: the weight; ``ratio`` is gradient / weight,
    - ``activation_gradient``: the gradient with respect to its output over the whole batch, which for a ConvBNReLU2d is
      the activation's; NaN for the classifier that a local head computes from its moments.
    """

    layer: str
    gradient: float
    weight: float
    ratio: float
    activation_gradient: float


@dataclass(frozen=True)
class GradientNorms:
    """What :func:`gradient_norms` found; ``str`` of it is a table. ``losses``: one, or with ``local`` one per stage."""

    layers: list[LayerGradient]
    losses: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Of numbers, strings, lists and dictionaries."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [["layer", "gradient", "weight", "ratio", "activation gradient"]]
        for row in self.layers:
            rows.append([row.layer, *(f"{v:.3e}" for v in dataclasses.astuple(row)[1:])])
        return "\n".join(_table(rows, left=1))


def gradient_norms(
    model: nn.Module | Sequence[LocalStage],
    images: Tensor,
    target: Tensor,
    *,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    local: bool = False,
) -> GradientNorms:
    """Norms of the gradients of one batch, layer by layer, in the modes that the modules are in.

    Args:
        model: any module; or a :class:`~layerwise_ext.models.StagedModel` or stages in a row.
        images: a batch, on the model's device.
        target: what the loss compares with.
        loss: ``loss(model(images), target)``, a scalar. None: cross-entropy; of stages the loss of the last head, which
            joint training minimises.
        local: of stages: every stage's own loss, without gradients across stages, as local training has it.

    Returns:
        :class:`GradientNorms`: the layers with a trainable weight on which a loss depends, in the order of
        ``named_modules``.

    Raises:
        TypeError: ``model`` is neither of these.
        ValueError: ``local`` without stages or with a ``loss``; no layer on which the loss depends; a loss that is no
            scalar.
    """
    stages = _stages(model)
    if local and stages is None:
        raise ValueError(f"local is True, but {type(model).__name__} has no stages with losses of their own")
    if local and loss is not None:
        raise ValueError("local is True: each stage has its own loss; leave loss out")
    root = _root(model)
    layers = [layer for layer in layers_of(root) if not layer.is_computed and layer.parameters()[0].requires_grad]
    squares: list[list[Tensor]] = [[] for _ in layers]

    def watch(found: list[Tensor]) -> Callable[..., None]:
        def after(module: nn.Module, inputs: Any, y: Any) -> None:
            if isinstance(y, Tensor) and y.requires_grad:
                # On the value as it is now: what follows may write over it in place.
                y.register_hook(lambda g: found.append(_norm(g).square()))

        return after

    handles = [layer.owner.register_forward_hook(watch(s)) for layer, s in zip(layers, squares, strict=True)]
    weights = [layer.parameters()[0] for layer in layers]
    try:
        with _undisturbed(root, images.device), torch.enable_grad():
            if stages is not None and (local or loss is None):
                losses = _losses(stages, images, target, local)
            else:
                losses = [(loss or F.cross_entropy)(call(cast(nn.Module, model), images), target)]
            if any(value.dim() for value in losses):
                raise ValueError(f"the loss has shape {[list(v.shape) for v in losses]}; a scalar is needed")
            wanted = list(dict.fromkeys(weights))
            depends = wanted and any(value.requires_grad for value in losses)
            total = torch.stack(losses).sum()
            found = torch.autograd.grad(total, wanted, allow_unused=True) if depends else ()
    finally:
        for handle in handles:
            handle.remove()
    gradients = {weight: g for weight, g in zip(wanted, found, strict=bool(found)) if g is not None}
    if not gradients:
        raise ValueError("the loss depends on no trainable weight of a convolution or linear layer")
    rows = []
    for layer, weight, s in zip(layers, weights, squares, strict=True):
        if weight in gradients:
            gradient, size = float(_norm(gradients[weight])), float(_norm(weight.detach()))
            activation = float(torch.stack(s).sum().sqrt()) if s else math.nan
            rows.append(LayerGradient(layer.name, gradient, size, gradient / size if size else math.inf, activation))
    return GradientNorms(rows, [float(value.detach()) for value in losses])


def _losses(stages: Sequence[LocalStage], images: Tensor, target: Tensor, local: bool) -> list[Tensor]:
    """Of each stage, or of the last one, by calls of the bodies, in which hooks run."""
    losses = []
    x = images
    for stage in stages:
        y = stage.body(x.detach() if local else x)
        if local or stage is stages[-1]:
            moments = PooledMoments.of(y, stage.head.bins, second_moment=stage.head.second_moment)
            if stage.head.needs_image:
                moments.image = images
            losses.append(cast(Tensor, stage.head(moments, target).loss))
        for module in (stage.downsample, stage.dropout):
            y = y if module is None else module(y)
        x = y
    return losses


def _norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dtype=torch.float64)


# -- Models ------------------------------------------------------------------------------------------------------------


def _stages(model: nn.Module | Sequence[LocalStage]) -> list[LocalStage] | None:
    """The stages; None of a module without any."""
    if isinstance(model, LocalStage):
        return [model]
    if isinstance(model, StagedModel):
        return list(model)
    if isinstance(model, nn.Module):
        return None
    if not isinstance(model, (list, tuple)) or not all(isinstance(stage, LocalStage) for stage in model):
        raise TypeError(f"model is {type(model).__name__}; allowed: an nn.Module, or a list of LocalStage")
    if not model:
        raise ValueError("model is empty; at least one stage is needed")
    return list(model)


def _root(model: nn.Module | Sequence[LocalStage]) -> nn.Module:
    """A module that holds everything, with the names that a StagedModel has."""
    if isinstance(model, nn.Module):
        return model
    root = nn.Module()
    root.stages = nn.ModuleList(model)
    return root


class _Points:
    """The places of a model that are looked at."""

    def __init__(self, root: nn.Module, names: list[str], run: Callable[[Tensor, Visit], None]) -> None:
        self.root = root
        self.names = names
        self.run = run  # run(images, visit) calls visit(index, output) at each place


def _points(model: nn.Module | Sequence[LocalStage], layers: Sequence[str] | None) -> _Points:
    stages, root = _stages(model), _root(model)
    if layers is None:
        if stages is None:
            raise ValueError(f"layers is None, but {type(model).__name__} has no stages; name its modules in layers")

        def run_stages(x: Tensor, visit: Visit) -> None:
            for i, stage in enumerate(stages):
                x = stage.features(x)
                visit(i, x)

        return _Points(root, [f"stages.{i}" for i in range(len(stages))], run_stages)
    if not isinstance(model, nn.Module):
        raise ValueError("layers is given, but model is a list of stages; give a StagedModel, or leave layers out")
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers is {layers!r}; allowed: a list of names of modules")
    modules = dict(model.named_modules(remove_duplicate=False))
    for i, name in enumerate(layers):
        if name not in modules:
            raise ValueError(f"layers[{i}] is {name!r}, which {type(model).__name__} has no module of")

    def run_modules(x: Tensor, visit: Visit) -> None:
        calls = [0] * len(layers)

        def after(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, y: Any) -> None:
                calls[i] += 1
                if not isinstance(y, Tensor) or y.dim() not in (2, 4):
                    given = f"shape {list(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
                    raise ValueError(f"layers[{i}], {layers[i]!r}, gives {given}; allowed: [N, C, H, W], [N, D]")
                if calls[i] == 1:
                    visit(i, y)  # now: what follows may write over it in place

            return hook

        handles = [modules[name].register_forward_hook(after(i)) for i, name in enumerate(layers)]
        try:
            call(model, x)
        finally:
            for handle in handles:
                handle.remove()
        for i, count in enumerate(calls):
            if count != 1:
                raise ValueError(f"layers[{i}], {layers[i]!r}, is called {count} times per batch; 1 is needed")

    return _Points(root, list(layers), run_modules)


def _pooled(y: Tensor, dim: int) -> Tensor:
    """Features ``[N, D]`` of a map or of features."""
    if y.dim() == 2:
        return y
    return F.adaptive_avg_pool2d(y, _largest_grid(y.shape[1], (y.shape[2], y.shape[3]), dim)).flatten(1)


def _batches(loader: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"the loader gave a {type(batch).__name__}; each batch must be a pair (images, target)")
        images, target = batch
        if target.dtype != torch.int64:
            raise TypeError(f"target has dtype {target.dtype}; class indices must be torch.int64")
        if target.shape != images.shape[:1]:
            raise ValueError(f"target has shape {tuple(target.shape)}; allowed: ({len(images)},), one class per sample")
        if bool((target < 0).any()):
            raise ValueError(f"target holds {int(target.min())}; allowed: class indices from 0")
        if len(target):
            yield images, target


@contextmanager
def _undisturbed(root: nn.Module, device: torch.device, *loaders: Any) -> Iterator[None]:
    """Buffers, modes and random generators, those of the loaders included, are put back."""
    modes = [(module, module.training) for module in root.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in root.buffers()]
    states = [(loader, random_state.capture(loader, device)) for loader in loaders or (None,)]
    try:
        yield
    finally:
        for loader, state in states:
            random_state.restore(state, loader, device)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, training in modes:
            module.training = training
