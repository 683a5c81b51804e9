"""Promises: what a fused model hands from a convolution to its batch norm and its activation.

PyTorch's functions ask an argument that is no tensor for ``__torch_function__``. That is all that is needed here: the
model's own modules and its own ``forward`` run as ever, a convolution returns a :class:`Promise` of its result, batch
norm and addition write themselves down in it, and the activation computes everything with one operator. Whatever else
reads a promise gets the tensor that the unfused modules would have given, so a program that does something unexpected
is slower, not wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from layerwise_ext import functional
from layerwise_ext.nn.conv import describe_activation

_MAP_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float64, torch.float16),
}


# -- Activations -------------------------------------------------------------------------------------------------------
#
# Each function that PyTorch's activation modules call, with its own arguments, to the options of conv_bn_act.

Options = dict[str, Any]


def _named(name: str) -> Callable[..., Options]:
    return lambda input, inplace=False: {"activation": name}


def _leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Options:
    return {"activation": "leaky_relu", "negative_slope": negative_slope}


def _prelu(input: Any, weight: Any) -> Options:
    return {"activation": "prelu", "slope": weight}


def _rrelu(
    input: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Options:
    if training:
        return {"activation": "rrelu", "negative_slope": lower, "upper_slope": upper}
    return {"activation": "leaky_relu", "negative_slope": (lower + upper) / 2}


def _hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Options | None:
    return {"activation": "relu6"} if (min_val, max_val) == (0.0, 6.0) else None


def _gelu(input: Any, approximate: str = "none") -> Options:
    return {"activation": "gelu" if approximate == "none" else "gelu_tanh"}


_ACTIVATION_FUNCTIONS: dict[Any, Callable[..., Options | None]] = {
    F.relu: _named("relu"),
    torch.relu: _named("relu"),
    torch.relu_: _named("relu"),
    F.leaky_relu: _leaky_relu,
    F.prelu: _prelu,
    F.rrelu: _rrelu,
    F.relu6: _named("relu6"),
    F.hardtanh: _hardtanh,  # nn.ReLU6
    F.silu: _named("silu"),
    F.hardswish: _named("hardswish"),
    F.gelu: _gelu,
    torch.tanh: _named("tanh"),
    torch.sigmoid: _named("sigmoid"),
}


def activation_of(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Options | None:
    """Options of the operator for a call of ``function``; None where it has no such activation."""
    describe = _ACTIVATION_FUNCTIONS.get(function)
    return None if describe is None else describe(*args, **kwargs)


def activation_of_module(module: nn.Module) -> str | None:
    """The name of the activation that ``module`` is, if the operator has it."""
    if isinstance(module, nn.Identity):
        return None
    try:
        return describe_activation(module)[0]
    except TypeError:
        return None


_ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


# -- State that a computation depends on -------------------------------------------------------------------------------


class GradMode:
    """What decides how autograd records: it must not change between a convolution and its activation."""

    def __init__(self) -> None:
        self.enabled = torch.is_grad_enabled()
        self.hooks = _saved_tensors_hooks()

    def is_unchanged(self) -> bool:
        if self.enabled != torch.is_grad_enabled():
            return False
        return torch.compiler.is_compiling() or self.hooks == _saved_tensors_hooks()


def _saved_tensors_hooks() -> Any:
    """Those of a checkpoint, for one."""
    return None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(True)


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _version(t: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or t.is_inference() else t._version


def _is_plain(t: Any) -> bool:
    """A tensor of a tracer or of another subclass is theirs to interpret; a compiler's is as good as plain."""
    return type(t) in (Tensor, nn.Parameter) or (torch.compiler.is_compiling() and isinstance(t, Tensor))


def is_deferrable(x: Any) -> bool:
    """Whether the operator takes such an input in this state of PyTorch."""
    if not _is_plain(x) or x.dim() != 4 or x.dtype not in _MAP_DTYPES.get(x.device.type, ()) or x.numel() == 0:
        return False
    if torch.compiler.is_compiling():
        return True
    # Tracers and transforms (vmap, grad, jvp) see plain tensors, too.
    return (
        x.layout is torch.strided
        and not x.is_mkldnn
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
    )


# -- Promises ----------------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """What follows batch norm: wait for ``add``, then for ``act``; the result leaves ``exits`` modules on the way."""

    add: bool = False
    act: bool = False
    exits: int = 0


