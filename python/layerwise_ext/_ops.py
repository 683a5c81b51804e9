"""Loads the operator library and registers what Python adds to it: fake kernels and autograd formulas.

The operators themselves are declared in ``csrc/ops.cpp``. They are internal: call :mod:`layerwise_ext.functional`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from . import _C as _C
except ImportError as error:
    raise ImportError(
        f"layerwise_ext is not built for this interpreter or does not match this machine ({error}). "
        "Build it from the source folder with: pip install --no-build-isolation ."
    ) from error

operators = torch.ops.layerwise_ext
_aten = torch.ops.aten

# -- Fake kernels: shapes, dtypes and strides without data -------------------------------------------------------------


def _accumulation_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _empty_map(like: Tensor, size: list[Any], channels_last: bool, dtype: torch.dtype) -> Tensor:
    n, c, h, w = size
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return torch.empty_strided((n, c, h, w), strides, dtype=dtype, device=like.device)


def _is_channels_last(z: Tensor) -> bool:
    """The layout rule of csrc/maps.h: channels_last where C is innermost, contiguous otherwise."""
    return bool(z.size(1) > 1 and z.stride(1) == 1)


def _fake_outputs(z: Tensor, bins: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = z.shape
    channels_last, dtype = _is_channels_last(z), _accumulation_dtype(z)
    moments = [n, c, bins[0], bins[1]] if bins else [0, c, 1, 1]
    m1, m2 = (_empty_map(z, moments, channels_last, dtype) for _ in range(2))
    sums = z.new_empty(4 * m1.numel(), dtype=dtype)
    mean, var = (z.new_empty(c, dtype=dtype) for _ in range(2))
    return _empty_map(z, [n, c, h, w], channels_last, z.dtype), m1, m2, sums, mean, var


@torch.library.register_fake("layerwise_ext::batch_norm_statistics")
def _(z):
    return tuple(z.new_empty(z.size(1), dtype=_accumulation_dtype(z)) for _ in range(2))


@torch.library.register_fake("layerwise_ext::bn_act_moments")
def _(z, weight, bias, mean, var, eps, activation, negative_slope, bins):
    return _fake_outputs(z, bins)


@torch.library.register_fake("layerwise_ext::conv_bn_act_moments")
def _(
    input,
    conv_weight,
    conv_bias,
    weight,
    bias,
    mean,
    var,
    stride,
    padding,
    dilation,
    groups,
    eps,
    activation,
    negative_slope,
    bins,
):
    w = conv_weight.to(input.dtype)
    z = _aten.convolution(input, w, None, stride, padding, dilation, False, [0, 0], groups)
    z = _empty_map(z, list(z.shape), _is_channels_last(z), z.dtype)
    return (*_fake_outputs(z, bins), z)


@torch.library.register_fake("layerwise_ext::bn_act_moments_backward_sums")
def _(z, grad_y, grad_m1, grad_m2, sums, *args):
    return tuple(z.new_empty(z.size(1), dtype=_accumulation_dtype(z)) for _ in range(2))


@torch.library.register_fake("layerwise_ext::bn_act_moments_backward")
def _(z, *args):
    return _empty_map(z, list(z.shape), _is_channels_last(z), z.dtype)


@torch.library.register_fake("layerwise_ext::bn_act_moments_backward_")
def _(z, *args):
    return None


@torch.library.register_fake("layerwise_ext::update_running_statistics_")
def _(running_mean, running_var, mean, var, shift, count, momentum):
    return None


# -- Autograd ----------------------------------------------------------------------------------------------------------
#
# One node per layer. It saves z and what is per channel or per cell, never y: a stock network overwrites its
# activations (ReLU(inplace=True), out += identity), and z is nobody else's.


def _hooks_see_saved_tensors() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _may_overwrite(z: Tensor, ctx: Any) -> bool:
    """Whether dz may take z's memory: z is this node's own, and nobody will read it again.

    Not so while tracing (z is a stand-in then), with retain_graph=True, where saved-tensor hooks saw z, or where
    anything else still refers to its storage.
    """
    if not ctx.owns_z or type(z) is not Tensor:
        return False
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    # The saved tensor and the wrapper made by untyped_storage() are the two that are ours.
    return torch._C._storage_Use_Count(z.untyped_storage()._cdata) <= _OWN_USES


_OWN_USES = 2


def _bn_act_moments_backward(
    ctx: Any, z: Tensor, saved: tuple[Any, ...], gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dz (None where nobody needs it), dgamma, dbeta. Replicas would be summed between the two operators."""
    sums, mean, var, weight, bias = saved
    common = (mean, var, weight, bias, *ctx.form)
    dgamma, dbeta = operators.bn_act_moments_backward_sums(z, *gradients, sums, *common)
    dz = None
    if ctx.needs_dz and _may_overwrite(z, ctx):
        operators.bn_act_moments_backward_(z, *gradients, dgamma, dbeta, *common, ctx.count)
        dz = z
    elif ctx.needs_dz:
        dz = operators.bn_act_moments_backward(z, *gradients, dgamma, dbeta, *common, ctx.count)
    if torch.is_grad_enabled():  # create_graph=True
        mark = torch.empty(0, requires_grad=True)
        dz = None if dz is None else _OnceDifferentiable.apply(dz, mark)
        dgamma, dbeta = (_OnceDifferentiable.apply(d, mark) for d in (dgamma, dbeta))
    return dz, dgamma, dbeta


