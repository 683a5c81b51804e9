"""Gradients as autograd sees them: gradcheck, opcheck, the life of saved tensors, what is computed and what is not."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layerwise_ext import _ops, functional
from layerwise_ext._ops import Form
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

operators = torch.ops.layerwise_ext


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("options", [
    {"activation": "relu", "bins": (2, 2), "padding": 1},
    {"activation": "leaky_relu", "bins": (3, 2), "stride": 2, "padding": 1},
    {"activation": "identity", "bins": (1, 4), "groups": 2},
    {"activation": "leaky_relu", "bins": (2, 2), "training": False, "dilation": 2, "padding": 2},
], ids=str)  # fmt: skip
def test_gradcheck(options: dict[str, Any], layout: torch.memory_format) -> None:
    groups = options.get("groups", 1)
    x = doubles(2, 4, 5, 6).contiguous(memory_format=layout).requires_grad_()
    w = doubles(6, 4 // groups, 3, 3).requires_grad_()
    conv_bias, gamma, beta = (doubles(6).requires_grad_() for _ in range(3))
    mean, var = doubles(6), torch.rand(6, dtype=torch.float64) + 0.5

    def function(x: Tensor, w: Tensor, conv_bias: Tensor, gamma: Tensor, beta: Tensor) -> Any:
        statistics = (mean.clone(), var.clone())
        return functional.conv_bn_act_moments(
            x, w, conv_bias, *statistics, gamma, beta, **{"training": True, **options}
        )

    assert torch.autograd.gradcheck(function, (x, w, conv_bias, gamma, beta), check_undefined_grad=False)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_of_a_given_pre_activation(training: bool) -> None:
    z, gamma, beta = doubles(2, 3, 5, 4).requires_grad_(), doubles(3).requires_grad_(), doubles(3).requires_grad_()
    mean, var = doubles(3), torch.rand(3, dtype=torch.float64) + 0.5

    def function(z: Tensor, gamma: Tensor, beta: Tensor) -> Any:
        return functional.bn_act_moments(z, mean.clone(), var.clone(), gamma, beta, training=training, bins=(3, 3))

    assert torch.autograd.gradcheck(function, (z, gamma, beta), check_undefined_grad=False)


def _arguments() -> dict[str, tuple[Any, ...]]:
    z = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    w, gamma, beta = torch.randn(4, 3, 3, 3), torch.rand(4), torch.randn(4)
    without = (None, None)  # no running statistics
    form = Form(bins=[2, 3])
    convolution = ([1, 1], [1, 1], [1, 1], 1)
    _, m1, m2, sums, mean, var = operators.bn_act_moments(z, gamma, beta, None, None, *form, True, True)
    gradients = (torch.randn_like(z), torch.randn_like(m1), torch.randn_like(m2))
    dgamma, dbeta, _ = operators.bn_act_moments_backward_sums(z, *gradients, sums, mean, var, gamma, beta, *form)
    backward = (z, *gradients, dgamma, dbeta, mean, var, gamma, beta, *form, 60.0)
    return {
        "batch_norm_statistics": (z,),
        "bn_act_moments": (
            z.clone().requires_grad_(),
            gamma.clone().requires_grad_(),
            beta,
            *without,
            *form,
            True,
            True,
        ),
        "conv_bn_act_moments": (
            x,
            w.clone().requires_grad_(),
            None,
            gamma,
            beta,
            *without,
            *convolution,
            *form,
            False,
            True,
        ),
        "bn_act_moments_backward_sums": (z, *gradients, sums, mean, var, gamma, beta, *form),
        "bn_act_moments_backward": (*backward, False),
        "conv_bn_act_moments_backward": (*backward, x, w, *convolution, True, True, False, False),
        "conv_bn_act_moments_backward_": (z.clone(), *backward[1:], x, w, *convolution, False, True, False, False),
        "update_running_statistics_": (torch.zeros(4), torch.ones(4), mean, var, None, 60, 0.1),
    }


@pytest.mark.parametrize("name", _arguments())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(operators, name).default, _arguments()[name])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(
    "form",
    [
        Form(bins=[2, 3], downsample="max", window=[2, 2]),
        Form(bins=[3, 2], downsample="avg", window=[2, 3], ceil_mode=True, activation="gelu"),
        Form(bins=[2, 2], downsample="space_to_depth", window=[3, 2], activation="prelu"),
        Form(activation="rrelu", negative_slope=0.1, seed=torch.tensor([7])),
    ],
    ids=lambda form: form.downsample,
)
def test_opcheck_of_extended_forms(form: Form, layout: torch.memory_format) -> None:
    z, residual = (torch.randn(2, 4, 6, 7 - (form.window == [3, 2])).contiguous(memory_format=layout) for _ in range(2))
    slope = torch.rand(4) if form.activation == "prelu" else None
    form = form._replace(slope=slope, residual=residual)
    trained = form._replace(
        slope=None if slope is None else slope.clone().requires_grad_(), residual=residual.clone().requires_grad_()
    )
    gamma, beta = torch.rand(4), torch.randn(4)
    moments = (z.clone().requires_grad_(), gamma, beta, None, None, *trained, bool(form.bins), True)
    torch.library.opcheck(operators.bn_act_moments.default, moments)
    y, m1, m2, sums, mean, var = operators.bn_act_moments(z, gamma, beta, None, None, *form, True, True)
    gradients = (torch.randn_like(y), *((torch.randn_like(m1), torch.randn_like(m2)) if form.bins else (None, None)))
    torch.library.opcheck(
        operators.bn_act_moments_backward_sums.default, (z, *gradients, sums, mean, var, gamma, beta, *form)
    )
    dgamma, dbeta, _ = operators.bn_act_moments_backward_sums(z, *gradients, sums, mean, var, gamma, beta, *form)
    backward = (z, *gradients, dgamma, dbeta, mean, var, gamma, beta, *form, 60.0)
    torch.library.opcheck(operators.bn_act_moments_backward.default, (*backward, True))
    x, w = torch.randn(2, 3, 6, z.size(3)).contiguous(memory_format=layout), torch.randn(4, 3, 3, 3)
    convolution = ([1, 1], [1, 1], [1, 1], 1)
    torch.library.opcheck(
        operators.conv_bn_act_moments.default,
        (x, w.clone().requires_grad_(), None, gamma, beta, None, None, *convolution, *trained, True, not form.bins),
    )
    torch.library.opcheck(
        operators.conv_bn_act_inference.default, (x, w, None, gamma, beta, mean, var, *convolution, *form)
    )
    for needs in ((True, True, True), (False, True, False), (False, False, True)):
        torch.library.opcheck(
            operators.conv_bn_act_moments_backward.default, (*backward, x, w, *convolution, *needs, False)
        )


@pytest.mark.parametrize("downsample", [None, ("max", 2), ("avg", (2, 3)), ("space_to_depth", 2)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "prelu", "silu", "gelu", "tanh"])
def test_gradcheck_of_extended_forms(activation: str, downsample: Any) -> None:
    torch.manual_seed(0)
    z, residual, slope = doubles(2, 3, 4, 6).requires_grad_(), doubles(2, 3, 4, 6).requires_grad_(), None
    if activation == "prelu":
        slope = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)

    def function(z: Tensor, residual: Tensor, slope: Tensor | None) -> Any:
        options = {"activation": activation, "downsample": downsample, "slope": slope, "residual": residual}
        return functional.bn_act_moments(z, training=True, bins=(2, 1), **options)

    assert torch.autograd.gradcheck(function, (z, residual, slope), check_undefined_grad=False)


# -- Saved tensors ----------------------------------------------------------------------------------------------------


class Stage:
    """One fused layer on fixed values, and the gradient of its weight from eager PyTorch in float64."""

    def __init__(self, channels: int = 8) -> None:
        self.x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        self.w = torch.randn(channels, 3, 3, 3).requires_grad_()

    def moments(self) -> functional.ActivationMoments:
        return functional.conv_bn_act_moments(self.x, self.w, padding=1, training=True, bins=2)

    def expected(self, loss: Any) -> Tensor:
        w = self.w.detach().double().requires_grad_()
        z = F.conv2d(self.x.double(), w, padding=1)
        y = F.relu(F.batch_norm(z, None, None, training=True))
        (gradient,) = torch.autograd.grad(loss(functional.ActivationMoments(y, *_moments(y))), w)
        return gradient.float()


def _moments(y: Tensor) -> tuple[Tensor, Tensor]:
    return F.adaptive_avg_pool2d(y, 2) * 16, F.adaptive_avg_pool2d(y * y, 2) * 16


def cubes(m: functional.ActivationMoments) -> Tensor:
    return (m.m1**3).sum() / 1000


def squares(m: functional.ActivationMoments) -> Tensor:
    return (m.m2 * m.m1).sum() / 1000


def close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())


def test_retain_graph_gives_the_same_gradient_twice() -> None:
    stage = Stage()
    loss = cubes(stage.moments())
    (first,) = torch.autograd.grad(loss, stage.w, retain_graph=True)
    (second,) = torch.autograd.grad(loss, stage.w)
    assert torch.equal(first, second)
    close(first, stage.expected(cubes))


def test_two_losses_one_after_the_other() -> None:
    stage = Stage()
    moments = stage.moments()
    (first,) = torch.autograd.grad(cubes(moments), stage.w, retain_graph=True)
    (second,) = torch.autograd.grad(squares(moments), stage.w)
    close(first, stage.expected(cubes))
    close(second, stage.expected(squares))


def test_second_backward_is_pytorchs_error() -> None:
    loss = cubes(Stage().moments())
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_second_derivative_is_a_clear_error() -> None:
    for weight in (None, torch.ones(8, requires_grad=True)):
        stage = Stage()
        m = functional.conv_bn_act_moments(stage.x, stage.w, weight=weight, padding=1, training=True, bins=2)
        (gradient,) = torch.autograd.grad(cubes(m), stage.w, create_graph=True)
        close(gradient.detach(), stage.expected(cubes))
        with pytest.raises(RuntimeError, match="differentiable once"):
            gradient.sum().backward()


def test_saved_tensor_hooks() -> None:
    stage = Stage()
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = cubes(stage.moments())
    before = [t.clone() for t in kept]
    loss.backward()
    close(stage.w.grad, stage.expected(cubes))
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True)), "a tensor that hooks hold was overwritten"

    stage.w.grad = None
    with torch.autograd.graph.save_on_cpu():
        loss = cubes(stage.moments())
    loss.backward()
    close(stage.w.grad, stage.expected(cubes))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    stage = Stage()

    def segment(w: Tensor) -> Tensor:
        return cubes(functional.conv_bn_act_moments(stage.x, w, padding=1, training=True, bins=2))

    checkpoint(segment, stage.w, use_reentrant=reentrant).backward()
    close(stage.w.grad, stage.expected(cubes))


def test_activation_may_be_overwritten() -> None:
    """Stock networks do: ReLU(inplace=True), out += identity."""
    stage = Stage()
    moments = stage.moments()
    features = moments.y
    features.add_(1).mul_(2)
    (2 * features.sum() + cubes(moments)).backward()
    # y*2 + 2 summed twice is 4*sum(y) = 4*sum(m1)
    close(stage.w.grad, stage.expected(lambda m: 4 * m.m1.sum() + cubes(m)))


def test_given_pre_activation_is_not_modified() -> None:
    z = torch.randn(2, 4, 6, 6, requires_grad=True)
    before = z.detach().clone()
    functional.bn_act_moments(z, training=True, bins=2).m1.square().sum().backward()
    assert torch.equal(z, before)


def test_pre_activation_memory_becomes_that_of_its_gradient() -> None:
    """bfloat16: dz is written there. Its address is the one of z."""
    seen: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is operators.conv_bn_act_moments.default:
                seen.append(out[-1].data_ptr())
            if func is operators.conv_bn_act_moments_backward_.default:
                seen.append(args[0].data_ptr())
            return out

    stage = Stage()
    with Watch():
        cubes(stage.moments()).backward()
    assert len(seen) == 2 and seen[0] == seen[1]


@pytest.mark.parametrize("held", [True, False])
def test_sums_are_given_back_unless_somebody_holds_them(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bool] = []
    is_last_reader = _ops._is_last_reader

    def watch(ctx: Any, saved: Tensor) -> bool:
        answers.append(is_last_reader(ctx, saved))
        return answers[-1]

    monkeypatch.setattr(_ops, "_is_last_reader", watch)
    monkeypatch.setattr(_ops, "_OWN_REFERENCES", _ops._OWN_REFERENCES + 1)  # that of watch
    stage = Stage()
    form = ([1, 1], [1, 1], [1, 1], 1, *Form(bins=[2, 2]), True, True)
    _, m1, _, sums, *_ = operators.conv_bn_act_moments(stage.x, stage.w, *([None] * 5), *form)
    before, view = sums.clone(), sums[5:] if held else None
    del sums
    m1.sum().backward()
    assert answers[0] is not held
    if view is not None:
        assert torch.equal(view, before[5:])


def test_saved_tensors_that_somebody_took_out_of_the_node_stay() -> None:
    stage = Stage()
    m = stage.moments()
    saved = m.y.grad_fn.saved_tensors
    before = [None if t is None else t.clone() for t in saved]
    cubes(m).backward()
    assert all(t is None or torch.equal(t, b) for t, b in zip(saved, before, strict=True))


@pytest.mark.parametrize("convolution", [True, False])
def test_without_second_moment(convolution: bool) -> None:
    """The same numbers, and no m2."""
    results = []
    for second_moment in (True, False):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        w = torch.randn(8, 3, 3, 3).requires_grad_()
        options: dict[str, Any] = {"training": True, "bins": 2, "second_moment": second_moment}
        m = (
            functional.conv_bn_act_moments(x, w, padding=1, **options)
            if convolution
            else functional.bn_act_moments(F.conv2d(x, w, padding=1), **options)
        )
        assert (m.m2 is None) != second_moment
        ((m.m1**3).sum() + m.y.square().sum()).backward()
        results.append((m.y.detach(), m.m1.detach(), w.grad))
    for with_it, without in zip(*results, strict=True):
        assert torch.equal(with_it, without)


def test_layout_of_the_input_gradient_is_that_of_tracing() -> None:
    """Maps of one pixel are both layouts at once; the gradient is laid out as ATen's, which follows the input."""
    x = torch.randn(200, 32, 3, 3).to(torch.bfloat16).requires_grad_()
    w = torch.randn(32, 32, 3, 3).to(torch.bfloat16).requires_grad_()
    strides = []
    for tracing in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True) if tracing else contextlib.nullcontext():
            form = ([1, 1], [0, 0], [1, 1], 1, *Form(bins=[1, 1]))
            none, channels = (None, None), torch.ones(32)
            z = torch.randn(200, 32, 1, 1).to(torch.bfloat16)
            p = torch.randn(200, 32, 1, 1)
            arguments = (z, None, p, None, channels, channels, channels, channels, *none, *form[4:], 200.0, x, w)
            gradient, *_ = operators.conv_bn_act_moments_backward(*arguments, *form[:4], True, True, False, False)
            strides.append(gradient.stride())
    assert strides[0] == strides[1]


