"""What operators leave behind in memory: nothing. A few bytes of each call may pin the map that lay beside them."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch
from layerwise_ext.nn import ConvBNReLU2d, FusedChain, LocalHead, LocalStage, PooledLinearHead, PredSimHead
from torch import Tensor, nn

CALLS = 400
# Of all calls together: what the interpreter and torch keep of their own, which does not grow with the calls.
ALLOWED = 4096


class _Statistics(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    ]  # fmt: skip


def _bytes_in_use() -> int:
    gc.collect()
    statistics = ctypes.CDLL(None).mallinfo2
    statistics.restype = _Statistics
    found = statistics()
    return int(found.uordblks + found.hblkhd)


def _layer(**options: object) -> Callable[[], None]:
    layer = ConvBNReLU2d(4, 4, 3, padding=1, **options)
    x = torch.rand(2, 4, 8, 8, requires_grad=True)
    return lambda: layer(x).sum().backward()


def _evaluated() -> Callable[[], None]:
    layer = ConvBNReLU2d(4, 4, 3, padding=1, downsample=("avg", 2)).eval()
    x = torch.rand(2, 4, 8, 8)

    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def _stage(head: LocalHead) -> Callable[[], None]:
    stage = LocalStage(ConvBNReLU2d(4, 4, 3, padding=1), head, downsample=("max", 2))
    x, target = torch.rand(4, 4, 8, 8), torch.tensor([0, 1, 2, 0])

    def call() -> None:
        loss = stage(x, target).loss
        assert isinstance(loss, Tensor)
        loss.backward()

    return call


def _chain() -> Callable[[], None]:
    chain = FusedChain(ConvBNReLU2d(4, 4, 3, padding=1), nn.MaxPool2d(2), ConvBNReLU2d(4, 4, 3, padding=1))
    x = torch.rand(2, 4, 8, 8, requires_grad=True)
    return lambda: chain(x).sum().backward()


CASES: dict[str, Callable[[], Callable[[], None]]] = {
    "layer": _layer,
    "pooled layer": lambda: _layer(downsample=("max", 2)),
    "other activation": lambda: _layer(activation="gelu"),
    "evaluation": _evaluated,
    "chain": _chain,
    "pred": lambda: _stage(PooledLinearHead(4, 3, (2, 2))),
    "predsim": lambda: _stage(PredSimHead(4, 3, (2, 2))),
}


@pytest.mark.parametrize("case", CASES)
def test_calls_leave_nothing_in_memory(case: str) -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc 2.33 or newer, which tells how much memory is in use")
    call = CASES[case]()
    for _ in range(CALLS):
        call()
    before = _bytes_in_use()
    for _ in range(CALLS):
        call()
    assert _bytes_in_use() - before < ALLOWED
