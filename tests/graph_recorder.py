"""Stands for CUDA graphs where there is no device: what is captured is a list of operators and of the memory they use.

As with a graph, capturing leaves no trace in memory, replaying runs the operators on the same tensors whatever Python
would do now, and waiting for the device is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from layerwise_ext import _graphs
from layerwise_ext.nn import stage
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


# Operators that write without saying so: running mean and variance.
SILENT_WRITES = {torch.ops.aten.native_batch_norm.default: (3, 4)}


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Any, Any]] = {}  # storages that were written, and what was in them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            raise RuntimeError(f"{func} is not permitted when the stream is capturing")
        kwargs = kwargs or {}
        silent = SILENT_WRITES.get(func, ())
        for i, (argument, value) in enumerate(zip(func._schema.arguments, args, strict=False)):
            if i in silent or (argument.alias_info is not None and argument.alias_info.is_write):
                for t in tree_leaves(value):
                    storage = t.untyped_storage()
                    self.before.setdefault(storage._cdata, (storage, storage.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        for storage, content in self.before.values():
            storage.copy_(content)

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            for target, value in zip(tree_flatten(out)[0], tree_flatten(new)[0], strict=True):
                if isinstance(target, Tensor) and target.untyped_storage()._cdata != value.untyped_storage()._cdata:
                    target.copy_(value)


def capture(function: Any, inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    recorder = Recorder()
    with recorder:
        outputs = function(*inputs)
    recorder.undo()

    def replay() -> None:
        with torch.no_grad():
            recorder.replay()

    with torch.no_grad():
        for t in outputs:
            t.fill_(float("nan") if t.is_floating_point() else -1)  # nothing has run yet
    return replay, outputs


@pytest.fixture
def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda_graph=True on the CPU."""

    @contextmanager
    def here(self: Any, device: torch.device) -> Iterator[None]:
        yield

    monkeypatch.setattr(_graphs, "capture", capture)
    monkeypatch.setattr(_graphs.CapturedFunction, "_aside", here)
    monkeypatch.setattr(_graphs, "check_device", lambda device: None)
    monkeypatch.setattr(stage, "_can_replay", lambda x: torch.is_grad_enabled())