def _like(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else gradient.to(parameter.dtype)


class _OnceDifferentiable(torch.autograd.Function):
    """Identity whose backward says that these operators are differentiable once."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, requires_grad: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "layerwise_ext operators are differentiable once: there is no second derivative. "
            "Where one is needed, use unfused PyTorch layers"
        )


def _setup_bn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, weight, bias, mean, _, eps, activation, negative_slope, bins = inputs
    y, m1, m2, sums, mean_z, var_z = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, mean_z, var_z)
    ctx.save_for_backward(z, sums, mean_z, var_z, weight, bias)
    ctx.form = (eps, activation, negative_slope, bins)
    ctx.count = z.numel() // z.size(1) if mean is None else 0  # 0: the statistics do not depend on z
    ctx.owns_z = False
    ctx.needs_dz = ctx.needs_input_grad[0]


def _backward_bn(ctx: Any, grad_y, grad_m1, grad_m2, *_) -> tuple[Tensor | None, ...]:
    z, *saved = ctx.saved_tensors
    dz, dgamma, dbeta = _bn_act_moments_backward(ctx, z, tuple(saved), (grad_y, grad_m1, grad_m2))
    weight, bias = saved[-2:]
    return dz, _like(dgamma, weight), _like(dbeta, bias), None, None, None, None, None, None


torch.library.register_autograd("layerwise_ext::bn_act_moments", _backward_bn, setup_context=_setup_bn)


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, conv_weight, conv_bias, weight, bias, mean, _, stride, padding, dilation, groups, *form = inputs
    y, m1, m2, sums, mean_z, var_z, z = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, mean_z, var_z, z)
    ctx.save_for_backward(input, conv_weight, conv_bias, z, sums, mean_z, var_z, weight, bias)
    ctx.form = tuple(form)
    ctx.convolution = (stride, padding, dilation, False, [0, 0], groups)
    ctx.count = z.numel() // z.size(1) if mean is None else 0
    ctx.owns_z = not _hooks_see_saved_tensors()
    ctx.needs_dz = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]


def _backward_conv(ctx: Any, grad_y, grad_m1, grad_m2, *_) -> tuple[Tensor | None, ...]:
    input, conv_weight, conv_bias, z, *saved = ctx.saved_tensors
    dz, dgamma, dbeta = _bn_act_moments_backward(ctx, z, tuple(saved), (grad_y, grad_m1, grad_m2))
    weight, bias = saved[-2:]
    grad_input = grad_conv_weight = grad_conv_bias = None
    if dz is not None:
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        grad_input, grad_conv_weight, _ = _aten.convolution_backward(
            dz, input, conv_weight.to(input.dtype), None, *ctx.convolution, mask
        )
        if grad_conv_weight is not None:
            grad_conv_weight = grad_conv_weight.to(conv_weight.dtype)
    if conv_bias is not None and ctx.needs_input_grad[2]:
        # dL/dbias = sum of dz: zero behind batch statistics, which remove any shift, and gamma*rstd*dbeta behind fixed ones.
        grad_conv_bias = torch.zeros_like(conv_bias)
        if ctx.count == 0:
            scale = torch.rsqrt(saved[2] + ctx.form[0])
            if weight is not None:
                scale = scale * weight
            grad_conv_bias = (scale * dbeta).to(conv_bias.dtype)
    gradients = grad_input, grad_conv_weight, grad_conv_bias, _like(dgamma, weight), _like(dbeta, bias)
    return (*gradients, *([None] * 10))


torch.library.register_autograd("layerwise_ext::conv_bn_act_moments", _backward_conv, setup_context=_setup_conv)
