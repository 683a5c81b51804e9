"""Initialisation from a batch of data: :func:`lsuv_` and :func:`data_dependent_`.

Both visit the convolutions and linear layers in the order in which one forward pass calls them. A layer's output
depends on its own weight and on its input, which the layers before have settled by then: it is scaled, and scaled
again, when its input arrives, and the pass goes on with the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from layerwise_ext._modules import Layer, call, layers_of
from layerwise_ext.models.build import evaluating
from layerwise_ext.models.summary import _table

__all__ = ["InitReport", "LayerReport", "data_dependent_", "lsuv_"]

T = TypeVar("T")

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class LayerReport(NamedTuple):
    """What became of a layer.

    ``std``: of its output over the batch, at the end (NaN if it was left alone); ``tries``: how often its weight was
    scaled; ``ratio``: :func:`data_dependent_`'s, over the geometric mean of all layers (NaN from :func:`lsuv_`, and
    where no gradient arrives); ``note``: what the caller should know, mostly empty.
    """

    name: str
    std: float = math.nan
    tries: int = 0
    ratio: float = math.nan
    note: str = ""


class InitReport(NamedTuple):
    """One row per layer, those that were visited first and in the order of the forward pass; ``str`` is a table."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        rows = [["layer", "std", "tries", "ratio"]]
        rows += [[r.name, f"{r.std:.3f}", str(r.tries), f"{r.ratio:.3f}"] for r in self.layers]
        if all(math.isnan(r.ratio) for r in self.layers):
            rows = [row[:3] for row in rows]
        notes = ["", *(r.note for r in self.layers)]
        return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(_table(rows, left=1), notes, strict=True))


def lsuv_(
    model: nn.Module,
    batch: Tensor,
    *,
    tolerance: float = 0.1,
    max_tries: int = 10,
    generator: torch.Generator | None = None,
) -> InitReport:
    """Layer-sequential unit variance (Mishkin & Matas 2016, arXiv 1511.06422), in place.

    Each convolution and linear layer gets an orthogonal weight and no bias; then, in the order of the forward pass, the
    weight is divided by the standard deviation of the layer's output over the batch until that is near 1. The output is
    that of the convolution itself, before batch norm. The model runs in eval mode, so a new batch norm passes on what
    it gets; its parameters and statistics, and all other modules, stay as they are.

    Works on plain modules, on this package's layers and chains, and on models after :func:`layerwise_ext.fuse_`. Of a
    :class:`~layerwise_ext.models.StagedModel` the network itself is initialised, with the head that is its output; of a
    :class:`~layerwise_ext.nn.LocalStage` the body.

    Layers that the forward pass does not call (local heads, for instance), that are transposed convolutions or whose
    weight is computed (weight_norm) are left alone, as their rows say. A module or a weight that is used twice is set
    at its first use. A layer whose output does not vary over the batch keeps the orthogonal weight.

    Args:
        model: takes ``batch`` as its one argument.
        batch: a batch of inputs, on the model's device; a few dozen samples or more.
        tolerance: the largest ``|std - 1|`` to leave as it is.
        max_tries: how often a weight is scaled at most.
        generator: of the orthogonal matrices; None: torch's global one of the CPU. Equal states give equal weights.

    Returns:
        :class:`InitReport`.

    Raises:
        TypeError: ``model`` is not a module, ``batch`` not a floating-point tensor.
        ValueError: an empty batch, no layers that are called, lazy modules that have not run, ``tolerance`` not
            positive, ``max_tries`` below 1. When the forward pass fails, the parameters are put back.
    """
    layers, skipped = _layers(model, batch)
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; it must be positive")
    if max_tries < 1:
        raise ValueError(f"max_tries is {max_tries}; allowed: 1 or more")

    def initialize(layer: Layer, x: Tensor) -> LayerReport:
        weight, bias = layer.parameters()
        _draw(weight, nn.init.orthogonal_, generator)
        if bias is not None:
            bias.zero_()
        std, tries = _std(layer.output(x)), 0
        while abs(std - 1) > tolerance and tries < max_tries and _varies(std):
            weight.div_(std)
            std, tries = _std(layer.output(x)), tries + 1
        note = ""
        if not _varies(std):
            note = "its output does not vary over the batch" if std == 0 else "its output is not finite"
        elif abs(std - 1) > tolerance:
            note = f"still not within {tolerance} of 1"
        return LayerReport(layer.name, std, tries, note=note)

    with _restored_on_error(model), evaluating(model):
        rows = _visit(model, batch, layers, initialize)
    return InitReport((*rows.values(), *_unvisited(layers, rows), *skipped))


