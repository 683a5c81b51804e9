"""FusedChain and Residual: the numbers of nn.Sequential, from half of the memory."""

from __future__ import annotations

import copy
import gc
import pickle
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
from layerwise_ext import _chain, _memory, functional
from layerwise_ext.nn import ConvBNReLU2d, FusedChain, Residual
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

operators = torch.ops.layerwise_ext
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def conv3(in_channels: int, out_channels: int, **options: Any) -> ConvBNReLU2d:
    return ConvBNReLU2d(in_channels, out_channels, 3, padding=1, **options)


def basic(in_channels: int, out_channels: int, stride: int = 1) -> Residual:
    shortcut = None
    if stride > 1 or in_channels != out_channels:
        shortcut = ConvBNReLU2d(in_channels, out_channels, 1, stride, activation="identity")
    return Residual(
        conv3(in_channels, out_channels, stride=stride), conv3(out_channels, out_channels), shortcut=shortcut
    )


def bottleneck(channels: int) -> Residual:
    body = ConvBNReLU2d(channels, channels // 2, 1), conv3(channels // 2, channels // 2)
    return Residual(*body, ConvBNReLU2d(channels // 2, channels, 1))


NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "vgg": lambda: [conv3(3, 8), conv3(8, 8), nn.MaxPool2d(2), conv3(8, 12), conv3(12, 6, bias=True)],
    "padding": lambda: [
        conv3(3, 6, padding_mode="reflect"),
        ConvBNReLU2d(6, 6, 3, padding="same", dilation=2, activation="leaky_relu", negative_slope=0.2),
        ConvBNReLU2d(6, 5, 2, padding="same", padding_mode="circular"),
        ConvBNReLU2d(5, 4, (4, 3), padding="same", groups=1, activation="identity"),
    ],
    "pools": lambda: [nn.AvgPool2d(2), conv3(3, 4, groups=1), nn.Identity(), conv3(4, 4, groups=2), nn.AvgPool2d(2)],
    "resnet": lambda: [
        conv3(3, 8),
        basic(8, 8),
        basic(8, 8),
        basic(8, 8),
        basic(8, 12, 2),
        basic(12, 12),
        conv3(12, 4),
    ],
    "bottlenecks": lambda: [conv3(3, 8), bottleneck(8), bottleneck(8), bottleneck(8), nn.MaxPool2d(2), bottleneck(8)],
    "residual first": lambda: [basic(3, 3), nn.Sequential(basic(3, 3), FusedChain(basic(3, 6)))],
    "linear": lambda: [
        conv3(3, 4),
        Residual(conv3(4, 8), conv3(8, 4, activation="identity")),
        Residual(conv3(4, 8), conv3(8, 4, activation="leaky_relu")),
        Residual(conv3(4, 8), conv3(8, 4, activation="identity")),
    ],
    "downsampling": lambda: [
        conv3(3, 8, downsample=("max", 2)),
        Residual(conv3(8, 8), conv3(8, 8, downsample=("avg", (1, 2)))),
        conv3(8, 3, downsample=("space_to_depth", (2, 1))),
        conv3(6, 6, downsample=("stride", (1, 2))),
    ],
    "activations": lambda: [
        conv3(3, 4, activation="prelu"),
        Residual(conv3(4, 8, activation="silu"), conv3(8, 4, activation="prelu")),
        Residual(conv3(4, 8, activation="rrelu"), conv3(8, 4, activation="gelu")),
        conv3(4, 4, activation="tanh"),
    ],
    "nested": lambda: [conv3(3, 4), Residual(basic(4, 4), nn.AvgPool2d(3, 1, 1), conv3(4, 4), shortcut=basic(4, 4))],
}
even_kernel = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def randomise(module: nn.Module) -> nn.Module:
    """Parameters and running statistics away from their initial zeros and ones."""
    with torch.no_grad():
        for t in [*module.parameters(), *module.buffers()]:
            if t.is_floating_point() and t.dim() == 1:
                t.uniform_(0.5, 1.5)
    return module


def pair(net: str | list[nn.Module], dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> Any:
    """The layers in an nn.Sequential, and copies of them in a FusedChain."""
    layers = NETS[net]() if isinstance(net, str) else net
    peer = randomise(nn.Sequential(*layers)).to(dtype=dtype, memory_format=LAYOUTS[layout])
    return peer, FusedChain(*copy.deepcopy(peer))


def images(n: int = 4, size: int = 8, dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> Tensor:
    return torch.randn(n, 3, size, size, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])


def weighted(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()


def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.random.fork_rng(devices=[]):  # the same random slopes for all
        y = module(x)
    weighted(y).backward()
    named = {"output": y.detach(), "gradient of the input": x.grad, **dict(module.named_buffers())}
    return named | {f"gradient of {name}": p.grad for name, p in module.named_parameters()}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Outputs and statistics are the same numbers, gradients agree to ``tolerance`` in their norm."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].stride() == value.stride(), name
        if name.startswith("gradient"):
            difference = (actual[name].double() - value.double()).norm()
            # A learned slope's gradient is one number, a sum of many that nearly cancel.
            rounding = 4 * torch.finfo(value.dtype).eps if tolerance and value.numel() == 1 else 0.0
            assert difference <= (tolerance + rounding) * value.double().norm() + 1e-12, name
        else:
            assert torch.equal(actual[name], value), name


# The backward pass has mean and variance in float32, here as in a layer by itself. The forward pass has them in double,
# so that an activation recomputed from float32 maps may differ from the first one in its last bit.
TOLERANCE = {torch.float64: 0.0, torch.float32: 1e-5, torch.bfloat16: 1e-3}


@even_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_chain_equals_its_layers_one_by_one(name: str, dtype: torch.dtype, layout: str) -> None:
    peer, chain = pair(name, dtype, layout)
    for _ in range(2):  # the second step sees the running statistics of the first
        x = images(dtype=dtype, layout=layout)
        compare(results(chain, x), results(peer, x), TOLERANCE[dtype])
        peer.zero_grad()
        chain.zero_grad()


@even_kernel
@pytest.mark.parametrize("segments", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_segments(name: str, dtype: torch.dtype, segments: int) -> None:
    peer, chain = pair(name, dtype, "channels_last")
    chain = FusedChain(*chain, segments=min(segments, len(chain)))
    for _ in range(2):
        x = images(dtype=dtype, layout="channels_last")
        compare(results(chain, x), results(peer, x), TOLERANCE[dtype])
        peer.zero_grad()
        chain.zero_grad()


def test_segments_keep_their_inputs_alone() -> None:
    layers = [conv3(3, 8), conv3(8, 8), conv3(8, 8), conv3(8, 8), conv3(8, 8)]
    chain, x, kept = FusedChain(*layers, segments=2), images(dtype=torch.float32), []

    def keep(t: Tensor) -> Tensor:
        if t.dim() == 4 and t.size(0) == len(x):
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = chain(x)
    ((y - 1) ** 2).sum().backward()
    # Inputs of both segments, then the three pre-activations of the second.
    assert len({t.data_ptr() for t in kept}) == 2 + 3
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


@pytest.mark.parametrize("segments", [0, 3])
def test_number_of_segments(segments: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the number of layers, 2, got {segments}"):
        FusedChain(conv3(3, 4), conv3(4, 4), segments=segments)


class Plain(nn.Module):
    """A residual block in plain layers."""

    def __init__(self, block: Residual) -> None:
        super().__init__()
        *first, last = block.body
        conv, bn, self.act, *pool = last.to_modules()
        self.pool = nn.Sequential(*pool)
        self.body = nn.Sequential(*map(unfused, first), conv, bn)
        self.shortcut = nn.Identity() if block.shortcut is None else unfused(block.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.body(x) + self.shortcut(x)))


def unfused(module: nn.Module) -> nn.Module:
    if isinstance(module, ConvBNReLU2d):
        return nn.Sequential(*module.to_modules())
    if isinstance(module, Residual):
        return Plain(module)
    return nn.Sequential(*map(unfused, module)) if isinstance(module, nn.Sequential) else module


@even_kernel
@pytest.mark.parametrize("name", NETS)
def test_chain_equals_plain_pytorch(name: str) -> None:
    _, chain = pair(name)
    for layer in chain.modules():
        if isinstance(layer, ConvBNReLU2d) and layer.activation == "rrelu":
            layer.activation = "leaky_relu"  # PyTorch draws other slopes
    peer = unfused(copy.deepcopy(chain))
    x = images()
    y, expected = chain(x), peer(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weighted(y).backward()
    weighted(expected).backward()
    gradients = [sorted((p.grad for p in m.parameters()), key=lambda g: (g.shape, g.sum())) for m in (chain, peer)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_gradcheck() -> None:
    _, chain = pair([conv3(2, 4), basic(4, 4), nn.AvgPool2d(2, 1), basic(4, 4), conv3(4, 2, padding_mode="reflect")])
    names = [name for name, _ in chain.named_parameters()]
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Any:
        module = copy.deepcopy(chain)  # the running statistics of the chain stay
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    parameters = [p.detach().clone().requires_grad_() for p in chain.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


BATCH_NORM = [
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-2},
    {"track_running_stats": False},
    {"affine": False},
    {"bias": True},
]


@pytest.mark.parametrize("options", BATCH_NORM, ids=str)
@pytest.mark.parametrize("mode", ["train", "frozen", "eval"])
def test_batch_norm_options(options: dict[str, Any], mode: str) -> None:
    peer, chain = pair([conv3(3, 6, **options), conv3(6, 6, **options), Residual(conv3(6, 6, **options))])
    for module in (peer, chain):
        module.train(mode != "eval")
        if mode == "frozen":
            module[1].bn.eval()
    for _ in range(3):
        x = images()
        compare(results(chain, x), results(peer, x), 0.0)
        peer.zero_grad()
        chain.zero_grad()


def test_a_layer_that_occurs_twice() -> None:
    for momentum in (0.1, None):
        layer = conv3(3, 3, momentum=momentum)
        peer, chain = pair([layer, layer, Residual(layer)])
        x = images()
        compare(results(chain, x), results(peer, x), 1e-12)  # three gradients, added up in another order


# -- What gradients are wanted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg", "resnet", "bottlenecks", "nested"])
@pytest.mark.parametrize("wanted", [
    lambda name: name.startswith(("2.", "3.")),
    lambda name: name.endswith("bn.weight"),
    lambda name: name.endswith("conv.weight"),
    lambda name: "body.0" in name or name == "input",
    lambda name: name == "input",
    lambda name: name.startswith("0.") and name.endswith("bias"),
], ids=["later layers", "bn weights", "convolutions", "inside blocks", "input", "first bias"])  # fmt: skip
def test_only_some_gradients(name: str, wanted: Callable[[str], bool]) -> None:
    gradients = []
    x = images()
    for module in pair(name):
        input = x.clone().requires_grad_(wanted("input"))
        for key, p in module.named_parameters():
            p.requires_grad_(wanted(key))
        y = module(input)
        if y.requires_grad:
            weighted(y).backward()
        gradients.append({key: p.grad for key, p in module.named_parameters()} | {"input": input.grad})
    for key, expected in gradients[0].items():
        actual = gradients[1][key]
        assert (actual is None) == (expected is None), key
        assert expected is None or torch.equal(actual, expected), key


def test_frozen_layers_keep_nothing() -> None:
    _, chain = pair([conv3(3, 8), *(conv3(8, 8) for _ in range(5))], torch.float32)
    for layer in chain[:4]:
        layer.requires_grad_(False)
    x = images(dtype=torch.float32)
    # The map that the first trained layer reads, and the pre-activations of the two trained ones.
    assert saved_bytes(lambda: chain(x), chain) == 3 * 4 * 8 * 8 * 8 * 4


def test_gradients_of_chosen_inputs() -> None:
    peer, chain = pair("resnet")
    x = images().requires_grad_()
    for module in (peer, chain):
        chosen = [module[1].body[0].conv.weight, x]
        loss = weighted(module(x))
        module.gradients = torch.autograd.grad(loss, chosen, retain_graph=True)
        module.gradients += torch.autograd.grad(loss, list(module.parameters()))
    assert all(map(torch.equal, chain.gradients, peer.gradients))


def test_gradients_arrive_layer_by_layer() -> None:
    """As data-parallel training wants them, which sends those that are there while others are computed."""
    _, chain = pair("vgg")
    order: list[str] = []
    for name, p in chain.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: order.append(name[0]))
    weighted(chain(images())).backward()
    assert list(dict.fromkeys(order)) == ["4", "3", "1", "0"]


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


# -- Modes and copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_autocast(name: str) -> None:
    peer, chain = pair(name, torch.float32, "channels_last")
    x = images(dtype=torch.float32, layout="channels_last")
    outputs = []
    for module in (peer, chain):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        weighted(y.float()).backward()
        outputs.append(y)
    assert outputs[1].dtype == torch.bfloat16 and torch.equal(*outputs)
    for p, q in zip(peer.parameters(), chain.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() <= 1e-3 * p.grad.norm()


def test_without_gradients_the_layers_are_called() -> None:
    peer, chain = pair("resnet")
    x = images()
    for mode in (torch.no_grad, torch.inference_mode):
        for training in (True, False):
            with mode():
                y = chain.train(training)(x)
                assert torch.equal(y, peer.train(training)(x))
            assert not y.requires_grad
    chain.requires_grad_(False)
    assert chain(x).grad_fn is None
    compare(dict(chain.named_buffers()), dict(peer.named_buffers()), 0.0)


def test_hooks() -> None:
    """Those of the chain run as those of any module; those of a layer make it call its layers."""
    peer, chain = pair("resnet")
    calls: list[str] = []
    chain.register_forward_hook(lambda *_: calls.append("chain"))
    chain.register_full_backward_hook(lambda *_: calls.append("chain, backward"))
    x = images()
    expected = results(peer, x)
    compare(results(chain, x), expected, 0.0)
    assert calls == ["chain", "chain, backward"]
    chain[1].body[0].register_forward_hook(lambda module, inputs, output: calls.append(tuple(output.shape)))
    chain.zero_grad()
    peer.zero_grad()
    compare(results(chain, x), results(peer, x), 0.0)
    assert (4, 8, 8, 8) in calls


@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_copies_and_checkpoints(name: str) -> None:
    peer, chain = pair(name)
    x = images()
    expected = results(peer, x)
    assert list(chain.state_dict()) == list(peer.state_dict())
    fresh = FusedChain(*NETS[name]()).double()
    fresh.load_state_dict(chain.state_dict())
    for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain)), fresh):
        assert isinstance(other, FusedChain)
        compare(results(other, x), expected, 0.0)


def test_checkpoint_of_plain_layers_loads() -> None:
    plain = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
    )
    chain = FusedChain(ConvBNReLU2d(3, 4, 3, bias=True), nn.MaxPool2d(2), ConvBNReLU2d(4, 5, 3, bias=True))
    chain.load_state_dict(randomise(plain).state_dict())
    x = images(dtype=torch.float32, size=10)
    torch.testing.assert_close(chain(x), plain(x), rtol=1e-4, atol=1e-4)


def test_chain_is_a_sequential() -> None:
    chain = FusedChain(conv3(3, 4), nn.MaxPool2d(2), conv3(4, 5))
    assert len(chain) == 3
    assert isinstance(chain[:2], FusedChain) and chain[:2][0] is chain[0]
    assert chain.append(conv3(5, 2))(images(dtype=torch.float32)).shape == (4, 2, 4, 4)
    assert torch.equal(FusedChain()(torch.ones(1)), torch.ones(1))


@pytest.mark.parametrize(("name", "backend"), [("vgg", "inductor"), ("vgg", "aot_eager"), ("resnet", "aot_eager")])
def test_compiled(name: str, backend: str) -> None:
    torch._dynamo.reset()
    peer, chain = pair(name)
    compiled = torch.compile(chain, fullgraph=True, backend=backend)
    x = images()
    for _ in range(2):
        actual, expected = results(compiled, x), results(peer, x)
        for (key, a), b in zip(actual.items(), expected.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=key)


# -- Stages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", ["vgg", "resnet", "bottlenecks", "pools"])
def test_body_of_a_stage(name: str, detach: bool) -> None:
    peer, chain = pair(name)
    with torch.no_grad():
        channels = copy.deepcopy(peer)(images()).shape[1]
    x, target = images(), torch.arange(4)
    head = lw.nn.PooledLinearHead(channels, 5, bins=(2, 2), dtype=torch.float64)
    gradients = []
    for body in (peer, chain):
        stage = lw.nn.LocalStage(body, copy.deepcopy(head), detach=detach)
        features, loss, _ = stage(x, target)
        (loss if detach else loss + weighted(features)).backward()
        gradients.append([features.detach(), loss.detach(), *(p.grad for p in stage.parameters())])
    for actual, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    stage.body.eval()
    with torch.no_grad():
        torch.testing.assert_close(stage(x, target).loss, lw.nn.LocalStage(peer.eval(), stage.head)(x, target).loss)


@pytest.mark.parametrize("second_moment", [True, False])
def test_moments(second_moment: bool) -> None:
    peer, chain = pair("vgg")
    x = images()
    y, m1, m2 = chain.forward_moments(x, (2, 2), second_moment)
    assert torch.equal(y, peer(x))
    torch.testing.assert_close(m1, 4 * F.adaptive_avg_pool2d(y, 2))
    assert (m2 is None) != second_moment
    (m1**3).sum().backward()
    with torch.no_grad():
        assert torch.equal(chain.eval().forward_moments(x, (2, 2), second_moment)[0], peer.eval()(x))


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


# -- Errors ------------------------------------------------------------------------------------------------------------


def test_what_a_chain_refuses() -> None:
    class Scaled(ConvBNReLU2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for module, name in ((nn.Dropout(), "Dropout"), (nn.Conv2d(3, 3, 1), "Conv2d"), (Scaled(3, 3, 1), "Scaled")):
        with pytest.raises(TypeError, match=f"a chain holds a {name}; allowed: ConvBNReLU2d"):
            FusedChain(conv3(3, 3), nn.Sequential(module))
        with pytest.raises(TypeError, match=f"a chain holds a {name}"):
            Residual(module, conv3(3, 3))
        with pytest.raises(TypeError, match=f"a chain holds a {name}"):
            Residual(conv3(3, 3), shortcut=module)
    with pytest.raises(TypeError, match="return_indices=True"):
        FusedChain(nn.MaxPool2d(2, return_indices=True))
    for body in ((), (conv3(3, 3), nn.MaxPool2d(2))):
        with pytest.raises(TypeError, match=r"last layer of a residual block is .*; a ConvBNReLU2d is needed"):
            Residual(*body)
    chain = FusedChain(conv3(3, 3))
    chain.append(nn.Dropout())
    with pytest.raises(TypeError, match="a chain holds a Dropout"):
        chain(images(dtype=torch.float32))


@pytest.mark.parametrize("chained", [True, False])
def test_bad_input(chained: bool) -> None:
    wrap = FusedChain if chained else nn.Sequential
    with pytest.raises(RuntimeError, match=r"residual must have shape \[4, 5, 8, 8\].* got \[4, 3, 8, 8\]"):
        wrap(Residual(conv3(3, 5)))(images(dtype=torch.float32))
    with pytest.raises(TypeError, match=r"conv_weight must have the dtype of input, torch.float64"):
        wrap(conv3(3, 5))(images())
    with pytest.raises(ValueError, match="input must have 4 dimensions"):
        wrap(conv3(3, 5))(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        wrap(nn.AvgPool2d(8), conv3(3, 5))(images(1, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="input must have 5 channels"):
        wrap(conv3(3, 4), conv3(5, 4))(images(dtype=torch.float32))
