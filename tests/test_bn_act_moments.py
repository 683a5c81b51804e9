"""The operator table: kernels against the reference in float64, and no worse than twice eager's own error."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layerwise_ext import _C, functional, reference
from operator_cases import (
    CAPABILITIES,
    DTYPES,
    LAYOUTS,
    LOSSES,
    check,
    draw,
    eager,
    loss_of,
    off_zero,
    parameters,
    quarters,
)
from torch import Tensor

EPS = 1e-3

# N, C, H, W, bins
SHAPES = [
    (2, 1, 5, 7, (1, 1)),
    (1, 3, 8, 8, (2, 2)),
    (1, 17, 4, 9, (4, 9)),
    (3, 17, 7, 5, (3, 2)),
    (2, 16, 10, 10, (4, 4)),
    (2, 33, 6, 6, (4, 5)),
    (4, 64, 3, 3, (2, 2)),
    (5, 48, 1, 1, (1, 1)),
    (2, 8, 1, 37, (1, 3)),
    (2, 5, 23, 1, (7, 1)),
    (7, 40, 2, 2, (2, 2)),
]


def run(
    function: Any,
    z: Tensor,
    params: dict[str, Tensor | None],
    options: dict[str, Any],
    kind: str,
    weights: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics, by name."""
    z = z.detach().requires_grad_()
    leaves = {k: None if v is None else v.clone() for k, v in params.items()}
    for key in ("weight", "bias"):
        if leaves[key] is not None:
            leaves[key] = leaves[key].requires_grad_()
    outputs = function(z, leaves, options)
    loss_of(outputs, kind, weights).backward()
    results = {"y": outputs[0].detach(), "m1": outputs[1].detach(), "m2": outputs[2].detach(), "dz": z.grad}
    results |= {f"d{k}": leaves[k].grad for k in ("weight", "bias") if leaves[k] is not None}
    return results | {k: leaves[k] for k in ("running_mean", "running_var")}


def call(module: Any) -> Any:
    def function(z: Tensor, params: dict[str, Tensor | None], options: dict[str, Any]) -> Any:
        return module.bn_act_moments(z, **params, **options)

    return function


def compare(
    z: Tensor,
    params: dict[str, Tensor | None],
    dtype: torch.dtype,
    layout: torch.memory_format,
    kind: str,
    **options: Any,
) -> None:
    """z and params are float64; z may have any strides in `dtype`."""
    options = {"momentum": 0.3, "eps": EPS, "negative_slope": 0.2, **options}
    generator = torch.Generator().manual_seed(7)
    n, c = z.shape[:2]
    weights = {"y": quarters(*z.shape, generator=generator)}
    weights |= {key: quarters(n, c, *options["bins"], generator=generator) for key in "pq"}
    accumulation = torch.promote_types(dtype, torch.float32)
    low = {k: None if v is None else v.to(accumulation) for k, v in params.items()}
    exact = {k: None if v is None else v.double() for k, v in low.items()}
    typed = z if z.dtype == dtype else z.to(dtype).contiguous(memory_format=layout)

    expected = run(call(reference), typed.double(), exact, options, kind, weights)
    ours = run(call(functional), typed, low, options, kind, weights)
    peer = run(eager, typed, low, options, kind, weights)
    assert ours["y"].dtype == dtype and ours["m1"].dtype == ours["m2"].dtype == accumulation
    terms = expected["dz"].abs().sum((0, 2, 3)).max().item()  # of dweight and dbias, up to factors near 1
    for name, value in expected.items():
        check(name, ours[name], value, peer[name], terms if name in ("dweight", "dbias") else 0.0)


