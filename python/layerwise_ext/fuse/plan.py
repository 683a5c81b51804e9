"""Where a model calls convolution, batch norm, addition and activation in a row: read off a symbolic trace.

The trace is that of :mod:`torch.fx`, of a copy of the model without data and without hooks, in training and in
evaluation mode. It decides what is worth deferring, and shows that nobody else reads what is deferred or writes over
what it is computed from. It is not what runs: the model's own ``forward`` does.
"""

from __future__ import annotations

import copy
import inspect
import operator
import random
import warnings
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from layerwise_ext.nn.conv import ConvBNReLU2d

from . import promise
from .hooks import Watched, has_hooks
from .promise import Expected

Frames = tuple[nn.Module, ...]  # the modules being called, outermost first

_ADDITIONS = (operator.add, torch.add)
_CHEAP_QUESTIONS = ("ndim", "dtype", "device")
_HARMLESS = (nn.Conv2d, nn.BatchNorm2d, nn.Identity, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)


class Skipped(NamedTuple):
    """A module that was left alone, and why."""

    name: str
    reason: str


class Pattern(NamedTuple):
    """One convolution and what is fused into it: modules of the model, or of a copy of it."""

    conv: nn.Conv2d
    bn: nn.Module
    owners: Frames  # the convolution's caller, its caller, ... as far as the promise goes
    bn_watched: tuple[tuple[int, nn.Module], ...]  # (level, module): see hooks.Watched
    watched: tuple[tuple[int, nn.Module], ...]
    expected: Expected
    activation: str | None


