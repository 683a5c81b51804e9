"""FusedChain and Residual: the numbers of nn.Sequential, in every form, mode and copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import layerwise_ext as lw
import pytest
import torch
import torch.nn.functional as F
from chain_cases import (
    LAYOUTS,
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
from layerwise_ext.nn import ConvBNReLU2d, FusedChain, Residual
from torch import Tensor, nn


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