class Scope:
    """One call, in progress, of a module whose convolutions may be deferred.

    Attributes:
        mode: :class:`GradMode` when it began.
        waiting: promises that are to update running statistics, whether somebody reads them or not.
    """

    def __init__(self, owner: nn.Module, caller: Scope | None) -> None:
        self.owner = owner
        self.caller = caller
        self.mode = GradMode()
        self.waiting: list[Promise] = []

    def wait_for(self, promise: Promise) -> None:
        self.waiting = [p for p in self.waiting if not p.is_fulfilled]
        self.waiting.append(promise)

    def settle(self) -> None:
        for promise in self.waiting:
            if not promise.is_fulfilled:
                promise.tensor()
        self.waiting = []


class ConvInput:
    """Stands for the input of a convolution that is to return a promise."""

    def __init__(self, x: Tensor, scope: Scope, expected: Expected) -> None:
        self.x = x
        self.scope = scope
        self.expected = expected
        self.version = _version(x)
        self.autocast = _autocast(x.device.type)
        enabled, dtype = self.autocast
        self.dtype = dtype if enabled and x.dtype != torch.float64 else x.dtype  # of the convolution's result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls):
            if func is F.conv2d:
                convolution = first._convolution(*args[1:], **kwargs)
                return F.conv2d(first.x, *args[1:], **kwargs) if convolution is None else Promise(first, convolution)
            if func is F.pad:  # padding_mode other than 'zeros'
                return cls(F.pad(first.x, *args[1:], **kwargs), first.scope, first.expected)
        return func(*_tensors(args), **_tensors(kwargs))

    def _convolution(
        self, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> tuple[Any, ...] | None:
        """The arguments of ``conv2d``, padding in numbers; None where the operator refuses what PyTorch may take."""
        x = self.x
        if not _is_plain(weight) or weight.device != x.device or self.dtype not in _MAP_DTYPES[x.device.type]:
            return None
        if weight.dtype != x.dtype and not self.autocast[0]:
            return None
        if padding == "valid":
            padding = 0
        elif padding == "same":
            if tuple(stride) != (1, 1):
                return None
            height, width = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
            padding = (height // 2, width // 2)
            if height % 2 or width % 2:  # the odd row or column goes to the end
                x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
                padding = (0, 0)
        return x, weight, bias, stride, padding, dilation, groups

    def tensor(self) -> Tensor:
        return self.x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)


class Promise:
    """The result of ``conv2d``, of ``batch_norm`` of that, or of an addition to that, not computed yet.

    Attributes:
        convolution: input, weight, bias, stride, padding, dilation, groups.
        batch_norm: arguments of :func:`torch.nn.functional.batch_norm` after the first; None before batch norm.
        residual: ``[N, C, H, W]``, added after batch norm; None without an addition.
    """

    def __init__(
        self, source: ConvInput, convolution: tuple[Any, ...], batch_norm: Any = None, residual: Tensor | None = None
    ) -> None:
        self.source = source
        self.convolution = convolution
        self.batch_norm = batch_norm
        self.residual = residual
        self.exits = source.expected.exits
        self.dtype = source.dtype
        self.is_fulfilled = False  # by what follows it
        self._residual_version = 0 if residual is None else _version(residual)
        self._tensor: Tensor | None = None

    ndim = 4  # with dim(), dtype and device: what may be asked without computing anything

    def dim(self) -> int:
        return 4

    @property
    def device(self) -> torch.device:
        return self.source.x.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func is F.batch_norm and isinstance(first, cls):
            return first._normalise(*args[1:], **kwargs)
        if isinstance(first, cls) and first._is_open(normalised=True):
            activation = activation_of(func, args, kwargs)
            if activation is not None:
                return first._compute(**activation)
        if func in _ADDITIONS and len(args) == 2 and not kwargs:
            pair = args if isinstance(first, cls) else (args[1], first)
            return pair[0]._add(pair[1])
        return func(*_tensors(args), **_tensors(kwargs))

    def __add__(self, other: Any) -> Any:
        return self._add(other)

    def __iadd__(self, other: Any) -> Any:  # nothing else can see the sum that this would have overwritten
        return self._add(other) if self._takes(other) else self.tensor().add_(_tensors(other))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def tensor(self) -> Tensor:
        """What the unfused modules would have given."""
        if self._tensor is None:
            grad, (enabled, dtype) = self.source.scope.mode.enabled, self.source.autocast
            with torch.set_grad_enabled(grad), torch.autocast(self.device.type, dtype, enabled):
                self._check_unchanged()
                if self.batch_norm is None:
                    self._tensor = F.conv2d(*self.convolution)
                elif self.is_fulfilled:  # the running statistics have seen this batch
                    self._tensor = self._again()
                else:
                    self._tensor = self._compute("identity")
        return self._tensor

    def _normalise(
        self,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        if any(p.batch_norm[0] is running_mean for p in self.source.scope.waiting):
            self.source.scope.settle()  # one batch after the other
        arguments = (running_mean, running_var, weight, bias, training, momentum, eps)
        tensors = [t for t in arguments[:4] if t is not None]
        device, dtypes = self.device, (self.dtype, self.dtype if self.dtype == torch.float64 else torch.float32)
        if not (
            self._is_open(normalised=False)
            and all(_is_plain(t) and t.dtype in dtypes and t.device == device for t in tensors)
            and (running_mean is None) == (running_var is None)
            and (training or running_mean is not None)
            and 0.0 <= momentum <= 1.0
            and eps > 0.0
        ):
            return F.batch_norm(self.tensor(), *arguments)
        promise = self._next(arguments)
        expected = self.source.expected
        if not (expected.act or expected.add):
            return promise._compute("identity")
        if promise._updates_statistics():
            self.source.scope.wait_for(promise)
        return promise

    def _next(self, batch_norm: tuple[Any, ...], residual: Tensor | None = None) -> Promise:
        promise = Promise(self.source, self.convolution, batch_norm, residual)
        self.is_fulfilled = True
        return promise

    def _updates_statistics(self) -> bool:
        return bool(self.batch_norm[4]) and self.batch_norm[0] is not None

    def _again(self) -> Tensor:
        running_mean, running_var, weight, bias, training, _, eps = self.batch_norm
        if training:
            running_mean = running_var = None
        y = F.batch_norm(F.conv2d(*self.convolution), running_mean, running_var, weight, bias, training, eps=eps)
        return y if self.residual is None else y + self.residual

    def _takes(self, other: Any) -> bool:
        """Whether the operator can add ``other``: a map of the same shape, dtype and device."""
        if not (self.source.expected.add and self._is_open(normalised=True) and _is_plain(other)):
            return False
        x, weight, _, stride, padding, dilation, _ = self.convolution
        shape = (x.size(0), weight.size(0), *functional._conv_size(x, weight, stride, padding, dilation))
        same_kind = other.dtype == self.dtype and other.device == self.device
        return same_kind and tuple(other.shape) == shape and self.residual is None

    def _add(self, other: Any) -> Any:
        if not self._takes(other):
            return self.tensor() + _tensors(other)
        promise = self._next(self.batch_norm, other)
        if not self.source.expected.act:
            return promise._compute("identity")
        if promise._updates_statistics():
            self.source.scope.wait_for(promise)
        return promise

    def _is_open(self, normalised: bool) -> bool:
        """Whether what follows may still be fused: not computed yet, and PyTorch in the state it was in."""
        if self.is_fulfilled or self._tensor is not None or (self.batch_norm is not None) != normalised:
            return False
        return self.source.scope.mode.is_unchanged() and _autocast(self.device.type) == self.source.autocast

    def _check_unchanged(self) -> None:
        residual = 0 if self.residual is None else _version(self.residual)
        if self.source.version != _version(self.source.x) or self._residual_version != residual:
            raise RuntimeError(
                "a fused convolution's input or residual was modified in place before its batch norm and activation "
                "ran: this model needs layerwise_ext.unfuse_(model)"
            )

    def _compute(self, activation: str, **options: Any) -> Tensor:
        self._check_unchanged()
        self.is_fulfilled = True
        x, conv_weight, conv_bias, stride, padding, dilation, groups = self.convolution
        running_mean, running_var, weight, bias, training, momentum, eps = self.batch_norm
        return functional.conv_bn_act(
            x, conv_weight, conv_bias, running_mean, running_var, weight, bias,
            stride=stride, padding=padding, dilation=dilation, groups=groups, training=training, momentum=momentum,
            eps=eps, activation=activation, residual=self.residual, **options,
        )  # fmt: skip


def _operator(name: str) -> Callable[..., Any]:
    def method(self: Promise, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*_tensors(args))

    return method


# Python looks these up in the class.
for _name in (
    *("radd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv", "itruediv", "floordiv", "mod"),
    *("pow", "rpow", "matmul", "rmatmul", "neg", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne", "and", "or"),
    *("getitem", "setitem", "len", "iter", "bool", "float", "int", "contains"),
):
    setattr(Promise, f"__{_name}__", _operator(f"__{_name}__"))
Promise.__hash__ = object.__hash__  # type: ignore[method-assign]


def _tensors(tree: Any) -> Any:
    """``tree`` with tensors in the place of promises."""
    return pytree.tree_map_only((ConvInput, Promise), lambda promise: promise.tensor(), tree)


def resolve(tree: Any) -> Any:
    """``tree`` itself, or a copy with tensors where it holds promises."""
    if isinstance(tree, Tensor):
        return tree
    return _tensors(tree) if any(isinstance(leaf, Promise) for leaf in pytree.tree_leaves(tree)) else tree