# -- The trace ---------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Notes for each node the modules being called; calls ``forward`` of what is no leaf without any hooks."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.stack = [root]
        self.frames: dict[fx.Node, Frames] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.BatchNorm2d):
            return type(m).forward is nn.BatchNorm2d.forward
        return isinstance(m, (nn.Conv2d, ConvBNReLU2d)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        self.stack.append(m)
        try:
            return m.forward(*args, **kwargs)
        finally:
            self.stack.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.frames[node] = tuple(self.stack)
        return node


def _defaults(forward: Any) -> dict[str, Any]:
    """Arguments of ``forward`` that are left at their defaults: options, not tensors."""
    parameters = inspect.signature(forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p.default for p in positional if p.default is not p.empty}


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose tensors hold no data, and which has no hooks: tracing it touches nothing of the model.

    Raises:
        Exception: whatever copying one of its attributes raises.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in module.__dict__.items():
            if name.endswith("_hooks") or "_hooks_" in name:
                memo[id(value)] = OrderedDict()
        values = (*module.__dict__.values(), *module._parameters.values(), *module._buffers.values())
        for t in values:
            if isinstance(t, Tensor) and not is_lazy(t):
                empty = torch.empty_like(t, device="meta", requires_grad=False)
                memo[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _trace(module: nn.Module, training: bool) -> _Graph:
    module.train(training)
    tracer = _Tracer(module)
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            graph = tracer.trace(module, _defaults(type(module).forward))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    return _Graph(module, graph, tracer.frames)


# -- Patterns in it ----------------------------------------------------------------------------------------------------


class _Graph:
    """The trace of one module in one mode."""

    def __init__(self, root: nn.Module, graph: fx.Graph, frames: dict[fx.Node, Frames]) -> None:
        self.root = root
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.frames = frames
        self.summands: dict[fx.Node, dict[int, nn.Conv2d]] = {}  # of an addition, by the argument's position
        self.called = Counter(id(m) for node in self.nodes if (m := self.normalises(node) or self.module(node)))

    def convolutions(self) -> dict[nn.Conv2d, Pattern | str]:
        """Each convolution with its pattern, or the reason why it has none."""
        found: dict[nn.Conv2d, Pattern | str] = {}
        for node in self.nodes:
            module = self.module(node)
            if isinstance(module, nn.Conv2d):
                found[module] = self.match(node, module)
        # Where two batch norms are added, the left one, which may be added to in place, takes the result of the other.
        for summands in self.summands.values():
            for _, conv in sorted(summands.items())[1:]:
                found[conv] = _without_following(cast(Pattern, found[conv]))
        return found

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def normalises(self, node: fx.Node) -> nn.Module | None:
        """The batch norm module that ``node`` is the call of."""
        if node.op == "call_function" and node.target is F.batch_norm:
            caller = self.frames[node][-1]
            return caller if isinstance(caller, nn.BatchNorm2d) else None
        module = self.module(node)
        return module if isinstance(module, nn.BatchNorm2d) else None

    def readers(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if not _is_cheap_question(user)]

    def match(self, conv_node: fx.Node, conv: nn.Conv2d) -> Pattern | str:
        readers = self.readers(conv_node)
        if len(readers) != 1:
            return f"its output is read in {len(readers)} places"
        bn_node, frames = readers[0], self.frames[conv_node]
        bn = self.normalises(bn_node)
        if bn is None:
            return f"its output goes to {self.describe(bn_node)}, not to a BatchNorm2d"
        if self.called[id(conv)] > 1 or self.called[id(bn)] > 1:
            return "it, or its batch norm, is called more than once"
        inner = self.frames[bn_node][len(frames) :]
        if self.frames[bn_node] != frames and inner != (bn,):
            return "its batch norm is called by another module"
        if not self.is_quiet(conv_node, bn_node):
            return "other operations run between it and its batch norm"
        plain = Pattern(conv, bn, frames[-1:], ((0, bn),), (), Expected(), None)
        if conv_node.args[1:] or conv_node.kwargs or bn_node.args[:1] != (conv_node,):
            return "it is called with more than its input"
        return self.extend(plain, conv_node, bn_node)

    def extend(self, plain: Pattern, conv_node: fx.Node, bn_node: fx.Node) -> Pattern:
        """``plain`` with the addition and the activation that follow it."""
        node, watched = self.through_identities(bn_node)
        reader = self.only_reader(node)
        if reader is not None and self.adds(reader, node):
            summed, more = self.through_identities(reader)
            final = self.only_reader(summed)
            for last, steps in ((final, watched + more), (reader, watched)):
                activation = self.activation(last) if last is not reader else None
                if last is not None and (activation or last is reader):
                    pattern = self.finish(plain, conv_node, [*steps, reader, last], True, activation)
                    if pattern is not None:
                        self.summands.setdefault(reader, {})[reader.args.index(node)] = plain.conv
                        return pattern
        elif reader is not None and (activation := self.activation(reader)):
            return self.finish(plain, conv_node, [*watched, reader], False, activation) or plain
        return plain

    def finish(
        self, plain: Pattern, conv_node: fx.Node, steps: list[fx.Node], add: bool, activation: str | None
    ) -> Pattern | None:
        """The pattern that ends with the last of ``steps``, calls that get the promise; None if it cannot be."""
        last = steps[-1]
        if not self.is_quiet(conv_node, last, steps):
            return None
        frames = self.frames[conv_node]
        watched: list[tuple[int, nn.Module]] = []
        exits = 0
        for step in steps:
            common = _common(frames, self.frames[step])
            if not common:
                return None
            level = len(frames) - len(common)
            exits = max(exits, level)
            inner = self.frames[step][len(common) :]
            leaf = self.module(step)
            watched += [(level, m) for m in (*inner, *((leaf,) if leaf else ()))]
        watched += [(level, frames[-1 - level]) for level in range(exits)]
        owners = tuple(reversed(frames))[: exits + 1]
        expected = Expected(add, activation is not None, exits)
        return plain._replace(owners=owners, watched=tuple(watched), expected=expected, activation=activation)

    def only_reader(self, node: fx.Node) -> fx.Node | None:
        readers = self.readers(node)
        return readers[0] if len(readers) == 1 else None

    def through_identities(self, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        passed: list[fx.Node] = []
        while (reader := self.only_reader(node)) is not None and type(self.module(reader)) is nn.Identity:
            passed.append(reader)
            node = reader
        return node, passed

    def adds(self, reader: fx.Node, node: fx.Node) -> bool:
        """Whether ``reader`` adds another map to ``node``. A trace shows ``a += b`` as ``a + b``."""
        if reader.target not in _ADDITIONS or len(reader.args) != 2 or reader.kwargs:
            return False
        return all(isinstance(arg, fx.Node) for arg in reader.args) and reader.args[0] is not reader.args[1]

    def activation(self, node: fx.Node | None) -> str | None:
        """The name of the activation that ``node`` is a call of, if the operator has it."""
        if node is None:
            return None
        if node.op == "call_function":
            found = promise.activation_of(node.target, node.args, node.kwargs)
            return None if found is None else str(found["activation"])
        module = self.module(node)
        return None if module is None else promise.activation_of_module(module)

    def is_quiet(self, first: fx.Node, last: fx.Node, steps: Sequence[fx.Node] = ()) -> bool:
        """Whether nothing between the two, but ``steps``, could write over what ``last`` will be computed from."""
        between = self.nodes[self.position[first] + 1 : self.position[last]]
        return all(node in steps or self.is_harmless(node, first) for node in between)

    def is_harmless(self, node: fx.Node, first: fx.Node) -> bool:
        if node.op == "get_attr" or _is_cheap_question(node) or node.target in (operator.eq, torch._assert):
            return True
        if self.normalises(node) or isinstance(self.module(node), _HARMLESS):
            return True
        if node.target not in _ADDITIONS and not self.activation(node):
            return False
        # It may write over its argument: let that be a result that came after ``first`` and that nobody else reads.
        source = node.args[0]
        if not isinstance(source, fx.Node) or self.position[source] < self.position[first] or len(source.users) > 1:
            return False
        return isinstance(self.module(source), nn.Conv2d) or self.normalises(source) is not None

    def describe(self, node: fx.Node) -> str:
        if node.op == "output":
            return "the caller"
        module = self.module(node)
        return type(module).__name__ if module else getattr(node.target, "__name__", str(node.target))


def _is_cheap_question(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "dim"
    return node.target is getattr and node.args[1] in _CHEAP_QUESTIONS


def _common(a: Frames, b: Frames) -> Frames:
    count = 0
    for left, right in zip(a, b, strict=False):
        if left is not right:
            break
        count += 1
    return a[:count]


# -- The plan ----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What to fuse, by names in the model."""

    patterns: tuple[Pattern, ...]
    skipped: tuple[Skipped, ...]


def make(model: nn.Module) -> Plan:
    """Finds the patterns of ``model``, without changing anything of it."""
    names = {id(m): name for name, m in model.named_modules()}
    try:
        twin = skeleton(model)
        original = dict(zip(map(id, twin.modules()), model.modules(), strict=True))
    except Exception as error:
        reason = f"the model cannot be copied for tracing ({_first_line(error)})"
        return Plan((), tuple(Skipped(names[id(m)], reason) for m in model.modules() if isinstance(m, nn.Conv2d)))

    found: dict[nn.Module, list[Pattern | str]] = {}
    _collect(twin, found)
    patterns, skipped = [], []
    for module in twin.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        conv = cast(nn.Conv2d, original[id(module)])
        outcome = _unsuitable(conv) or _combine(found.get(module, ["no forward calls it"]))
        if isinstance(outcome, Pattern):
            outcome = _unsuitable_batch_norm(original[id(outcome.bn)], conv) or _of(original, outcome)
        if isinstance(outcome, str):
            skipped.append(Skipped(names[id(conv)], outcome))
        else:
            patterns.append(outcome)
    return Plan(tuple(patterns), tuple(skipped))


def _collect(module: nn.Module, found: dict[nn.Module, list[Pattern | str]]) -> None:
    """Traces ``module``, or where that fails each of its children."""
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions or convolutions == [module]:
        return
    try:
        outcomes = [o for training in (True, False) for o in _trace(module, training).convolutions().items()]
    except Exception as error:
        for child in module.children():
            _collect(child, found)
        for conv in convolutions:
            found.setdefault(conv, [f"{type(module).__name__}.forward cannot be traced ({_first_line(error)})"])
    else:
        for conv, outcome in outcomes:
            found.setdefault(conv, []).append(outcome)


def _combine(outcomes: list[Pattern | str]) -> Pattern | str:
    """One outcome for both modes: what is a pattern in each in which the convolution is called."""
    first = outcomes[0]
    for other in outcomes[1:]:
        if isinstance(first, str) or isinstance(other, str):
            return first if isinstance(first, str) else str(other)
        if first.bn is not other.bn or first.owners[0] is not other.owners[0]:
            return "training and evaluation differ in its batch norm"
        if first != other:  # another activation, or an addition in one of them only
            first = _without_following(first)
    return first


def _without_following(pattern: Pattern) -> Pattern:
    return pattern._replace(owners=pattern.owners[:1], watched=(), expected=Expected(), activation=None)


def _of(original: dict[int, nn.Module], pattern: Pattern) -> Pattern:
    """``pattern`` in terms of the model itself."""
    return pattern._replace(
        conv=cast(nn.Conv2d, original[id(pattern.conv)]),
        bn=original[id(pattern.bn)],
        owners=tuple(original[id(m)] for m in pattern.owners),
        bn_watched=tuple((level, original[id(m)]) for level, m in pattern.bn_watched),
        watched=tuple((level, original[id(m)]) for level, m in pattern.watched),
    )


def _unsuitable(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot be deferred, whatever follows it."""
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return f"{type(conv).__name__} has a forward of its own"
    if isinstance(conv, LazyModuleMixin) and conv.has_uninitialized_params():
        return "it is not initialised: run the model once"
    if conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        return "it has hooks, which would see no output"
    return None


def _unsuitable_batch_norm(bn: nn.Module, conv: nn.Conv2d) -> str | None:
    if has_hooks(bn):
        return f"its batch norm, {type(bn).__name__}, has hooks, which would see no input"
    if isinstance(bn, LazyModuleMixin) and bn.has_uninitialized_params():
        return "its batch norm is not initialised: run the model once"
    if conv.out_channels != bn.num_features:
        return f"it gives {conv.out_channels} channels, but its batch norm normalises {bn.num_features}"
    return None


def watch(pattern: Pattern, modules: tuple[tuple[int, nn.Module], ...]) -> tuple[Watched, ...]:
    """``modules`` by their paths in the pattern's owners.

    Raises:
        LookupError: a module is not below its owner.
    """
    return tuple(Watched(level, path(pattern.owners[level], m), type(m)) for level, m in modules)


def path(owner: nn.Module, module: nn.Module) -> tuple[str, ...]:
    for name, m in owner.named_modules():
        if m is module:
            return tuple(name.split(".")) if name else ()
    raise LookupError(f"{type(module).__name__} is not a child of the {type(owner).__name__} that calls it")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
