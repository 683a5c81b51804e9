"""Promises: what a fused model hands from a convolution to its batch norm and its activation.

PyTorch's functions ask an argument that is no tensor for ``__torch_function__``. That is all that is needed here: the
model's own modules and its own ``forward`` run as ever, a convolution returns a :class:`Promise` of its result, batch
norm and addition write themselves down in it, and the activation computes everything with one operator. Whatever else
reads a promise gets the tensor that the unfused modules would have given, so a program that does something unexpected
is slower, not wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from layerwise_ext import functional
from layerwise_ext.nn.conv import describe_activation

_DEVICES = ("cpu", "cuda")
_MAP_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    if describe is None or "out" in kwargs:  # the operator's result is a new tensor
        return None
    return describe(*args, **kwargs)


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

_PLAIN_TYPES = (Tensor, nn.Parameter)


def grad_mode() -> tuple[bool, Any]:
    """What decides how autograd records: whether it does, and the hooks on saved tensors (a checkpoint's, for one)."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled(), None
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)


def _autocast(device_type: str) -> torch.dtype | None:
    """The dtype in which autocast computes convolutions; None without it."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _version(t: Tensor) -> int | None:
    """How often ``t`` was written over; None where nobody counts that."""
    return None if torch.compiler.is_compiling() or t.is_inference() else t._version


def _is_plain(t: Any) -> bool:
    """A tensor of a tracer or of another subclass is theirs to interpret; a compiler's is as good as plain."""
    return type(t) in _PLAIN_TYPES or (torch.compiler.is_compiling() and isinstance(t, Tensor))


