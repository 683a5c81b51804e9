"""Autograd of a chain of fused layers, which keeps pre-activations and recomputes what lies between them.

A chain is a small program. Its values are numbered: 0 is the input, i + 1 what step i gives. A step reads one value
and, where it ends a residual block, adds another one before its activation:

    value[i + 1] = downsample(act(batch_norm(z) + value[residual])),   z = conv(value[input])

Each step is an autograd node of its own, so that gradients leave and memory is freed one layer after the other. The
node of a layer keeps z and its mean and variance per channel; a value that no node gave (the chain's input, what frozen
layers computed) is kept by the nodes that read it, as in any network. In the backward pass a node asks for the values
that it read: they are recomputed from the z of the nodes that gave them, which the engine comes to later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise_ext import functional
from layerwise_ext._ops import _C, Form, _absent, _is_last_reader, _like, _once_differentiable, operators


@dataclass(frozen=True)
class Layer:
    """Convolution, batch norm and activation as they were when the chain was called."""

    input: int
    residual: int | None
    parameters: tuple[Tensor | None, ...]  # convolution's weight and bias, batch norm's weight and bias, slope
    running: tuple[Tensor | None, Tensor | None]  # mean and variance, [C]
    around: Callable[[Tensor], Tensor] | None  # padding that the operator does not know
    convolution: tuple[Any, ...]  # stride, padding, dilation, groups
    form: Form  # without residual, slope and bins
    training: bool
    momentum: float

    def form_of(self, residual: Tensor | None, slope: Tensor | None, bins: Sequence[int] = ()) -> Form:
        channels = self.parameters[0].size(0)  # type: ignore[union-attr]
        slope = None if slope is None else slope.expand(channels)
        return self.form._replace(residual=residual, slope=slope, bins=bins)


@dataclass(frozen=True)
class Pool:
    """A pooling without parameters between two layers."""

    input: int
    function: Callable[[Tensor], Tensor]


Step = Layer | Pool


def run(steps: Sequence[Step], x: Tensor, bins: list[int], second_moment: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, m1, m2)`` of the last step; the moments are empty without ``bins``.

    Args:
        steps: at least one; with ``bins`` the last one is a layer.
        x: ``[N, C, H, W]``.
        bins, second_moment: as in :func:`layerwise_ext.functional.conv_bn_act_moments`.

    Raises:
        As :func:`layerwise_ext.functional.conv_bn_act_moments`, and RuntimeError where a residual has another shape.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    last_reader = {value: i for i, step in enumerate(steps) for value in _read_by(step)}
    memory = _Memory()
    values, nodes = {0: x}, {0: None}  # by number: what is still to be read, and the nodes that gave it
    m1 = m2 = x.new_empty(0)
    for i, step in enumerate(steps):
        read = (nodes[step.input], values[step.input])
        if isinstance(step, Layer):
            added = (None, None) if step.residual is None else (nodes[step.residual], values[step.residual])
            inner = i + 1 < len(steps)
            y, m1, m2 = _LayerNode.apply(
                i, step, memory, inner, [] if inner else bins, second_moment, *read, *added, *step.parameters
            )
            del added
        else:
            y = _PoolNode.apply(i, step, memory, *read)
        del read
        for value in _read_by(step):
            if last_reader[value] == i:
                del values[value]
        values[i + 1], nodes[i + 1] = y, y.grad_fn
        del y
    return values[len(steps)], m1, m2


def _read_by(step: Step) -> set[int]:
    residual = step.residual if isinstance(step, Layer) else None
    return {step.input} if residual is None else {step.input, residual}


# -- The steps ---------------------------------------------------------------------------------------------------------


def _forward_layer(
    step: Layer, input: Tensor, residual: Tensor | None, parameters: Sequence[Any], bins: list[int], second_moment: bool
) -> tuple[Tensor, ...]:
    """y, m1, m2, sums, mean, var, z; updates the running statistics."""
    conv_weight, conv_bias, weight, bias, slope = parameters
    stride, padding, dilation, _ = step.convolution
    functional._check_rank("input", input)
    functional._check_statistics(*step.running, step.training, step.momentum)
    if step.training and input.size(0) == 1:
        size = functional._conv_size(input.shape, conv_weight, stride, padding, dilation)
        functional._check_more_than_one_value([1, conv_weight.size(0), *size])
    if not torch.is_autocast_enabled(input.device.type) and conv_weight.dtype != input.dtype:
        raise TypeError(f"conv_weight must have the dtype of input, {input.dtype}, got {conv_weight.dtype}")
    given = (None, None) if step.training else step.running
    form = step.form_of(residual, slope, bins)
    y, m1, m2, sums, mean, var, z = operators.conv_bn_act_moments(
        input, conv_weight, conv_bias, weight, bias, *given, *step.convolution, *form, second_moment, True
    )
    if step.training and step.running[0] is not None:
        count = z.numel() // z.size(1)
        operators.update_running_statistics_(*step.running, mean, var, conv_bias, count, step.momentum)
    return y, m1, m2, sums, mean, var, z


# -- Segments that are run again in the backward pass ------------------------------------------------------------------


def run_again(steps: Sequence[Step], x: Tensor) -> Tensor:
    """The last value of :func:`run`, of which nothing is kept but x: the backward pass runs the steps again.

    Batches are counted and running statistics move once, random slopes are the same both times.
    """
    # Fixed statistics as they are now, whatever becomes of them before the backward pass.
    steps = [_with_own_statistics(step) for step in steps]
    tensors = [t for step in steps if isinstance(step, Layer) for t in step.parameters if t is not None]
    y: Tensor = _AgainNode.apply(steps, x, *dict.fromkeys(tensors))
    return y


class _AgainNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Sequence[Step], x: Tensor, *parameters: Tensor) -> Any:
        device = x.device.type
        ctx.steps = steps
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(x, *parameters)
        return run(steps, x, [], False)[0]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        # Leaves of a graph of its own, which share the memory of the parameters.
        x, *parameters = (
            t.detach().requires_grad_(needed)
            for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        )
        leaves = iter(parameters)
        leaf_of: dict[Tensor, Tensor] = {}
        steps = [_with_leaves(step, leaf_of, leaves) for step in ctx.steps]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            output = torch.autograd.graph.get_gradient_edge(run(steps, x, [], False)[0])  # without its values
        wanted = [t for t in (x, *parameters) if t.requires_grad]
        gradients = iter(torch.autograd.grad([output], wanted, [grad_y.detach()]))
        of_inputs = tuple(next(gradients) if t.requires_grad else None for t in (x, *parameters))
        return None, *_once_differentiable(of_inputs)


def _with_own_statistics(step: Step) -> Step:
    if isinstance(step, Pool) or step.training:
        return step
    mean, var = (None if t is None else t.clone() for t in step.running)
    return replace(step, running=(mean, var))


def _with_leaves(step: Step, leaf_of: dict[Tensor, Tensor], leaves: Iterator[Tensor]) -> Step:
    """The step with the next leaves in the place of parameters that are new, and without running statistics to move."""
    if isinstance(step, Pool):
        return step
    for t in step.parameters:
        if t is not None and t not in leaf_of:
            leaf_of[t] = next(leaves)
    parameters = tuple(None if t is None else leaf_of[t] for t in step.parameters)
    return replace(step, parameters=parameters, running=(None, None) if step.training else step.running)


# -- Memory of a backward pass -----------------------------------------------------------------------------------------


class _Memory:
    """What the nodes of one chain share in a backward pass: values that were recomputed, saved tensors of other nodes.

    The value behind a residual block needs the one behind the block before it, and so on back to the last value that
    needs none. A sweep from there keeps what it passes for the next blocks, as much as goes into the memory of the z
    that the backward pass is done with and leaves place to work: so the sum of all z stays about the peak. Where not
    all fit they are evenly spaced, and the next sweep starts from the nearest one.
    """

    # Left free for what a layer has at a time beside z: gradients of its output and input, its input and residual. Of
    # these four maps two fit into what the last layers needed at the peak, where the backward pass begins: measured on
    # ResNet-18, 20 and 50, two keep that peak, one does not.
    WORKING_MAPS = 2

    def __init__(self) -> None:
        self.readers: Counter[int] = Counter()  # by node: how many others will ask for its value
        self._forget()

    def _forget(self, task: int = -1) -> None:
        self._task = task
        self.room = 0  # bytes that were freed and not taken again
        self._values: dict[int, Tensor] = {}  # by node, and their bytes where they take room
        self._taken: dict[int, int] = {}
        self._saved: dict[int, list[Any]] = {}
        self._unread = self.readers.copy()

    def enter(self, node: Any) -> list[Any]:
        """The tensors that the node saved; its value is not needed any more."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._forget(task)
            torch.autograd.Variable._execution_engine.queue_callback(self._forget)
        self._drop(node.index)
        saved = self.saved(node)
        del self._saved[node.index]
        return saved

    def saved(self, node: Any) -> list[Any]:
        """The tensors of a node that the backward pass has still to come to."""
        if node.index not in self._saved:  # once per backward pass, as saved-tensor hooks may demand
            self._saved[node.index] = list(node.saved_tensors)
        return self._saved[node.index]

    def value_of(self, node: Any) -> Tensor:
        """What a node gave that the backward pass has still to come to."""
        path: list[Any] = []
        while node is not None and node.index not in self._values:
            path.append(node)
            node = node.source
        y = None if node is None else self._values[node.index]
        spacing = 1
        for done, node in enumerate(reversed(path), 1):
            y = self._recompute(node, y)
            places = max(0, self.room // y.nbytes - self.WORKING_MAPS)
            if done == 1:
                spacing = -(-len(path) // (places + 1))
            if done < len(path) and done % spacing == 0 and places > 0:
                self._values[node.index], self._taken[node.index] = y, y.nbytes
                self.room -= y.nbytes
        assert y is not None
        if path:
            self._values[path[0].index] = y
        return y

    def _recompute(self, node: Any, source: Tensor | None) -> Tensor:
        saved = self.saved(node)
        if isinstance(node.step, Pool):
            return node.step.function(saved[0] if source is None else source)
        # What the operator gave: the same sums and products of the same z.
        _, residual, _, _, weight, bias, slope, mean, var, _, z = saved
        residual = residual if source is None or node.step.residual is None else source
        form = node.step.form_of(residual, slope)
        y: Tensor = operators.bn_act_moments(z, weight, bias, mean, var, *form, False, True)[0]
        return y

    def read(self, node: Any) -> None:
        """To be called by a reader of the node's value that needs it no more."""
        if node is not None:
            self._unread[node.index] -= 1
            if self._unread[node.index] == 0:
                self._drop(node.index)

    def _drop(self, index: int) -> None:
        self._values.pop(index, None)
        self.room += self._taken.pop(index, 0)


# -- The nodes ---------------------------------------------------------------------------------------------------------


class _LayerNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        index: int,
        step: Layer,
        memory: _Memory,
        inner: bool,
        bins: list[int],
        second_moment: bool,
        input_node: Any,
        input: Tensor,
        residual_node: Any,
        residual: Tensor | None,
        *parameters: Tensor | None,
    ) -> Any:
        padded = input if step.around is None else step.around(input)
        y, m1, m2, sums, mean, var, z = _forward_layer(step, padded, residual, parameters, bins, second_moment)
        ctx.index, ctx.step, ctx.memory, ctx.bins, ctx.inner = index, step, memory, bins, inner
        ctx.input_node, ctx.residual_node, ctx.source = input_node, residual_node, residual_node
        ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*_absent((y, m1, m2), bins, second_moment, True))
        needs_input, _, _, needs_weight, *_ = ctx.needs_input_grad[7:]
        ctx.reads_input = needs_input or needs_weight
        # Whether the input has the shape of the z behind it.
        ctx.behind_layer = input_node is not None and isinstance(input_node.step, Layer) and padded.shape == input.shape
        ctx.behind_layer = ctx.behind_layer and input_node.step.form.downsample == "none"
        if ctx.reads_input and input_node is not None:
            memory.readers[input_node.index] += 1
        if residual_node is not None:
            memory.readers[residual_node.index] += 1
        given_input = input if ctx.reads_input and input_node is None else None
        given_residual = residual if residual_node is None else None
        ctx.save_for_backward(given_input, given_residual, *parameters, mean, var, sums, z)
        return y, m1, m2

    @staticmethod
    def backward(ctx: Any, grad_y: Any, grad_m1: Any, grad_m2: Any) -> Any:
        with torch.no_grad():
            gradients = _backward_layer(ctx, grad_y, grad_m1, grad_m2)
        return (*[None] * 7, *_once_differentiable(gradients))


