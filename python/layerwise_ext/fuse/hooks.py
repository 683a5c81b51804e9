"""The hooks that :func:`layerwise_ext.fuse_` registers: on convolutions, and on the modules that call them.

A convolution is deferred only while the module that was seen to call it is being called, with its batch norm and its
activation in their places and without hooks of their own: called from elsewhere, or after such a change, it is an
ordinary convolution. The hooks know their modules by name, so that copies and pickles of the model are fused, too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import module as _module
from torch.utils.hooks import RemovableHandle

from .promise import Call, ConvInput, Expected, Promise, Scope, grad_mode, is_deferrable, resolve

Path = tuple[str, ...]


class _Innermost:
    def __init__(self) -> None:
        self.scope: Scope | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.innermost = _Innermost()  # torch.compile follows changes of this object, but not of the thread's


_thread = _Thread()


class Watched(NamedTuple):
    """A module that gets or gives a promise, relative to the owner ``level`` calls above the convolution's."""

    level: int
    path: Path
    type: type[nn.Module]


_NOTHING = Expected()


class _Hook:
    handle: RemovableHandle  # kept here, it travels with a copy or a pickle of the module, and so does its id


class EnterScope(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        caller = scope = _thread.innermost.scope
        while scope is not None:  # an interrupted call (KeyboardInterrupt) leaves its scopes behind
            if scope.owner is module:
                caller = scope.caller
            scope = scope.caller
        _thread.innermost.scope = Scope(module, caller)


class LeaveScope(_Hook):
    """Also after an error; a promise does not leave the module, unless it is expected to."""

    def __call__(self, module: nn.Module, args: Any, result: Any) -> Any:
        scope = _thread.innermost.scope
        if scope is None or scope.owner is not module:  # an earlier hook failed
            return None
        _thread.innermost.scope = scope.caller
        caller = scope.caller
        if isinstance(result, Promise) and result.exits > 0 and caller is not None and caller.mode == grad_mode():
            caller.waiting += scope.waiting
            result.exits -= 1
            result.call.scope = caller
            return None
        scope.settle()
        resolved = resolve(result)
        return None if resolved is result else resolved


class DeferConvolution(_Hook):
    """Makes a convolution return a promise.

    Args:
        conv: path of the convolution in its owner.
        batch_norm: what must be as it was for batch norm to take the promise.
        following: the same for what comes after.
        expected: what comes after batch norm, if ``following`` is as it was.
    """

    def __init__(
        self, conv: Path, batch_norm: tuple[Watched, ...], following: tuple[Watched, ...], expected: Expected
    ) -> None:
        self.conv = conv
        self.batch_norm = batch_norm
        self.following = following
        self.expected = expected

    def __call__(self, conv: nn.Module, args: Any) -> Any:
        scope = _thread.innermost.scope
        if scope is None or len(args) != 1 or _find(scope.owner, self.conv) is not conv:
            return None
        if not self._is_unobserved(conv) or scope.mode != grad_mode():
            return None
        if not _are_in_place(scope, self.batch_norm) or not is_deferrable(args[0]):
            return None
        expected = self.expected if _are_in_place(scope, self.following) else _NOTHING
        return (ConvInput(Call(args[0], scope, expected)),)

    def _is_unobserved(self, conv: nn.Module) -> bool:
        """Nobody else sees the input after this hook, or the output. Earlier pre-hooks (weight_norm) may stay."""
        return not (
            conv._forward_hooks
            or conv._backward_hooks
            or conv._backward_pre_hooks
            or list(conv._forward_pre_hooks.values())[-1] is not self
            or _module._global_forward_hooks
            or _module._global_forward_pre_hooks
            or _module._global_backward_hooks
            or _module._global_backward_pre_hooks
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks other than those of this file see what ``module`` gets or gives."""
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        if hooks and not all(isinstance(hook, _Hook) for hook in hooks.values()):
            return True
    return False


def _find(module: nn.Module | None, path: Path) -> nn.Module | None:
    for name in path:
        if module is None:
            return None
        module = module._modules.get(name)
    return module


def _are_in_place(scope: Scope, watched: tuple[Watched, ...]) -> bool:
    for level, path, expected_type in watched:
        above: Scope | None = scope
        while level and above is not None:
            above = above.caller
            level -= 1
        module = None if above is None else _find(above.owner, path)
        if module is None or type(module) is not expected_type or has_hooks(module):
            return False
    return True


def register(owners: list[nn.Module], convolutions: Sequence[tuple[nn.Module, DeferConvolution]]) -> None:
    for owner in owners:
        enter, leave = EnterScope(), LeaveScope()
        enter.handle = owner.register_forward_pre_hook(enter)
        leave.handle = owner.register_forward_hook(leave, prepend=True, always_call=True)
    for conv, hook in convolutions:
        hook.handle = conv.register_forward_pre_hook(hook)


def remove(model: nn.Module) -> int:
    """Takes all hooks of this file off; the number of convolutions that had one."""
    convolutions = 0
    for module in model.modules():
        for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
            if isinstance(hook, _Hook):
                hook.handle.remove()
                convolutions += isinstance(hook, DeferConvolution)
    return convolutions
