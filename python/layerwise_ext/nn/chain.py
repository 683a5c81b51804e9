"""Chains of fused layers for joint training, which keep one map of each layer instead of two."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from layerwise_ext import _chain, functional
from layerwise_ext.nn.conv import ConvBNReLU2d
from layerwise_ext.nn.moments import PooledMoments

_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
_ALLOWED = "ConvBNReLU2d, Residual, nn.MaxPool2d, nn.AvgPool2d, nn.Identity, and nn.Sequential or FusedChain of these"


class Residual(nn.Module):
    """A residual block: the last layer adds the block's input before its activation.

        y = act(batch_norm(conv(...)) + shortcut(x))

    Basic and bottleneck blocks of He et al. 2016, arXiv 1512.03385; with ``activation='identity'`` in the last layer
    those of MobileNetV2, arXiv 1801.04381. By itself an ordinary module; a :class:`FusedChain` recomputes its output
    instead of keeping it.

    Args:
        layers: what a :class:`FusedChain` takes, the last one a :class:`ConvBNReLU2d`. They become the child ``body``,
            an nn.Sequential.
        shortcut: a module of the same kinds, usually a ``ConvBNReLU2d`` with a 1x1 kernel and
            ``activation='identity'``; None adds the input itself.

    Shapes:
        input ``[N, C, H, W]``; body and shortcut both give ``[N, C', H', W']``, as the block does.

    Raises:
        TypeError: a module that a chain does not take, or a body that does not end in a ConvBNReLU2d.
        RuntimeError: (when run) body and shortcut give different shapes.
    """

    body: nn.Sequential
    shortcut: nn.Module | None

    def __init__(self, *layers: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.shortcut = shortcut
        _check(self)

    def forward(self, x: Tensor) -> Tensor:
        last, x, residual = self._before_the_last(x)
        return cast(Tensor, last(x, residual))

    def forward_moments(
        self, x: Tensor, bins: tuple[int, int], second_moment: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, m1, m2)``: the output and its sums of y and y*y over each pooling cell; see :class:`ConvBNReLU2d`."""
        last, x, residual = self._before_the_last(x)
        return last.forward_moments(x, bins, second_moment, residual)

    def _before_the_last(self, x: Tensor) -> tuple[ConvBNReLU2d, Tensor, Tensor]:
        residual = x if self.shortcut is None else self.shortcut(x)
        *first, last = self.body
        for layer in first:
            x = layer(x)
        assert isinstance(last, ConvBNReLU2d)
        return last, x, residual


class FusedChain(nn.Sequential):
    """Fused layers one after another, trained jointly from half of the maps that plain layers keep.

    An ``nn.Sequential`` with the same children, state_dict and results. For the backward pass it keeps of each layer
    the output of its convolution and two numbers per channel, and nothing else: activations, outputs of residual
    blocks, pooled and padded maps are recomputed when a weight gradient needs them, by one pass over the map each.
    Unlike checkpointing it repeats no convolution, unlike In-Place ABN (Rota Bulo et al. 2018, arXiv 1712.02616) it
    takes any activation and leaves the parameters as they are.

    Each layer is an autograd node: its gradients arrive and its memory is given back one layer after the other; memory
    not with ``retain_graph=True``, with saved-tensor hooks, and while somebody else has a tensor that a node saved.

    Where nothing has to be kept (no gradients wanted, or within ``torch.compile``, which decides itself), and where a
    layer has hooks or normalises over replicas, the layers are called one by one, without segments. Hooks on the chain
    run when it is called, not when a :class:`LocalStage` asks it for moments.

    Args:
        layers: modules of the kinds :class:`ConvBNReLU2d`, :class:`Residual`, nn.MaxPool2d, nn.AvgPool2d, nn.Identity,
            and nn.Sequential or FusedChain of these. Dropout is not among them: put it between two chains.
        segments: number of parts, of nearly equally many children each, or the indices of the children at which a new
            part begins, other than the first. Of every part but the last its input alone is kept, and the backward pass
            runs it again, with its convolutions, as :func:`torch.utils.checkpoint.checkpoint_sequential` does; running
            statistics move once all the same, and the gradients of a segment's parameters arrive together. Where maps
            shrink, the first layers have the largest ones: ``segments=(2,)``, which runs the first two children again,
            saves much memory for little time. A chain within a chain is taken apart, its own segments do not count; a
            slice has one.

    Shapes:
        input ``[N, C, H, W]``; output that of the last layer.

    Raises:
        TypeError: another module.
        ValueError: ``segments`` below 1 or above the number of children, or indices that do not ascend between the two.
    """

    def __init__(self, *layers: nn.Module, segments: int | Sequence[int] = 1) -> None:
        super().__init__(*layers)
        _check(self)
        if isinstance(segments, Sequence):
            self.segments: int | tuple[int, ...] = tuple(map(operator.index, segments))
        else:
            self.segments = operator.index(segments)
        self._starts()

    def forward(self, input: Tensor) -> Tensor:
        if self._is_plain(input):
            return cast(Tensor, super().forward(input))
        x, program = self._to_last_segment(input)
        return _chain.run(program.steps, x, [], False)[0]

    def forward_moments(
        self, x: Tensor, bins: tuple[int, int], second_moment: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, m1, m2)``: the output and its sums of y and y*y over each pooling cell; see :class:`ConvBNReLU2d`.

        Behind a pool they are taken from the output by plain pooling.
        """
        if self._is_plain(x):
            *first, last = list(self) or [nn.Identity()]
            for layer in first:
                x = layer(x)
            if gives_moments(last):
                return last.forward_moments(x, bins, second_moment)
            return _dense_moments(last(x), bins, second_moment)
        x, program = self._to_last_segment(x)
        if not program.ends_in_a_layer:
            y, _, _ = _chain.run(program.steps, x, [], False)
            return _dense_moments(y, bins, second_moment)
        y, m1, m2 = _chain.run(program.steps, x, list(bins), second_moment)
        return y, m1, m2 if second_moment else cast(Tensor, None)

    def _to_last_segment(self, x: Tensor) -> tuple[Tensor, _Program]:
        """The last segment and its input."""
        children, starts = list(self), self._starts()
        for start, end in itertools.pairwise(starts):
            x = _chain.run_again(_Program(children[start:end]).steps, x)
        return x, _Program(children[starts[-1] :])

    def _starts(self) -> list[int]:
        """The index of the first child of each segment."""
        count, segments = len(self), self.segments
        if isinstance(segments, int):
            if not 1 <= segments <= max(1, count):
                raise ValueError(f"segments must lie between 1 and the number of layers, {count}, got {segments}")
            return [i * count // segments for i in range(segments)]
        starts = [0, *segments]
        if not segments or any(a >= b for a, b in itertools.pairwise([*starts, max(1, count)])):
            raise ValueError(f"segments must begin at ascending indices from 1 to {count - 1}, got {list(segments)}")
        return starts

    def extra_repr(self) -> str:
        return "" if self.segments == 1 else f"segments={self.segments}"

    def _is_plain(self, x: Tensor) -> bool:
        """Whether the layers are called one by one."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return True
        if not (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return True
        elements = [element for child in self for element in _elements(child)]
        layers = [e for e in elements if isinstance(e, ConvBNReLU2d)]
        return not layers or any(map(_has_hooks, elements)) or any(layer.is_synchronised for layer in layers)


def _dense_moments(y: Tensor, bins: tuple[int, int], second_moment: bool) -> tuple[Tensor, Tensor, Tensor]:
    moments = PooledMoments.of(y, bins)
    return y, moments.m1, moments.m2 if second_moment else cast(Tensor, None)


class _Program:
    """The steps of modules in a row as they are now; counts the batch in each layer."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.steps: list[_chain.Step] = []
        value = 0
        for module in modules:
            value = self._add(module, value)

    @property
    def ends_in_a_layer(self) -> bool:
        """Whether the last step gives moments."""
        return bool(self.steps) and isinstance(self.steps[-1], _chain.Layer)

    def _add(self, module: nn.Module, value: int) -> int:
        """Appends the steps of a module that reads ``value``; the value that it gives."""
        _check_kind(module)
        if isinstance(module, ConvBNReLU2d):
            return self._add_layer(module, value, None)
        if isinstance(module, nn.Sequential):
            for child in module:
                value = self._add(child, value)
            return value
        if isinstance(module, Residual):
            residual = value if module.shortcut is None else self._add(module.shortcut, value)
            *first, last = module.body
            for child in first:
                value = self._add(child, value)
            assert isinstance(last, ConvBNReLU2d)
            return self._add_layer(last, value, residual)
        if isinstance(module, nn.Identity):
            return value
        self.steps.append(_chain.Pool(value, module.forward))
        return len(self.steps)

    def _add_layer(self, layer: ConvBNReLU2d, value: int, residual: int | None) -> int:
        border, tensors, options = layer._settings()
        conv_weight, conv_bias, running_mean, running_var, weight, bias = tensors
        geometry = (functional._pair(name, options[name]) for name in ("stride", "padding", "dilation"))
        mode, window = functional._downsampling(options["downsample"])
        stride, padding, dilation = geometry
        if mode == "stride":
            stride = [s * w for s, w in zip(stride, window, strict=True)]
        step = _chain.Layer(
            input=value,
            residual=residual,
            parameters=(conv_weight, conv_bias, weight, bias, options["slope"]),
            running=(running_mean, running_var),
            around=None if border is None else border.around,
            convolution=(stride, padding, dilation, options["groups"]),
            form=functional._make_form(
                conv_weight.device, conv_weight.dtype, options["eps"], options["activation"],
                options["negative_slope"], options["upper_slope"], None, None, None, mode, window,
                options["ceil_mode"], [],
            ),
            training=options["training"],
            momentum=options["momentum"],
        )  # fmt: skip
        self.steps.append(step)
        return len(self.steps)


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those within it that have a part in the chain."""
    yield module
    if isinstance(module, Residual):
        yield from _elements(module.body)
        if module.shortcut is not None:
            yield from _elements(module.shortcut)
    elif isinstance(module, nn.Sequential):
        for child in module:
            yield from _elements(child)


def _check(module: nn.Module) -> None:
    for element in _elements(module):
        _check_kind(element)


def _check_kind(module: nn.Module) -> None:
    """The chain does what ``module.forward`` does in its place: refuse anything in which that would differ."""
    forward = type(module).forward
    plain = forward in (ConvBNReLU2d.forward, Residual.forward, nn.Sequential.forward, FusedChain.forward)
    if not plain and type(module) not in (*_POOLS, nn.Identity):
        raise TypeError(f"a chain holds a {type(module).__name__}; allowed: {_ALLOWED}")
    if isinstance(module, nn.MaxPool2d) and module.return_indices:
        raise TypeError("a chain holds an nn.MaxPool2d with return_indices=True; it must give the map alone")
    if isinstance(module, Residual):
        last = module.body[-1] if len(module.body) else None
        if not isinstance(last, ConvBNReLU2d):
            raise TypeError(f"the last layer of a residual block is {type(last).__name__}; a ConvBNReLU2d is needed")


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def gives_moments(body: nn.Module) -> TypeGuard[ConvBNReLU2d | Residual | FusedChain]:
    """Whether the body's operator gives the moments of what ``forward`` gives, which a subclass may have changed."""
    for kind in (ConvBNReLU2d, Residual, FusedChain):
        if isinstance(body, kind):
            own = type(body)
            return own.forward is kind.forward or own.forward_moments is not kind.forward_moments
    return False