def case(
    n: int, c: int, h: int, w: int, training: bool, affine: bool = True
) -> tuple[Tensor, dict[str, Tensor | None]]:
    return draw(
        lambda g: (quarters(n, c, h, w, generator=g), parameters(c, g, affine)),
        lambda drawn: off_zero(*drawn, training, EPS),
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "identity"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_table(shape: Any, dtype: str, layout: str, activation: str, training: bool) -> None:
    n, c, h, w, bins = shape
    z, params = case(n, c, h, w, training)
    # One loss per cell of the table, all losses along each row of it.
    index = SHAPES.index(shape) + list(DTYPES).index(dtype) + 2 * list(LAYOUTS).index(layout) + 3 * training
    kind = list(LOSSES)[index % len(LOSSES)]
    compare(z, params, DTYPES[dtype], LAYOUTS[layout], kind, bins=bins, activation=activation, training=training)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_loss(dtype: str, layout: str, kind: str) -> None:
    z, params = case(2, 35, 6, 5, True)
    for activation in ("relu", "leaky_relu"):
        compare(z, params, DTYPES[dtype], LAYOUTS[layout], kind, bins=(4, 2), activation=activation, training=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_affine_parameters(layout: str, training: bool) -> None:
    z, params = case(3, 20, 4, 6, training, affine=False)
    for kind in ("m1+m2", "y"):
        compare(z, params, torch.float32, LAYOUTS[layout], kind, bins=(2, 3), activation="relu", training=training)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_weight(layout: str) -> None:
    z, params = case(3, 20, 4, 6, True)
    assert params["weight"] is not None and params["bias"] is not None
    params["weight"][::2] = 0
    params["bias"][:] = 0.25
    params["bias"][4:8] = -0.25
    compare(z, params, torch.float32, LAYOUTS[layout], "y+m1+m2", bins=(2, 3), activation="relu", training=True)


@pytest.mark.parametrize("outlier", [None, 0.0, 3e4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_much_larger_than_deviation(layout: str, outlier: float | None) -> None:
    """A shift by the first element would fail where that element is not near the mean."""
    z, _ = case(4, 18, 9, 9, True)
    z += 1e4
    if outlier is not None:
        z[0, :, 0, 0] = outlier
    typed = z.float().contiguous(memory_format=LAYOUTS[layout])
    options: dict[str, Any] = {"training": True, "bins": (3, 3), "eps": EPS}
    y, m1, _ = functional.bn_act_moments(typed, **options)
    expected = reference.bn_act_moments(typed.double(), **options)
    peer = F.relu(F.batch_norm(typed, None, None, training=True, eps=EPS))
    check("y", y, expected[0], peer)
    check("m1", m1, expected[1], F.adaptive_avg_pool2d(peer, 3) * functional.cell_area((9, 9), 3))
    mean, var = torch.ops.layerwise_ext.batch_norm_statistics(typed)
    exact_mean, exact_var = reference.batch_statistics(typed.double())
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


def views(z: Tensor) -> dict[str, Tensor]:
    """Views of [4, 6, 5, 8] maps with the values of z [2, 3, 5, 4], none of them dense."""
    n, c, h, w = z.shape
    wide = z.new_zeros(2 * n, 2 * c, h, 2 * w)
    wide_last = wide.contiguous(memory_format=torch.channels_last).clone()
    return {
        "channel slice, channels_last": _fill(wide_last[:n, :c, :, :w], z),
        "channel slice, contiguous": _fill(wide[:n, :c, :, :w], z),
        "every second sample": _fill(wide_last[::2, :c, :, :w], z),
        "every second column": _fill(wide[:n, :c, :, ::2], z),
        "every second channel": _fill(wide_last[:n, ::2, :, :w], z),
        "transposed": z.transpose(2, 3).contiguous().transpose(2, 3),
        "batch and channels swapped": z.transpose(0, 1).contiguous().transpose(0, 1),
    }


def _fill(view: Tensor, z: Tensor) -> Tensor:
    return view.copy_(z)


@pytest.mark.parametrize("kind", ["m1+m2", "y+m1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype: str, kind: str) -> None:
    z, params = case(2, 3, 5, 4, True)
    for view in views(z.to(DTYPES[dtype])).values():
        compare(
            view, params, DTYPES[dtype], torch.contiguous_format, kind, bins=(2, 2), activation="relu", training=True
        )


def test_views_are_read_in_place_and_never_written() -> None:
    z, _ = case(2, 3, 5, 4, True)
    for name, view in views(z).items():
        before = view.clone()
        leaf = view.detach().requires_grad_()
        functional.bn_act_moments(leaf, training=True, bins=2).m1.sum().backward()
        assert torch.equal(view, before), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expanded_input_and_gradients(layout: str) -> None:
    z, params = case(2, 6, 4, 4, False)
    one = z[:1].float().contiguous(memory_format=LAYOUTS[layout])
    compare(
        one.expand(3, -1, -1, -1),
        params,
        torch.float32,
        LAYOUTS[layout],
        "m1",
        bins=(2, 2),
        activation="relu",
        training=False,
    )
    leaf = z.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    functional.bn_act_moments(leaf, training=True, bins=2).y.sum().backward()  # a gradient of y with all strides 0
    dense = leaf.grad.clone()
    leaf.grad = None
    functional.bn_act_moments(leaf, training=True, bins=1).m1.sum().backward()  # the same loss
    torch.testing.assert_close(dense, leaf.grad, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    n, c, h, w = (
        data.draw(st.integers(1, limit), label=name) for name, limit in zip("NCHW", (4, 70, 12, 12), strict=True)
    )
    bins = data.draw(st.tuples(st.integers(1, h), st.integers(1, w)), label="bins")
    training = data.draw(st.booleans(), label="training") and n * h * w > 4
    layout = data.draw(st.sampled_from(list(LAYOUTS.values())), label="layout")
    kind = data.draw(st.sampled_from(list(LOSSES)), label="loss")
    activation = data.draw(st.sampled_from(["relu", "leaky_relu"]), label="activation")
    z, params = case(n, c, h, w, training)
    compare(z, params, torch.float32, layout, kind, bins=bins, activation=activation, training=training)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability(capability: str, restored_capability: None) -> None:
    _C.set_cpu_capability(capability)
    for (n, c, h, w, bins), dtype, layout in itertools.product(SHAPES[1::2], DTYPES.values(), LAYOUTS.values()):
        for kind, activation in (("m1+m2", "relu"), ("y+m1", "leaky_relu")):
            z, params = case(n, c, h, w, True)
            compare(z, params, dtype, layout, kind, bins=bins, activation=activation, training=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_propagates(dtype: str, layout: str) -> None:
    z = torch.randn(3, 20, 4, 4).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
    z[1, 7, 2, 2] = float("nan")
    y, m1, _ = functional.bn_act_moments(z, training=True, bins=2)
    assert y[:, 7].isnan().all() and m1[:, 7].isnan().all()
    assert not torch.cat((y[:, :7], y[:, 8:]), 1).isnan().any()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_values_as_pytorch(layout: str, activation: str) -> None:
    z = torch.randn(2, 20, 3, 3).contiguous(memory_format=LAYOUTS[layout])
    z[0, 0, 0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    statistics = (torch.zeros(20), torch.ones(20))
    y = functional.bn_act_moments(z, *statistics, activation=activation).y
    function = F.relu if activation == "relu" else F.leaky_relu
    torch.testing.assert_close(y, function(F.batch_norm(z, *statistics)), equal_nan=True)


def test_running_statistics_over_steps() -> None:
    layer = torch.nn.BatchNorm2d(6, momentum=0.2).double()
    mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for _ in range(4):
        z = torch.randn(3, 6, 4, 5, dtype=torch.float64) * 3 + 1
        layer(z)
        functional.bn_act_moments(z, mean, var, training=True, momentum=0.2)
    torch.testing.assert_close(mean, layer.running_mean)
    torch.testing.assert_close(var, layer.running_var)