def data_dependent_(
    model: nn.Module,
    batch: Tensor,
    *,
    beta: float = 0.1,
    max_rounds: int = 10,
    tolerance: float = 0.01,
    generator: torch.Generator | None = None,
) -> InitReport:
    """Data-dependent initialisation of Krähenbühl et al. 2016, arXiv 1511.06856, in place.

    Within layers: each convolution and linear layer gets normally distributed weights, of which every output channel is
    divided by its standard deviation s over the batch; a bias becomes ``beta - m / s``, where m is the channel's mean,
    so that each channel has mean beta and variance 1.

    Between layers: each weight is multiplied by sqrt(ratio / geometric mean of the ratios), where ratio = rms(gradient)
    / rms(weight), so that all layers learn at the same rate; and each bias by that and by what its input has grown. The
    loss is the sum of outputs times normally distributed numbers. In a row of layers with activations such as ReLU one
    round is exact; with additions, or other activations, rounds are repeated. The product of all factors is 1, so the
    output of such a row stays what it was, while the variance within it moves.

    What is visited, what is left alone and in which mode the model runs is as in :func:`lsuv_`. A channel that does not
    vary is not scaled.

    Args:
        model: takes ``batch`` as its one argument; must give a tensor.
        batch: a batch of inputs, on the model's device.
        beta: the mean of each channel, of layers that have a bias.
        max_rounds: of the second part; 0 leaves it out.
        tolerance: the rounds stop when no ratio is farther than this from the geometric mean, relative to it.
        generator: of the weights and of the loss; None: torch's global one of the CPU.

    Returns:
        :class:`InitReport`; ``tries`` are rounds.

    Raises:
        TypeError: ``model`` is not a module or gives no floating-point tensor, ``batch`` is not such a tensor.
        ValueError: an empty batch, no layers that are called, lazy modules that have not run, ``max_rounds`` below 0,
            ``tolerance`` not positive, ``beta`` not finite, an output without a graph. When the model fails, the
            parameters are put back.
    """
    layers, skipped = _layers(model, batch)
    if not math.isfinite(beta):
        raise ValueError(f"beta is {beta}; it must be finite")
    if max_rounds < 0:
        raise ValueError(f"max_rounds is {max_rounds}; allowed: 0 or more")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; it must be positive")
    scales: dict[Layer, Tensor] = {}  # mean |x| of each layer's input

    def normalize(layer: Layer, x: Tensor) -> LayerReport:
        weight, bias = layer.parameters()
        _draw(weight, nn.init.normal_, generator)
        if bias is not None:
            bias.zero_()
        channels = layer.output(x).movedim(layer.channel_dim, 0).flatten(1)
        variance, mean = torch.var_mean(_wide(channels), dim=1, correction=0)
        varies = (variance > 0) & variance.isfinite()
        std = torch.where(varies, variance.sqrt(), 1)
        weight.div_(std.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1)))
        if bias is not None:
            bias.copy_(torch.where(varies, beta - mean / std, bias))
        scales[layer] = _wide(x).abs().mean()
        still = int((~varies).sum())
        note = f"{still} of {len(varies)} channels do not vary over the batch" if still else ""
        return LayerReport(layer.name, note=note)

    with _restored_on_error(model), evaluating(model):
        rows = _visit(model, batch, layers, normalize)
        between = _Between(list(rows), scales, generator)
        ratios, rounds = between.normalize(model, batch, max_rounds, tolerance)
        stds = _visit(model, batch, layers, lambda layer, x: _std(layer.output(x)))
    found = [rows[x]._replace(std=stds[x], ratio=q, tries=rounds) for x, q in zip(rows, ratios, strict=True)]
    return InitReport((*found, *_unvisited(layers, rows), *skipped))


