"""The memory of a chain: what is kept, what is freed and when, what runs again."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layerwise_ext as lw
import pytest
import torch
import torch.nn.functional as F
from chain_cases import (
    NETS,
    TOLERANCE,
    basic,
    compare,
    conv3,
    even_kernel,
    images,
    pair,
    randomise,
    results,
    seeded,  # noqa: F401  # a fixture
    unfused,
    weighted,
)
from layerwise_ext import _chain, _memory, functional
from layerwise_ext.nn import ConvBNReLU2d, FusedChain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# -- Segments ----------------------------------------------------------------------------------------------------------


@even_kernel
@pytest.mark.parametrize("segments", [2, 3, (1,), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_segments(name: str, dtype: torch.dtype, segments: int | tuple[int, ...]) -> None:
    peer, chain = pair(name, dtype, "channels_last")
    if isinstance(segments, int):
        segments = min(segments, len(chain))
    else:
        segments = tuple(start for start in segments if start < len(chain))
    chain = FusedChain(*chain, segments=segments)
    for _ in range(2):
        x = images(dtype=dtype, layout="channels_last")
        compare(results(chain, x), results(peer, x), TOLERANCE[dtype])
        peer.zero_grad()
        chain.zero_grad()


@pytest.mark.parametrize(("segments", "number", "layers_of_the_last"), [(2, 2, 3), ((3,), 2, 2), ((1, 4), 3, 1)])
def test_segments_keep_their_inputs_alone(
    segments: int | tuple[int, ...], number: int, layers_of_the_last: int
) -> None:
    layers = [conv3(3, 8), conv3(8, 8), conv3(8, 8), conv3(8, 8), conv3(8, 8)]
    chain, x, kept = FusedChain(*layers, segments=segments), images(dtype=torch.float32), []

    def keep(t: Tensor) -> Tensor:
        if t.dim() == 4 and t.size(0) == len(x):
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = chain(x)
    # Inputs of the segments, then the pre-activations of the last one.
    assert len({t.data_ptr() for t in kept}) == number + layers_of_the_last
    ((y - 1) ** 2).sum().backward()
    assert all(layer.bn.num_batches_tracked == 1 for layer in layers)


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_segments_in_autograd(name: str) -> None:
    """A second backward pass, frozen layers, autocast, evaluation mode, moments."""
    peer, chain = pair(name, torch.float32, "channels_last")
    for module in (peer, chain):
        for parameter in module[0].parameters():
            parameter.requires_grad_(False)
        module[1].eval()
    chain.segments = 3
    x = images(dtype=torch.float32, layout="channels_last")
    gradients = []
    for module in (peer, chain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = weighted(module(x).float())
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append({key: p.grad for key, p in module.named_parameters()})
    for key, expected in gradients[0].items():
        actual = gradients[1][key]
        assert (actual is None) == (expected is None), key
        if expected is not None:
            assert (actual - expected).norm() <= 1e-2 * expected.norm() + 1e-6, key
    y, m1, _ = chain.forward_moments(x, (2, 2))
    torch.testing.assert_close(m1, F.adaptive_avg_pool2d(y, 2) * functional.cell_area(y.shape[2:], 2))


def test_a_layer_in_two_segments() -> None:
    layer = randomise(conv3(3, 3)).double()
    x = images()
    plain, chain = nn.Sequential(layer, layer, layer), FusedChain(layer, layer, layer, segments=3)
    gradients = []
    for module in (plain, chain):
        state = copy.deepcopy(layer.state_dict())
        layer.zero_grad()
        weighted(module(x)).backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
        gradients[-1] += [t.clone() for t in layer.buffers()]
        layer.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_segments_have_the_fixed_statistics_of_the_forward_pass() -> None:
    """Whatever becomes of the running ones before the backward pass."""
    layers = [randomise(conv3(3, 3)).double() for _ in range(3)]
    x, gradients = images(), []
    for chain in (nn.Sequential(*copy.deepcopy(layers)), FusedChain(*copy.deepcopy(layers), segments=3)):
        y = chain.eval()(x)
        chain.train()(images())
        chain[0].bn.running_var.mul_(7)
        weighted(y).backward()
        gradients.append([p.grad for p in chain.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_segments_of_random_slopes() -> None:
    layers = [ConvBNReLU2d(3, 3, 3, padding=1, activation="rrelu", dtype=torch.float64) for _ in range(2)]
    plain, chain = nn.Sequential(*layers), FusedChain(*copy.deepcopy(layers), segments=2)
    x = images()
    compare(results(chain, x), results(plain, x), 1e-12)


@pytest.mark.parametrize("segments", [(0,), (2,), (1, 1), (-1,)])
def test_indices_that_do_not_ascend(segments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="segments must begin at ascending indices from 1 to 1, got"):
        FusedChain(conv3(3, 4), conv3(4, 4), segments=segments)


@pytest.mark.parametrize("segments", [0, 3])
def test_number_of_segments(segments: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the number of layers, 2, got {segments}"):
        FusedChain(conv3(3, 4), conv3(4, 4), segments=segments)


# -- Life of the graph -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
@even_kernel
def test_retain_graph_gives_the_same_gradients_twice(name: str) -> None:
    peer, chain = pair(name)
    x = images()
    with torch.random.fork_rng(devices=[]):
        loss, parameters = weighted(chain(x)), list(chain.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(weighted(peer(x)), list(peer.parameters()))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, expected))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, parameters)


def test_second_derivative_is_a_clear_error() -> None:
    peer, chain = pair("resnet")
    x = images()
    gradients = torch.autograd.grad(weighted(chain(x)), list(chain.parameters()), create_graph=True)
    expected = torch.autograd.grad(weighted(peer(x)), list(peer.parameters()))
    assert all(map(torch.equal, gradients, expected))
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradients[0].sum().backward()


@pytest.mark.parametrize("name", ["vgg", "resnet", "nested"])
def test_saved_tensor_hooks(name: str) -> None:
    peer, chain = pair(name)
    x = images()
    expected = results(peer, x)
    kept: list[Tensor] = []
    unpacked: list[int] = []

    def pack(t: Tensor) -> int:
        kept.append(t)
        return len(kept) - 1

    def unpack(i: int) -> Tensor:
        unpacked.append(i)
        return kept[i]

    x = x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = chain(x)
    before = [t.clone() for t in kept]
    weighted(y).backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True)), "a tensor that hooks hold was overwritten"
    assert len(unpacked) == len(set(unpacked)), "a tensor was unpacked twice"
    for name, p in chain.named_parameters():
        assert torch.equal(p.grad, expected[f"gradient of {name}"]), name


def test_offloaded_tensors() -> None:
    peer, chain = pair("resnet")
    x = images()
    expected = results(peer, x)
    with torch.autograd.graph.save_on_cpu():
        loss = weighted(chain(x))
    loss.backward()
    assert all(torch.equal(p.grad, expected[f"gradient of {name}"]) for name, p in chain.named_parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_a_chain(reentrant: bool) -> None:
    peer, chain = pair("resnet")
    x = images().requires_grad_()
    weighted(checkpoint(chain, x, use_reentrant=reentrant)).backward()
    expected = results(peer, x)
    for name, p in chain.named_parameters():
        assert torch.equal(p.grad, expected[f"gradient of {name}"]), name


@pytest.mark.parametrize("name", ["resnet", "linear"])
def test_the_gradient_of_the_output_is_not_modified(name: str) -> None:
    _, chain = pair(NETS[name]()[:-1] if name == "resnet" else name)  # ends in a residual block
    y = chain(images())
    gradient = torch.randn_like(y)
    before = gradient.clone()
    y.backward(gradient)
    assert torch.equal(gradient, before)


def test_the_output_may_be_overwritten_and_the_input_not() -> None:
    """As behind any network: ReLU(inplace=True), out += identity."""
    peer, chain = pair("resnet")
    x = images()
    expected = results(peer, x)
    y = chain(x)
    weighted(y.add_(1).mul_(2)).backward()
    for name, p in chain.named_parameters():
        assert torch.equal(p.grad, 2 * expected[f"gradient of {name}"]), name
    y = chain(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted(y).backward()


def test_a_graph_that_is_dropped_leaves_at_once() -> None:
    """Without waiting for the garbage collector, before and after a backward pass."""
    _, chain = pair("resnet")
    gc.disable()
    try:
        for backward in (False, True):
            y = chain(images())
            if backward:
                weighted(y).backward(retain_graph=True)
            kept = [weakref.ref(y.grad_fn), *(weakref.ref(t) for t in y.grad_fn.saved_tensors if t is not None)]
            parameters = {id(p) for p in chain.parameters()}
            del y
            assert len(kept) > 4
            assert all(ref() is None or id(ref()) in parameters for ref in kept)
    finally:
        gc.enable()


def test_saved_tensors_that_somebody_took_stay() -> None:
    _, chain = pair("vgg")
    y = chain(images())
    node, saved = y.grad_fn, []
    while node is not None and hasattr(node, "saved_tensors"):
        saved += [t for t in node.saved_tensors if t is not None]
        node = node.next_functions[0][0] if node.next_functions else None
    before = [t.clone() for t in saved]
    weighted(y).backward()
    assert len(saved) > 10
    assert all(map(torch.equal, saved, before))


# -- Memory ------------------------------------------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], Any], module: nn.Module) -> int:
    """Of the maps that a forward pass saves, each counted once."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.dim() == 4 and t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    del y
    return sum(t.numel() * t.element_size() for t in kept.values())