def _backward_layer(ctx: Any, grad_y: Any, grad_m1: Any, grad_m2: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the input, the residual and the parameters, as forward takes them."""
    step, memory = ctx.step, ctx.memory
    saved = memory.enter(ctx)
    z, sums = saved.pop(), saved.pop()
    input, residual, conv_weight, conv_bias, weight, bias, slope, mean, var = saved
    needs_input, _, needs_residual, needs_weight, needs_bias, *_ = ctx.needs_input_grad[7:]
    if step.residual is not None:
        residual = _value(memory, ctx.residual_node, residual)
    gradients = (grad_y, grad_m1, grad_m2)
    form = step.form_of(residual, slope, () if grad_m1 is None and grad_m2 is None else ctx.bins)
    common = (mean, var, weight, bias, *form)
    dgamma, dbeta, dslope = operators.bn_act_moments_backward_sums(z, *gradients, sums, *common)
    if _is_last_reader(ctx, sums):
        sums.untyped_storage().resize_(0)  # the weight gradient needs room
    count = z.numel() // z.size(1) if step.training else 0  # 0: the statistics do not depend on z
    last_reader = _is_last_reader(ctx, z)
    in_place = operators.conv_bn_act_moments_backward_ if last_reader else operators.conv_bn_act_moments_backward

    # Gradients of inner values are the engine's alone; with create_graph=True they are part of a graph.
    owned = ctx.inner and grad_y is not None and not grad_y.requires_grad and grad_y.stride() == z.stride()
    overwrite = bool(needs_residual and last_reader and owned and step.form.downsample == "none")

    def convolution_backward(
        operator: Any, input: Tensor, of_input: bool, of_weight: bool, of_residual: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return operator(
            z, *gradients, dgamma, dbeta, *common, count, input, conv_weight, *step.convolution, of_input, of_weight,
            of_residual, overwrite and of_residual,
        )  # fmt: skip

    grad_input = grad_weight = grad_bias = grad_residual = None
    if ctx.reads_input:
        input = _value(memory, ctx.input_node, input)
        if needs_input and step.around is not None:
            leaf, padded = _trace(step.around, input)
            grad_input, grad_weight, grad_residual = convolution_backward(
                in_place, padded.detach(), True, needs_weight, needs_residual
            )
            (grad_input,) = torch.autograd.grad(padded, leaf, grad_input)
            memory.read(ctx.input_node)
        elif needs_input and needs_weight and last_reader and ctx.behind_layer and _forms_dz(step, z, conv_weight):
            # One after the other, so that the input is gone when its gradient comes. That gradient does not depend on
            # the input's values: the z behind it, of the same shape, stands for it.
            _, grad_weight, _ = convolution_backward(operators.conv_bn_act_moments_backward, input, False, True, False)
            del input
            memory.read(ctx.input_node)
            stand_in = memory.saved(ctx.input_node)[-1]
            if not _has_input_gradient(step, z, conv_weight):
                _C.make_room(stand_in.nbytes)  # for the gradient, which comes from the library's memory
            grad_input, _, grad_residual = convolution_backward(in_place, stand_in, True, False, needs_residual)
        else:
            input = input if step.around is None else step.around(input)
            if needs_input and input.is_cpu and not _has_input_gradient(step, z, conv_weight):
                _C.make_room(input.nbytes)  # for the gradient, which comes from the library's memory
            grad_input, grad_weight, grad_residual = convolution_backward(
                in_place, input, needs_input, needs_weight, needs_residual
            )
            memory.read(ctx.input_node)
    elif needs_residual:
        dz_and_residual = operators.bn_act_moments_backward(z, *gradients, dgamma, dbeta, *common, count, True)
        grad_residual = dz_and_residual[1]
    if overwrite and ctx.reads_input:
        grad_residual = grad_y
    if step.residual is not None:
        del residual, form, common
        memory.read(ctx.residual_node)
    if last_reader:
        memory.room += z.nbytes
    if conv_bias is not None and needs_bias:
        # The sum of dz: zero behind batch statistics, which cancel any shift, gamma*rstd*dbeta behind fixed ones.
        grad_bias = torch.zeros_like(conv_bias)
        if count == 0:
            scale = torch.rsqrt(var + step.form.eps) * (1 if weight is None else weight)
            grad_bias = (scale * dbeta).to(conv_bias.dtype)
    if slope is not None and slope.numel() == 1:
        dslope = dslope.sum(0, keepdim=True)
    of_input = (grad_input if needs_input else None, None, grad_residual if needs_residual else None)
    of_convolution = (grad_weight if needs_weight else None, grad_bias)
    return (*of_input, *of_convolution, _like(dgamma, weight), _like(dbeta, bias), _like(dslope, slope))


def _forms_dz(step: Layer, z: Tensor, conv_weight: Tensor) -> bool:
    """Whether the weight gradient is likely to form dz in cache, so that z keeps its place until the input's gradient
    (docs/cpu.md). Elsewhere two calls would write dz twice."""
    if step.form.downsample == "space_to_depth":  # whose dz is written in parts
        return False
    channels, inputs = conv_weight.shape[:2]
    return _is_ours(_C.has_weight_gradient, step, z, conv_weight, channels, inputs)


def _has_input_gradient(step: Layer, z: Tensor, conv_weight: Tensor) -> bool:
    """Whether the gradient of the input is likely to come from this package's own convolution and memory."""
    channels, inputs = conv_weight.shape[:2]
    return _is_ours(_C.has_convolution, step, z, conv_weight, inputs, channels)


def _is_ours(has: Any, step: Layer, z: Tensor, conv_weight: Tensor, channels: int, inputs: int) -> bool:
    """Asks of 3x3 kernels with stride 1 on the CPU."""
    stride, _, dilation, groups = step.convolution
    if not z.is_cpu or (*conv_weight.shape[2:], *stride, *dilation, groups) != (3, 3, 1, 1, 1, 1, 1):
        return False
    if z.dtype not in (torch.float32, torch.bfloat16) or z.stride(1) != 1:
        return False
    n, _, height, width = z.shape
    return bool(has(n, channels, height, width, inputs, bfloat16=z.dtype == torch.bfloat16))


class _PoolNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: int, step: Pool, memory: _Memory, input_node: Any, input: Tensor) -> Any:
        ctx.index, ctx.step, ctx.memory = index, step, memory
        ctx.input_node = ctx.source = input_node
        if input_node is not None:
            memory.readers[input_node.index] += 1
        ctx.save_for_backward(input if input_node is None else None)
        return step.function(input)

    @staticmethod
    def backward(ctx: Any, grad_y: Any) -> Any:
        (input,) = ctx.memory.enter(ctx)
        with torch.no_grad():
            leaf, y = _trace(ctx.step.function, _value(ctx.memory, ctx.input_node, input))
        ctx.memory.read(ctx.input_node)
        return (None, None, None, None, *_once_differentiable(torch.autograd.grad(y, leaf, grad_y)))


def _value(memory: _Memory, node: Any, given: Tensor | None) -> Tensor:
    """What a step reads: the value of a node, or one that no node gave."""
    if node is not None:
        return memory.value_of(node)
    assert given is not None
    return given


def _trace(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf with the values of x, and ``function`` of it, with its graph."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return leaf, function(leaf)