class _Between:
    """The second part of :func:`data_dependent_`."""

    def __init__(self, layers: list[Layer], scales: dict[Layer, Tensor], generator: torch.Generator | None) -> None:
        self.layers = layers
        self.scales = scales
        self.generator = generator
        self._eta: Tensor | None = None  # the same in each round: the ratios would not settle otherwise

    def normalize(self, model: nn.Module, batch: Tensor, max_rounds: int, tolerance: float) -> tuple[list[float], int]:
        """The ratios over their geometric mean at the end, and the number of rounds."""
        relative, rounds = self._ratios(model, batch), 0
        while rounds < max_rounds and bool(((relative - 1).abs() > tolerance).any()):
            self._scale(model, batch, relative.sqrt().nan_to_num(1.0))
            relative, rounds = self._ratios(model, batch), rounds + 1
        return relative.tolist(), rounds

    def _ratios(self, model: nn.Module, batch: Tensor) -> Tensor:
        """float64 ``[len(layers)]``; NaN where no gradient arrives."""
        weights = [layer.parameters()[0] for layer in self.layers]
        with _trainable(self.layers), torch.enable_grad():
            y = call(model, batch)
            if not isinstance(y, Tensor) or not y.is_floating_point():
                raise TypeError(f"model gives {type(y).__name__}; a floating-point tensor is needed")
            if not y.requires_grad:
                raise ValueError(
                    "the model's output has no graph, so no gradient reaches its weights; it must neither be detached "
                    "nor be computed in no_grad or inference_mode"
                )
            if self._eta is None:
                device = "cpu" if self.generator is None else self.generator.device
                self._eta = torch.randn(y.shape, generator=self.generator, device=device).to(y)
            gradients = torch.autograd.grad(y, weights, self._eta, allow_unused=True)
        pairs = zip(gradients, weights, strict=True)
        ratios = torch.stack([w.new_tensor(math.nan).double() if g is None else _rms(g) / _rms(w) for g, w in pairs])
        ratios = torch.where((ratios > 0) & ratios.isfinite(), ratios, math.nan)
        return ratios / ratios.log().nanmean().exp()

    def _scale(self, model: nn.Module, batch: Tensor, factors: Tensor) -> None:
        factor_of = dict(zip(self.layers, factors.tolist(), strict=True))

        def scale(layer: Layer, x: Tensor) -> None:
            weight, bias = layer.parameters()
            weight.mul_(factor_of[layer])
            before, now = self.scales[layer], _wide(x).abs().mean()
            self.scales[layer] = now
            if bias is not None:
                bias.mul_((factor_of[layer] * torch.where(before > 0, now / before, 1)).to(bias.dtype))

        _visit(model, batch, self.layers, scale)


# -- Layers ------------------------------------------------------------------------------------------------------------


def _layers(model: nn.Module, batch: Tensor) -> tuple[list[Layer], list[LayerReport]]:
    """The layers to be initialised, and rows for those that are not."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; allowed: an nn.Module")
    if not isinstance(batch, Tensor) or not batch.is_floating_point():
        found = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"batch is {found}; allowed: a floating-point tensor")
    if batch.numel() == 0:
        raise ValueError(f"batch has shape {list(batch.shape)}; at least one sample is needed")
    for name, module in model.named_modules():
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise ValueError(f"model has a lazy module, {name!r}, without parameters; run it once before")
    layers: list[Layer] = []
    skipped: list[LayerReport] = []
    for layer in layers_of(model):
        if layer.is_computed:
            skipped.append(LayerReport(layer.name, note="its weight is computed: left alone"))
        else:
            layers.append(layer)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer to initialise")
    for name, module in model.named_modules():
        if isinstance(module, _TRANSPOSED):
            skipped.append(LayerReport(name, note=f"{type(module).__name__}: left alone"))
    return layers, skipped


def _visit(model: nn.Module, batch: Tensor, layers: list[Layer], visit: Callable[[Layer, Tensor], T]) -> dict[Layer, T]:
    """Calls ``visit(layer, input)`` before each layer's first call in a forward pass; its results in that order."""
    results: dict[Layer, T] = {}
    seen: set[nn.Parameter] = set()

    def hook(layer: Layer) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            weight, _ = layer.parameters()
            if weight not in seen:
                seen.add(weight)
                results[layer] = visit(layer, args[0] if args else next(iter(kwargs.values())))

        return before

    handles = [layer.owner.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not results:
        raise ValueError(f"{type(model).__name__} calls none of its convolutions and linear layers as modules")
    return results


def _unvisited(layers: list[Layer], visited: Collection[Layer]) -> Iterator[LayerReport]:
    names = {layer.parameters()[0]: layer.name for layer in visited}
    for layer in layers:
        if layer not in visited:
            shared = names.get(layer.parameters()[0])
            note = "not called by the forward pass: left alone" if shared is None else f"its weight is that of {shared}"
            yield LayerReport(layer.name, note=note)


# -- Tensors -----------------------------------------------------------------------------------------------------------


def _draw(weight: Tensor, fill: Callable[..., Any], generator: torch.Generator | None) -> None:
    """In float32 at least and where the generator is, so that a seed gives the same weights on every device."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    device = "cpu" if generator is None else generator.device
    values = torch.empty(weight.shape, dtype=dtype, device=device)
    fill(values, generator=generator)
    weight.copy_(values)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _std(y: Tensor) -> float:
    return float(torch.var_mean(_wide(y), correction=0)[0].sqrt())


def _rms(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dtype=torch.float64) / math.sqrt(t.numel())


def _varies(std: float) -> bool:
    return std > 0 and math.isfinite(std)


@contextmanager
def _trainable(layers: Collection[Layer]) -> Iterator[None]:
    """Frozen weights, too, have a gradient."""
    frozen = [weight for weight, _ in (layer.parameters() for layer in layers) if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    before = [(p, p.detach().clone()) for p in model.parameters()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for p, value in before:
                p.copy_(value)
        raise