# -- What is computed -------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for() -> None:
    stage = Stage()
    gamma, beta = torch.rand(8, requires_grad=True), torch.randn(8, requires_grad=True)
    m = functional.conv_bn_act_moments(stage.x, stage.w, weight=gamma, bias=beta, padding=1, training=True, bins=2)
    (only_beta,) = torch.autograd.grad(cubes(m), beta, retain_graph=True)
    full = torch.autograd.grad(cubes(m), (stage.w, gamma, beta))
    assert torch.equal(only_beta, full[2])
    assert stage.x.grad is None


@pytest.mark.parametrize("needs_input", [True, False])
def test_no_gradient_of_the_input_unless_needed(needs_input: bool) -> None:
    flags: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "conv_bn_act_moments_backward" in func.name():
                flags.append(args[-4])
            return func(*args, **(kwargs or {}))

    stage = Stage()
    stage.x.requires_grad_(needs_input)
    with Watch():
        cubes(stage.moments()).backward()
    assert flags == [needs_input]
    assert (stage.x.grad is not None) == needs_input


def test_no_graph_without_gradients() -> None:
    x, w = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.no_grad():
        assert not functional.conv_bn_act(x, w, training=True).requires_grad
    with torch.inference_mode():
        assert functional.conv_bn_act(x, w, training=True).is_inference()
