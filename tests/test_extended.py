"""The operators with a residual, with every activation and with downsampling, against the reference in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layerwise_ext import _C, functional, reference
from operator_cases import CAPABILITIES, DTYPES, LAYOUTS, LOSSES, MARGIN, check, draw, loss_of, parameters, quarters
from torch import Tensor

EPS = 1e-3
ACTIVATIONS = (
    "relu", "leaky_relu", "identity", "prelu", "rrelu", "relu6", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh",
    "hardswish",
)  # fmt: skip
KINKS = {"relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
SMOOTH = ("identity", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh")
SEED = torch.tensor([0x1234567_89ABCDEF])

# N, C, H, W, downsample, ceil_mode, bins
SHAPES = [
    (2, 51, 4, 6, None, False, (2, 3)),  # two vectors of channels at a time, one, and a rest
    (2, 19, 6, 8, ("max", 2), False, (3, 2)),
    (2, 17, 7, 9, ("max", (2, 3)), True, (3, 2)),
    (2, 33, 7, 6, ("max", (3, 4)), False, (1, 1)),
    (2, 16, 8, 6, ("avg", 2), False, (2, 2)),
    (2, 21, 5, 10, ("avg", (2, 4)), True, (2, 3)),
    (2, 35, 9, 7, ("avg", 3), False, (3, 2)),
    (2, 5, 6, 8, ("space_to_depth", 2), False, (2, 3)),
    (2, 18, 6, 8, ("space_to_depth", (3, 2)), False, (2, 4)),
    (2, 9, 7, 9, ("stride", (2, 3)), False, (3, 2)),
    (3, 1, 6, 4, ("max", 2), False, (2, 2)),
    (3, 1, 6, 4, ("space_to_depth", 2), False, (2, 2)),
    (2, 40, 2, 2, ("avg", 2), False, (1, 1)),
    (1, 20, 4, 1, ("max", (4, 1)), False, (1, 1)),
]


def eager(z: Tensor, leaves: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What a user of plain PyTorch writes."""
    mode, window = functional._downsampling(options["downsample"])
    if mode == "stride":
        z = z[..., :: window[0], :: window[1]]
    u = F.batch_norm(
        z, leaves["running_mean"], leaves["running_var"], leaves["weight"], leaves["bias"],
        options["training"], options["momentum"], options["eps"],
    )  # fmt: skip
    if leaves.get("residual") is not None:
        u = u + leaves["residual"]
    name = options["activation"]
    if name == "rrelu":
        y = torch.where(u > 0, u, reference.random_slopes(u.shape, int(SEED), 0.1, 0.4).to(u) * u)
    else:
        y = {
            "relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, options["negative_slope"]), "identity": lambda t: t,
            "prelu": lambda t: F.prelu(t, leaves["slope"].to(t.dtype)), "relu6": F.relu6, "tanh": torch.tanh,
            "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish,
            "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        }[name](u)  # fmt: skip
    ceil = options["ceil_mode"]
    if mode == "max":
        y = F.max_pool2d(y, tuple(window), ceil_mode=ceil)
    elif mode == "avg":
        y = F.avg_pool2d(y, tuple(window), ceil_mode=ceil)
    elif mode == "space_to_depth":
        n, c, h, w = y.shape
        y = y.reshape(n, c, h // window[0], window[0], w // window[1], window[1])
        y = y.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    area = functional.cell_area(y.shape[2:], options["bins"]).to(y.dtype)
    return y, F.adaptive_avg_pool2d(y, options["bins"]) * area, F.adaptive_avg_pool2d(y * y, options["bins"]) * area


def run(
    function: Any, z: Tensor, values: dict[str, Any], options: dict[str, Any], kind: str, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs and gradients, by name."""
    z = z.detach().requires_grad_()
    leaves = {k: None if v is None else v.clone(memory_format=torch.preserve_format) for k, v in values.items()}
    trained = [k for k in ("weight", "bias", "slope", "residual") if leaves.get(k) is not None]
    for k in trained:
        leaves[k].requires_grad_()
    outputs = function(z, leaves, options)
    loss_of(outputs, kind, weights).backward()
    results = {"y": outputs[0].detach(), "m1": outputs[1].detach(), "m2": outputs[2].detach(), "dz": z.grad}
    return results | {f"d{k}": leaves[k].grad for k in trained}


def call(module: Any) -> Any:
    def function(z: Tensor, leaves: dict[str, Any], options: dict[str, Any]) -> Any:
        return module.bn_act_moments(z, **leaves, **options)

    return function


def pre_activation(z: Tensor, values: dict[str, Any], options: dict[str, Any]) -> Tensor:
    return reference.bn_act_moments(
        z, values["running_mean"], values["running_var"], values["weight"], values["bias"], eps=EPS,
        training=options["training"], residual=values.get("residual"), activation="identity",
        downsample=options["downsample"] if options["downsample"] and options["downsample"][0] == "stride" else None,
    ).y  # fmt: skip


def acceptable(z: Tensor, values: dict[str, Any], options: dict[str, Any], dtype: torch.dtype) -> bool:
    """No u near a kink, and no window whose largest element rounding decides."""
    u = pre_activation(z, values, options)
    activation = options["activation"]
    if activation not in SMOOTH:
        for kink in KINKS.get(activation, (0.0,)):
            if (u - kink).abs().min() < MARGIN:
                return False
    mode, window = functional._downsampling(options["downsample"])
    if mode != "max":
        return True
    y = reference.activate(u, activation, 0.1, 0.4, values.get("slope"), SEED)
    noise = 1e-5 * torch.sin(1e4 * y)
    rounded = [y, *(t.to(dtype) for t in (y, y + noise, y - noise, y * (1 + noise), y * (1 - noise)))]
    first, *others = (
        F.max_pool2d(t, tuple(window), ceil_mode=options["ceil_mode"], return_indices=True)[1] for t in rounded
    )
    return all(torch.equal(first, other) for other in others)


def compare(
    shape: Any, dtype: torch.dtype, layout: torch.memory_format, activation: str, with_residual: bool, kind: str,
    training: bool = True, affine: bool = True,
) -> None:  # fmt: skip
    n, c, h, w, downsample, ceil_mode, bins = shape
    options = {
        "training": training, "momentum": 0.3, "eps": EPS, "activation": activation, "negative_slope": 0.1,
        "upper_slope": 0.4, "downsample": downsample, "ceil_mode": ceil_mode, "bins": bins,
    }  # fmt: skip

    def make(g: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        z, values = quarters(n, c, h, w, generator=g), parameters(c, g, affine)
        if activation == "prelu":
            values["slope"] = 0.1 + 0.4 * torch.rand(c, generator=g, dtype=torch.float64)
        if activation == "rrelu":
            values["seed"] = SEED
        if with_residual:
            strided = downsample is not None and downsample[0] == "stride"
            rows, columns = z[..., :: downsample[1][0], :: downsample[1][1]].shape[2:] if strided else (h, w)
            values["residual"] = quarters(n, c, rows, columns, generator=g) + 0.0625
        # The parameters as the kernel will see them: in float32 they decide which element is the largest.
        accumulation = torch.promote_types(dtype, torch.float32)
        keep = ("seed", "residual")
        return z, {k: v if v is None or k in keep else v.to(accumulation).double() for k, v in values.items()}

    z, values = draw(make, lambda drawn: acceptable(*drawn, options, dtype))
    accumulation = torch.promote_types(dtype, torch.float32)
    low = {k: v if v is None or k in ("seed", "residual") else v.to(accumulation) for k, v in values.items()}
    if with_residual:
        low["residual"] = values["residual"].to(dtype).contiguous(memory_format=layout)
    typed = z.to(dtype).contiguous(memory_format=layout)
    y = reference.bn_act_moments(z, **values, **options).y
    generator = torch.Generator().manual_seed(7)
    weights = {"y": quarters(*y.shape, generator=generator)}
    weights |= {key: quarters(*y.shape[:2], *bins, generator=generator) for key in "pq"}

    expected = run(call(reference), z, values, options, kind, weights)
    ours = run(call(functional), typed, low, options, kind, weights)
    peer = run(eager, typed, low, options, kind, weights)
    assert ours["y"].dtype == dtype and ours["m1"].dtype == accumulation
    terms = expected["dz"].abs().sum((0, 2, 3)).max().item()
    for name, value in expected.items():
        check(name, ours[name], value, peer[name], terms if name in ("dweight", "dbias", "dslope") else 0.0)


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: str, layout: str, activation: str, with_residual: bool) -> None:
    index = ACTIVATIONS.index(activation) + list(DTYPES).index(dtype) + 2 * with_residual
    for i, shape in enumerate((SHAPES[0], SHAPES[1], SHAPES[5], SHAPES[8])):
        kind = list(LOSSES)[(index + i) % len(LOSSES)]
        compare(shape, DTYPES[dtype], LAYOUTS[layout], activation, with_residual, kind, training=i != 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_downsampling(shape: Any, dtype: str, layout: str) -> None:
    for (i, kind), activation in itertools.product(enumerate(LOSSES), ("relu", "leaky_relu")):
        compare(shape, DTYPES[dtype], LAYOUTS[layout], activation, i % 2 == 1, kind, training=i % 3 != 2, affine=i != 1)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype: str, activation: str) -> None:
    """z, residual and the gradient of y may each have strides of their own; nothing beside is read."""
    g = torch.Generator().manual_seed(0)
    shape = (3, 51, 5, 6)
    z, residual, grad_y = (quarters(*shape, generator=g).to(DTYPES[dtype]) for _ in range(3))

    def padded(t: Tensor, rows: int, columns: int) -> Tensor:
        n, c, h, w = t.shape
        around = torch.full((n, c, h + rows, w + columns), float("nan"), dtype=t.dtype)
        view = around.contiguous(memory_format=torch.channels_last)[:, :, rows:, columns:]
        return view.copy_(t)

    def gradients(z: Tensor, residual: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
        leaves = [z.detach().requires_grad_(), residual.detach().requires_grad_()]
        y = functional.bn_act_moments(leaves[0], activation=activation, residual=leaves[1], training=True).y
        return y, *torch.autograd.grad(y, leaves, grad_y)

    dense = (t.contiguous(memory_format=torch.channels_last) for t in (z, residual, grad_y))
    expected = gradients(*dense)
    for pads in itertools.permutations(((0, 0), (2, 0), (1, 3))):
        views = [padded(t, *pad) for t, pad in zip((z, residual, grad_y), pads, strict=True)]
        for ours, value in zip(gradients(*views), expected, strict=True):
            torch.testing.assert_close(ours, value, rtol=max(1e-5, 1.28 * torch.finfo(ours.dtype).eps), atol=1e-5)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability(capability: str, restored_capability: None) -> None:
    _C.set_cpu_capability(capability)
    for shape, dtype, layout in itertools.product(SHAPES[::3], DTYPES.values(), LAYOUTS.values()):
        for activation, kind in (("relu", "y+m1+m2"), ("prelu", "m1+m2"), ("gelu", "y+m1"), ("rrelu", "m1")):
            compare(shape, dtype, layout, activation, activation != "prelu", kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_nan_go_where_max_pool2d_sends_them(dtype: str) -> None:
    """The identity leaves every tie as it is."""
    generator = torch.Generator().manual_seed(0)
    z = (torch.randint(0, 3, (2, 20, 9, 8), generator=generator) / 2).to(DTYPES[dtype])
    options = {"eps": 0.0, "activation": "identity", "downsample": ("max", 2)}
    statistics = torch.zeros(20), torch.ones(20)
    for layout in LAYOUTS.values():
        ours, plain = (z.clone().contiguous(memory_format=layout).requires_grad_() for _ in range(2))
        y = functional.bn_act_moments(ours, *statistics, **options).y
        expected = F.max_pool2d(plain, 2)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(ours.grad, plain.grad)
        with torch.no_grad():
            for place in ((0, 3, 1, 1), (1, 5, 0, 0), (1, 5, 1, 0)):
                ours[place] = plain[place] = float("nan")
        y = functional.bn_act_moments(ours, *statistics, **options).y
        torch.testing.assert_close(y, F.max_pool2d(plain, 2), rtol=0, atol=0, equal_nan=True)


def test_equal_roundings_are_ties() -> None:
    """Two elements that differ in float32 but not as they are stored: the first one is the largest."""
    z = torch.tensor([1.0, 1.0078125]).bfloat16().reshape(1, 1, 1, 2).expand(1, 16, 1, 2).contiguous()
    statistics = torch.zeros(16), torch.full((16,), 1024.0)
    leaf = z.clone().requires_grad_()
    bias = torch.full((16,), 16.0)
    functional.bn_act_moments(leaf, *statistics, None, bias, eps=0.0, downsample=("max", (1, 2))).y.sum().backward()
    assert (leaf.grad[..., 0] > 0).all() and (leaf.grad[..., 1] == 0).all()


def test_random_slopes_are_uniform_and_follow_the_seed() -> None:
    z = -torch.ones(4, 64, 32, 32)
    statistics = torch.zeros(64), torch.ones(64)

    def slopes(**options: Any) -> Tensor:
        return -functional.bn_act_moments(
            z, *statistics, eps=0.0, activation="rrelu", negative_slope=0.125, **options
        ).y

    torch.manual_seed(3)
    one, two = slopes(), slopes()
    torch.manual_seed(3)
    assert torch.equal(one, slopes()) and not torch.equal(one, two)
    sample = ((one - 0.125) / (1 / 3 - 0.125)).flatten().sort().values
    uniform = torch.arange(1, sample.numel() + 1) / sample.numel()
    assert (sample - uniform).abs().max() < 2 / sample.numel() ** 0.5  # Kolmogorov-Smirnov: 1.36 at 5 %
    x = one.flatten() - one.mean()
    for lag in (1, 32, 1024, 65536):
        assert abs((x[lag:] * x[:-lag]).mean() / x.square().mean()) < 5 / x.numel() ** 0.5
    channels_last = z.contiguous(memory_format=torch.channels_last)
    seed = torch.tensor([5])
    assert torch.equal(
        functional.bn_act_moments(channels_last, *statistics, activation="rrelu", seed=seed).y,
        functional.bn_act_moments(z, *statistics, activation="rrelu", seed=seed).y,
    )


DETACHED = (("max", 2), ("max", (2, 3)), ("avg", 2), ("stride", (1, 2)), ("space_to_depth", 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu", "gelu"])
def test_detached_downsampling(activation: str, dtype: str, layout: str) -> None:
    """Moments of the map before, and all that comes from them, as if the whole map had been written."""
    g = torch.Generator().manual_seed(0)
    x = quarters(3, 16, 10, 12, generator=g).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
    weight = quarters(19, 16, 3, 3, generator=g).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
    residual = quarters(3, 19, 10, 12, generator=g).to(x.dtype).contiguous(memory_format=LAYOUTS[layout])
    accumulated = torch.promote_types(x.dtype, torch.float32)
    gamma, beta, slope, p = (torch.rand(size, generator=g).to(accumulated) for size in (19, 19, 19, (3, 19, 4, 3)))
    slope = slope if activation == "prelu" else None

    def run(**options: Any) -> tuple[functional.ActivationMoments, list[Tensor], list[Tensor]]:
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, gamma, beta, slope, residual)]
        running = [torch.zeros(19, dtype=accumulated), torch.ones(19, dtype=accumulated)]
        moments = functional.conv_bn_act_moments(
            leaves[0], leaves[1], None, *running, leaves[2], leaves[3], padding=1, training=True,
            activation=activation, slope=leaves[4], residual=leaves[5], bins=(4, 3), **options,
        )  # fmt: skip
        loss = (moments.m1 * p + moments.m2 * p.square()).sum()
        return moments, torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]), running

    whole, gradients, running = run()
    for mode, factor in DETACHED:
        part, part_gradients, part_running = run(detached_downsample=(mode, factor))
        assert not part.y.requires_grad
        # From the statistics as they are stored; an average rounds once, not twice.
        eps = torch.finfo(part.y.dtype).eps
        expected_y = functional.downsample(whole.y.detach(), mode, factor)
        torch.testing.assert_close(part.y, expected_y, rtol=4 * eps, atol=4 * eps, msg=mode)
        assert torch.equal(part.m1, whole.m1) and torch.equal(part.m2, whole.m2)
        for ours, expected in zip((*part_gradients, *part_running), (*gradients, *running), strict=True):
            assert torch.equal(ours, expected)


def test_detached_downsampling_of_cut_windows() -> None:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 1, 1)
    options: dict[str, Any] = {"training": True, "ceil_mode": True}
    y = functional.conv_bn_act_moments(x, w, detached_downsample=("max", 2), **options).y
    torch.testing.assert_close(y, functional.conv_bn_act_moments(x, w, downsample=("max", 2), **options).y)


@pytest.mark.parametrize("downsample", [("max", 9), ("space_to_depth", 2)])
def test_detached_downsampling_fails_before_anything_changes(downsample: Any) -> None:
    running = torch.zeros(4), torch.ones(4)
    with pytest.raises(RuntimeError, match=r"window|space_to_depth"):
        functional.conv_bn_act_moments(
            torch.randn(2, 3, 5, 5), torch.randn(4, 3, 1, 1), None, *running, training=True,
            detached_downsample=downsample,
        )  # fmt: skip
    assert (running[0] == 0).all() and (running[1] == 1).all()


@pytest.mark.parametrize("options", [{"downsample": ("max", 2)}, {"activation": "rrelu"}], ids=["downsample", "rrelu"])
def test_detached_downsampling_goes_alone(options: dict[str, Any]) -> None:
    running = torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match=r"detached_downsample=\('avg', 2\) goes with neither"):
        functional.conv_bn_act_moments(
            torch.ones(2, 3, 6, 6), torch.ones(4, 3, 1, 1), None, *running, training=True,
            detached_downsample=("avg", 2), **options,
        )  # fmt: skip
    assert (running[0] == 0).all()


@pytest.mark.parametrize(
    ("message", "error", "options"),
    [
        ("activation must be one of .*'hardswish', got 'elu'", RuntimeError, {"activation": "elu"}),
        ("slope must be given with activation 'prelu'", RuntimeError, {"activation": "prelu"}),
        ("slope must be given with activation 'prelu'.*with 'relu'", RuntimeError, {"slope": torch.ones(4)}),
        (r"slope must have shape \[4\].*got \[3\]", RuntimeError, {"activation": "prelu", "slope": torch.ones(3)}),
        ("seed must be given with activation 'rrelu'", RuntimeError, {"seed": torch.tensor([1])}),
        ("seed must be one int64", RuntimeError, {"activation": "rrelu", "seed": torch.ones(1)}),
        (r"residual must have shape \[2, 4, 6, 6\].*got \[2, 4, 1, 6\]", RuntimeError,
         {"residual": torch.ones(2, 4, 1, 6)}),
        ("residual must have shape .* dtype Float, .*Double", RuntimeError,
         {"residual": torch.ones(2, 4, 6, 6).double()}),
        ("downsample must be None or", ValueError, {"downsample": "max"}),
        ("downsample mode is 'sum'; allowed: 'max', 'avg', 'stride', 'space_to_depth'", ValueError,
         {"downsample": ("sum", 2)}),
        ("factor must be at least 1, got 0", ValueError, {"downsample": ("max", 0)}),
        ("factor must be an int or two ints", ValueError, {"downsample": ("max", (1, 2, 3))}),
        (r"space_to_depth needs.*\[4, 2\], got \[6, 6\]", RuntimeError, {"downsample": ("space_to_depth", (4, 2))}),
        (r"window \[7, 1\] is larger than the map", RuntimeError, {"downsample": ("avg", (7, 1))}),
        (r"bins must lie between \(1, 1\) and \(3, 3\)", RuntimeError, {"downsample": ("avg", 2), "bins": 4}),
    ],
)  # fmt: skip
def test_bad_arguments(message: str, error: type[Exception], options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        functional.bn_act_moments(torch.randn(2, 4, 6, 6), training=True, **options)