def is_deferrable(x: Any) -> bool:
    """Whether the operator takes such an input in this state of PyTorch."""
    if not _is_plain(x) or x.dim() != 4 or x.numel() == 0:
        return False
    if x.device.type not in _DEVICES or x.dtype not in _MAP_DTYPES:
        return False
    if torch.compiler.is_compiling():
        return True
    # Tracers and transforms (vmap, grad, jvp) see plain tensors, too.
    return (
        x.layout is torch.strided
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
        mode: :func:`grad_mode` when it began.
        waiting: promises that are to update running statistics, whether somebody reads them or not.
    """

    def __init__(self, owner: nn.Module, caller: Scope | None) -> None:
        self.owner = owner
        self.caller = caller
        self.mode = grad_mode()
        self.waiting: list[Promise] = []

    def wait_for(self, promise: Promise) -> None:
        self.waiting = [p for p in self.waiting if not p.is_fulfilled]
        self.waiting.append(promise)

    def settle(self) -> None:
        for promise in self.waiting:
            if not promise.is_fulfilled:
                promise.tensor()
        self.waiting = []


class Call:
    """One call of a deferred convolution: its input, and what must stay as it was until its activation.

    It is no part of the objects that stand for tensors because every attribute of those, who have ``__getattr__``, is
    slow to read.

    Attributes:
        mode: :func:`grad_mode` and :func:`_autocast` at the call.
        version: :func:`_version` of ``x`` at the call.
        dtype: of the convolution's result.
    """

    def __init__(self, x: Tensor, scope: Scope, expected: Expected) -> None:
        self.x = x
        self.scope = scope
        self.expected = expected
        self.device = x.device
        self.device_type = self.device.type
        self.autocast = _autocast(self.device_type)
        self.mode = (scope.mode, self.autocast)
        self.version = _version(x)
        self.dtype = x.dtype if self.autocast is None or x.dtype == torch.float64 else self.autocast

    def convolution(
        self, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> tuple[Any, ...] | None:
        """The arguments of ``conv2d``, padding in numbers; None where the operator refuses what PyTorch may take."""
        x = self.x
        if not _is_plain(weight) or weight.device != self.device or self.dtype not in _MAP_DTYPES:
            return None
        if weight.dtype != x.dtype and self.autocast is None:
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

    def takes_per_channel(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether the operator reads such statistics, scale and shift."""
        dtypes = (self.dtype, torch.float64 if self.dtype == torch.float64 else torch.float32)
        for t in tensors:
            if t is not None and not (_is_plain(t) and t.dtype in dtypes and t.device == self.device):
                return False
        return True


class ConvInput:
    """Stands for the input of a convolution that is to return a promise."""

    def __init__(self, call: Call) -> None:
        self.call = call

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls):
            call = first.call
            if func is F.conv2d:
                convolution = call.convolution(*args[1:], **kwargs)
                return F.conv2d(call.x, *args[1:], **kwargs) if convolution is None else Promise(call, convolution)
            if func is F.pad:  # padding_mode other than 'zeros'
                return cls(Call(F.pad(call.x, *args[1:], **kwargs), call.scope, call.expected))
        return func(*_tensors(args), **_tensors(kwargs))

    def tensor(self) -> Tensor:
        return self.call.x

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
        self, call: Call, convolution: tuple[Any, ...], batch_norm: Any = None, residual: Tensor | None = None
    ) -> None:
        self.call = call
        self.convolution = convolution
        self.batch_norm = batch_norm
        self.residual = residual
        self.exits = call.expected.exits
        self.dtype = call.dtype
        self.is_fulfilled = False  # by what follows it
        self._residual_version = None if residual is None else _version(residual)
        self._tensor: Tensor | None = None

    ndim = 4  # with dim(), dtype and device: what may be asked without computing anything

    def dim(self) -> int:
        return 4

    @property
    def device(self) -> torch.device:
        return self.call.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls):
            if func is F.batch_norm:
                return first._normalise(*args[1:], **kwargs)
            if func in _ACTIVATION_FUNCTIONS and first._is_open(normalised=True):
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
        promise = self._sum(other)
        return self.tensor().add_(_tensors(other)) if promise is None else promise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def tensor(self) -> Tensor:
        """What the unfused modules would have given."""
        if self._tensor is None:
            call = self.call
            (grad_enabled, _), dtype = call.mode
            with torch.set_grad_enabled(grad_enabled), torch.autocast(call.device_type, dtype, dtype is not None):
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
        call = self.call
        scope, expected = call.scope, call.expected
        for earlier in scope.waiting:
            if earlier.batch_norm[0] is running_mean:
                scope.settle()  # one batch after the other
                break
        arguments = (running_mean, running_var, weight, bias, training, momentum, eps)
        if not (
            self._is_open(normalised=False)
            and call.takes_per_channel(arguments[:4])
            and (running_mean is None) == (running_var is None)
            and (training or running_mean is not None)
            and 0.0 <= momentum <= 1.0
            and eps > 0.0
        ):
            return F.batch_norm(self.tensor(), *arguments)
        promise = Promise(call, self.convolution, arguments)
        return self._hand_over(promise, expected.act or expected.add)

    def _hand_over(self, promise: Promise, more_follows: bool) -> Any:
        """``promise`` takes the place of this one, and is computed unless it is to wait for what follows."""
        self.is_fulfilled = True
        if not more_follows:
            return promise._compute("identity")
        running_mean, _, _, _, training, _, _ = promise.batch_norm
        if training and running_mean is not None:
            self.call.scope.wait_for(promise)
        return promise

    def _again(self) -> Tensor:
        running_mean, running_var, weight, bias, training, _, eps = self.batch_norm
        if training:
            running_mean = running_var = None
        y = F.batch_norm(F.conv2d(*self.convolution), running_mean, running_var, weight, bias, training, eps=eps)
        return y if self.residual is None else y + self.residual

    def _takes(self, other: Any) -> bool:
        """Whether the operator can add ``other``: a map of the same shape, dtype and device."""
        call = self.call
        if not (call.expected.add and self.residual is None and _is_plain(other) and self._is_open(normalised=True)):
            return False
        x, weight, _, stride, padding, dilation, _ = self.convolution
        shape = (x.size(0), weight.size(0), *functional._conv_size(x.shape, weight, stride, padding, dilation))
        return other.dtype == call.dtype and other.device == call.device and tuple(other.shape) == shape

    def _sum(self, other: Any) -> Any:
        """This and ``other``; None where the operator does not add them."""
        if not self._takes(other):
            return None
        promise = Promise(self.call, self.convolution, self.batch_norm, other)
        return self._hand_over(promise, self.call.expected.act)

    def _add(self, other: Any) -> Any:
        promise = self._sum(other)
        return self.tensor() + _tensors(other) if promise is None else promise

    def _is_open(self, normalised: bool) -> bool:
        """Whether what follows may still be fused: not computed yet, and PyTorch in the state it was in."""
        if self.is_fulfilled or self._tensor is not None or (self.batch_norm is not None) != normalised:
            return False
        call = self.call
        return (grad_mode(), _autocast(call.device_type)) == call.mode

    def _check_unchanged(self) -> None:
        call, residual_version = self.call, self._residual_version
        if (call.version is not None and call.x._version != call.version) or (
            residual_version is not None and cast(Tensor, self.residual)._version != residual_version
        ):
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
