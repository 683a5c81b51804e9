"""Steps as CUDA graphs: launched as a whole instead of kernel by kernel.

A graph is a list of kernels and the addresses that they work on. Everything else that decided what was captured, the
learning rate as much as the mode of a layer, is fixed in it, so a :class:`CapturedFunction` compares that at each call
and captures again when it has changed.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Function = Callable[..., tuple[Tensor, ...]]
WARMUP = 3  # calls in which libraries choose their algorithms and allocate what they keep


class CapturedFunction:
    """Calls a function of tensors, from the fourth call in a row with tensors of the same kind on as a CUDA graph.

    Capturing does not run anything, so each call does its work exactly once, whether it is the function's, the first
    replay or a later one. Tensors of another shape, dtype or layout, such as a last smaller batch, go through the
    function itself.

    Args:
        function: of tensors, to a tuple of tensors; works in place on whatever else it keeps, such as parameters, and
            does not wait for the device.
        settings: what else decides which kernels run on which memory, compared by ==.

    Attributes:
        replays: number of calls that were replays; the outputs of one are overwritten by the next.
    """

    def __init__(self, function: Function, settings: Callable[[], Hashable]) -> None:
        self._function = function
        self._settings = settings
        self.replays = 0
        self._stream: torch.cuda.Stream | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the graph: the function's own tensors are others now."""
        self._replay: Callable[[], None] | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()
        self._captured: tuple[Hashable, Hashable] | None = None
        self._streak: tuple[Hashable, int] = (None, 0)  # what kind of tensors came last, how many times in a row

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        kind, settings = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs), self._settings()
        if self._captured != (kind, settings):
            last, count = self._streak
            self._streak = kind, count + 1 if kind == last else 1
            is_warm = self._captured is not None and self._captured[0] == kind
            if not is_warm and self._streak[1] <= WARMUP:
                with self._aside(inputs[0].device):
                    return self._function(*inputs)
            self._capture(inputs)
            self._captured = kind, settings
        self._streak = None, 0
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        assert self._replay is not None
        self._replay()
        self.replays += 1
        # A backward pass that still needs what was just overwritten fails instead of using it.
        torch.autograd.graph.increment_version(self._outputs)
        return self._outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.reset()
        static = tuple(t.detach().clone(memory_format=torch.preserve_format) for t in inputs)
        try:
            with self._aside(inputs[0].device):
                self._replay, self._outputs = capture(self._function, static)
        except RuntimeError as error:
            raise RuntimeError(
                f"the step cannot be captured in a CUDA graph: {error}\n"
                "It must not wait for the device: no .item(), no batch norm with momentum=None, an optimizer that is "
                "capturable. cuda_graph=False runs any step"
            ) from error
        self._inputs = static

    @contextmanager
    def _aside(self, device: torch.device) -> Any:
        """On a stream of its own, the same one for warming up and for capturing."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        main = torch.cuda.current_stream(device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            yield
        main.wait_stream(self._stream)


def capture(function: Function, inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """A graph of ``function(*inputs)``: what replays it, and its outputs."""
    graph = torch.cuda.CUDAGraph()
    failure: Exception | None = None
    try:
        # A loader's thread may pin memory meanwhile.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            try:
                outputs = function(*inputs)
            except Exception as error:
                failure = error
                raise
    except Exception:
        _recover_generator(inputs[0].device)
        if failure is not None:
            raise failure from None  # ending the capture has failed, too, and says less
        raise
    return graph.replay, outputs


def _recover_generator(device: torch.device) -> None:
    """After a capture that failed torch's generator believes that it goes on, and refuses to draw; one that succeeds
    ends that."""
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=device)
    except RuntimeError as error:  # the failure of the step itself is the one to raise
        logger.warning("after a failed capture %s's random generator may be unusable: %s", device, error)


def check_device(device: torch.device) -> None:
    """
    Raises:
        ValueError: not a CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs stages on a CUDA device; they are on {device}")


def check_capturable(modules: Iterable[nn.Module]) -> None:
    """
    Raises:
        ValueError: a batch norm with ``momentum=None``, whose factor PyTorch reads back from the device at each step.
    """
    for module in modules:
        for name, child in module.named_modules():
            if not isinstance(child, nn.modules.batchnorm._NormBase) or not child.track_running_stats:
                continue
            if child.momentum is None:
                raise ValueError(f"cuda_graph=True needs a number as momentum of the batch norm {name!r}, got None")


def settings_of(modules: Iterable[nn.Module]) -> Hashable:
    """What of modules is fixed in a graph: addresses, what needs gradients, modes, attributes that are plain values."""
    tensors, values = [], []
    for child in itertools.chain.from_iterable(module.modules() for module in modules):
        tensors += [(p.data_ptr(), p.requires_grad) for p in child.parameters(recurse=False)]
        tensors += [(b.data_ptr(), False) for b in child.buffers(recurse=False)]
        plain = (bool, int, float, str)
        values += [(name, v) for name, v in vars(child).items() if isinstance(v, plain) and not name.startswith("_")]
    return tuple(tensors), tuple(values)


def settings_of_optimizer(optimizer: torch.optim.Optimizer) -> Hashable:
    """Its hyperparameters, but for those that are tensors, which a graph reads anew, and the addresses of its state."""
    numbers = tuple(
        (name, value)
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params" and not isinstance(value, Tensor)
    )
    state = tuple(t.data_ptr() for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    return numbers, state


def make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Keep the number of steps on the device, in optimisers that have the option (Adam and its relatives)."""
    set_capturable(optimizer, [True] * len(optimizer.param_groups))
    # Steps before the capture, and those of smaller batches, run without a graph on purpose.
    optimizer._warned_capturable_if_run_uncaptured = True


def capturable(optimizer: torch.optim.Optimizer) -> list[bool]:
    """Of each parameter group."""
    return [bool(group.get("capturable")) for group in optimizer.param_groups]


def set_capturable(optimizer: torch.optim.Optimizer, flags: list[bool]) -> None:
    for group, flag in zip(optimizer.param_groups, flags, strict=True):
        if "capturable" not in group:
            continue
        group["capturable"] = flag
        for parameter in group["params"]:
            step = optimizer.state.get(parameter, {}).get("step")
            if isinstance(step, Tensor):
                device = parameter.device if flag or group.get("fused") else torch.device("cpu")
                optimizer.state[parameter]["step"] = step.to(device=device, dtype=torch.float32)


def without_cast_cache(device: torch.device) -> AbstractContextManager[Any]:
    """The caller's autocast, but casts of weights are made in the graph and not remembered from outside of it."""
    enabled = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False)
