"""float16 on the CPU: the conversions, and the convolution, which is float32's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layerwise_ext import _C, functional
from operator_cases import CAPABILITIES, LAYOUTS

pytestmark = pytest.mark.cpu_kernels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_number_is_read_and_rounded_as_by_pytorch(
    capability: str, layout: str, restored_capability: None
) -> None:
    """All 65536 bit patterns; factors that leave them, round them, make them subnormal, zero or infinite."""
    _C.set_cpu_capability(capability)
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    z = numbers.view(2, 64, 16, 32).contiguous(memory_format=LAYOUTS[layout])
    for factor in (1.0, 1 / 3, 2.0**-10, 1.1 * 2.0**-14, 2.0**-25, 1.5, 1000.0):
        y = functional.bn_act_moments(
            z,
            torch.zeros(64),
            torch.ones(64),
            torch.full((64,), factor),
            training=False,
            activation="identity",
            eps=1e-30,
        ).y
        expected = (z.float() * factor).half()
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 4])
def test_sums_of_a_convolution_are_float32s(groups: int, layout: str) -> None:
    """Terms of 2048, one of 1 and back to zero: sums in float16 would lose the one."""
    x = torch.full((2, 16, 8, 9), 2048.0)
    x[:, ::4] = 1
    weight = torch.ones(16, 16 // groups, 3, 3)
    for step in range(1, 16 // groups, 4):
        weight[:, step], weight[:, step + 1], weight[:, step + 2] = 1, -0.5, -0.5
    x, weight = (t.half().contiguous(memory_format=LAYOUTS[layout]) for t in (x, weight))
    exact = F.conv2d(x.double(), weight.double(), padding=1, groups=groups)
    options = {"padding": 1, "groups": groups, "activation": "identity", "training": False, "eps": 1e-30}
    norm = {"running_mean": torch.zeros(16), "running_var": torch.ones(16)}
    for leaf in (weight, weight.clone().requires_grad_()):  # by the operator of inference, by that of training
        y = functional.conv_bn_act(x, leaf, **norm, **options)
        assert y.dtype == torch.float16 and y.is_contiguous(memory_format=LAYOUTS[layout])
        assert torch.equal(y.double(), exact)