@pytest.mark.parametrize("name", ["vgg", "resnet", "bottlenecks"])
def test_only_pre_activations_are_saved(name: str) -> None:
    peer, chain = pair(name, torch.float32)
    x = images(dtype=torch.float32)
    expected = x.numel()
    sizes: dict[nn.Module, int] = {}
    for layer in peer.modules():
        if isinstance(layer, ConvBNReLU2d):
            layer.bn.register_forward_pre_hook(lambda bn, inputs: sizes.__setitem__(bn, inputs[0].numel()))
    unfused(peer)(x)
    expected += sum(sizes.values())
    assert saved_bytes(lambda: chain(x), chain) == 4 * expected


def test_frozen_layers_keep_nothing() -> None:
    _, chain = pair([conv3(3, 8), *(conv3(8, 8) for _ in range(5))], torch.float32)
    for layer in chain[:4]:
        layer.requires_grad_(False)
    x = images(dtype=torch.float32)
    # The map that the first trained layer reads, and the pre-activations of the two trained ones.
    assert saved_bytes(lambda: chain(x), chain) == 3 * 4 * 8 * 8 * 8 * 4


@pytest.mark.parametrize("places", [0, 1, 2, 100])
def test_sweeps_over_residual_blocks(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fits into the room that is free: the numbers do not depend on it, the passes do."""
    blocks = 8
    peer, chain = pair([conv3(3, 4), *(basic(4, 4) for _ in range(blocks))])
    recompute, count = _chain._Memory._recompute, 0

    def counted(*arguments: Any) -> Tensor:
        nonlocal count
        count += 1
        return recompute(*arguments)

    monkeypatch.setattr(_chain._Memory, "_recompute", counted)
    monkeypatch.setattr(_chain._Memory, "WORKING_MAPS", -places if places else 10**9)
    x = images()
    compare(results(chain, x), results(peer, x), 0.0)
    # Of each block the inner activation, and its input as often as sweeps pass it.
    sweeps = count - blocks
    if places == 0:
        assert sweeps == blocks * (blocks + 1) // 2
    if places == 100:
        assert sweeps == blocks
    assert sweeps <= blocks * (blocks + 1) // 2


def test_memory_of_a_layer_is_taken_by_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bool] = []
    is_last_reader = _chain._is_last_reader

    def watch(ctx: Any, saved: Tensor) -> bool:
        if saved.dim() == 4:
            answers.append(is_last_reader(ctx, saved))
            return answers[-1]
        return is_last_reader(ctx, saved)

    monkeypatch.setattr(lw._ops, "_OWN_REFERENCES", lw._ops._OWN_REFERENCES + 1)  # that of watch
    monkeypatch.setattr(_chain, "_is_last_reader", watch)
    for name in ("vgg", "resnet", "nested"):
        answers.clear()
        _, chain = pair(name)
        loss = weighted(chain(images()))
        loss.backward(retain_graph=True)
        assert answers and not any(answers)
        answers.clear()
        loss.backward()
        assert answers and all(answers)


PEAK = """
import sys
import torch
from layerwise_ext import _memory
_memory.return_freed_memory()
torch.set_num_threads(1)
from torch import nn
import layerwise_ext as lw

lw.set_cache_limit(0)
layers = [lw.nn.ConvBNReLU2d(c, 16, 3, padding=1) for c in [3] + 11 * [16]]
if sys.argv[1] == "residual":
    layers[2:] = [lw.nn.Residual(*layers[i:i + 2]) for i in range(2, 12, 2)]
net = {"chain": lw.nn.FusedChain, "layers": nn.Sequential}[sys.argv[2]](*layers)
net.to(memory_format=torch.channels_last)
x = torch.randn(8, 3, 64, 64).contiguous(memory_format=torch.channels_last)
print(_memory.peak_of_step(lambda: net(x).mean().backward(), net.zero_grad))
"""


@pytest.mark.skipif(_memory.unavailable() is not None, reason=str(_memory.unavailable()))
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_peak_memory(kind: str) -> None:
    """12 layers with maps of 2 MiB: 12 pre-activations and what one layer works with, instead of 24 and more."""
    peaks = {}
    for name in ("chain", "layers"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, kind, name], capture_output=True, text=True, check=True, timeout=120,
            cwd=Path(__file__).parent,
        )  # fmt: skip
        peaks[name] = int(done.stdout) / 2**21
    # Gradients of output and input, the input, what is left of freed memory; and the residual and its gradient.
    assert 12 <= peaks["chain"] <= (18 if kind == "residual" else 17)
    assert peaks["chain"] <= 0.65 * peaks["layers"]
