"""Floating-point operations of the operators, for :class:`torch.utils.flop_counter.FlopCounterMode`.

Counted are convolutions and matrix products, as of PyTorch's own operators; tensors come as their shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from layerwise_ext._ops import operators

Shape = Sequence[int]


def _convolution(input: Shape, weight: Shape, geometry: Sequence[Any]) -> int:
    stride, padding, dilation = geometry[:3]
    size = [(input[2 + i] + 2 * padding[i] - dilation[i] * (weight[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    return int(conv_flop_count(list(input), list(weight), [input[0], weight[0], *size]))


@register_flop_formula(operators.convolution_statistics)
def _(input: Shape, weight: Shape, *geometry: Any, **_: Any) -> int:
    return _convolution(input, weight, geometry)


@register_flop_formula([operators.conv_bn_act_moments, operators.conv_bn_act_inference])
def _(input: Shape, conv_weight: Shape, *rest: Any, **_: Any) -> int:
    return _convolution(input, conv_weight, rest[5:])  # behind bias, batch norm's weight and bias, mean and variance


@register_flop_formula([operators.conv_bn_act_moments_backward, operators.conv_bn_act_moments_backward_])
def _(*arguments: Any, **_: Any) -> int:
    input, conv_weight, *geometry, _, needs_input, needs_weight, _, _ = arguments[-10:]
    return (int(needs_input) + int(needs_weight)) * _convolution(input, conv_weight, geometry)


@register_flop_formula(operators.pooled_linear_cross_entropy)
def _(m1: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * m1[0] * weight[0] * weight[1]


@register_flop_formula(operators.pooled_linear_cross_entropy_backward)
def _(grad_logits: Shape, scale: Any, m1: Shape, weight: Shape, size: Any, *needs: Any, **_: Any) -> int:
    needs_m1, needs_weight, _bias = needs
    return (int(needs_m1) + int(needs_weight)) * 2 * m1[0] * weight[0] * weight[1]
