"""Loads the operator library and registers what Python adds to it: fake kernels and autograd formulas.

The operators themselves are declared in ``csrc/schemas.h``. They are internal: call :mod:`layerwise_ext.functional`.
"""

from __future__ import annotations

import sys
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

# The pool of large activations (docs/cpu.md), in bytes. Lowering the limit frees what is above it.
cache_limit = _C.cache_limit
set_cache_limit = _C.set_cache_limit
cached_bytes = _C.cached_bytes
empty_cache = _C.empty_cache
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


def _check_devices(z: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != z.device:
            raise RuntimeError(f"{name} must be on {z.device}, as the map is, got {t.device}")


def _fake_outputs(z: Tensor, bins: list[int], second_moment: bool) -> tuple[Tensor, ...]:
    n, c, h, w = z.shape
    channels_last, dtype = _is_channels_last(z), _accumulation_dtype(z)
    none = [0, c, 1, 1]
    moments = [n, c, bins[0], bins[1]] if bins else none
    m1, m2 = (_empty_map(z, size, channels_last, dtype) for size in (moments, moments if second_moment else none))
    sums = z.new_empty((4 if second_moment else 2) * m1.numel(), dtype=dtype)
    mean, var = (z.new_empty(c, dtype=dtype) for _ in range(2))
    return _empty_map(z, [n, c, h, w], channels_last, z.dtype), m1, m2, sums, mean, var


@torch.library.register_fake("layerwise_ext::batch_norm_statistics")
def _(z):
    return tuple(z.new_empty(z.size(1), dtype=_accumulation_dtype(z)) for _ in range(2))


@torch.library.register_fake("layerwise_ext::bn_act_moments")
def _(z, weight, bias, mean, var, eps, activation, negative_slope, bins, second_moment):
    _check_devices(z, weight=weight, bias=bias, running_mean=mean, running_var=var)
    return _fake_outputs(z, bins, second_moment)


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
    second_moment,
):
    _check_devices(input, conv_weight=conv_weight, conv_bias=conv_bias)
    _check_devices(input, weight=weight, bias=bias, running_mean=mean, running_var=var)
    w = conv_weight.to(input.dtype)
    z = _aten.convolution(input, w, None, stride, padding, dilation, False, [0, 0], groups)
    z = _empty_map(z, list(z.shape), _is_channels_last(z), z.dtype)
    return (*_fake_outputs(z, bins, second_moment), z)


@torch.library.register_fake("layerwise_ext::conv_bn_act_inference")
def _(input, conv_weight, conv_bias, weight, bias, mean, var, stride, padding, dilation, groups, *form):
    _check_devices(input, conv_weight=conv_weight, conv_bias=conv_bias)
    _check_devices(input, weight=weight, bias=bias, running_mean=mean, running_var=var)
    y = _aten.convolution(input, conv_weight.to(input.dtype), None, stride, padding, dilation, False, [0, 0], groups)
    return _empty_map(y, list(y.shape), _is_channels_last(y), y.dtype)


@torch.library.register_fake("layerwise_ext::bn_act_moments_backward_sums")
def _(z, grad_y, grad_m1, grad_m2, sums, *args):
    return tuple(z.new_empty(z.size(1), dtype=_accumulation_dtype(z)) for _ in range(2))


@torch.library.register_fake("layerwise_ext::bn_act_moments_backward")
def _(z, *args):
    return _empty_map(z, list(z.shape), _is_channels_last(z), z.dtype)


def _fake_conv_backward(z, *args):
    input, conv_weight, stride, padding, dilation, groups, needs_input, needs_weight = args[-8:]
    none = z.new_empty(0)
    grad_input = none
    if needs_input:  # ATen chooses its layout
        convolution = (stride, padding, dilation, False, [0, 0], groups)
        weight = conv_weight.to(input.dtype)
        dz = _empty_map(z, list(z.shape), _is_channels_last(z), z.dtype)
        grad_input, _, _ = _aten.convolution_backward(dz, input, weight, None, *convolution, [True, False, False])
    return grad_input, torch.empty_like(conv_weight) if needs_weight else none


torch.library.register_fake("layerwise_ext::conv_bn_act_moments_backward", _fake_conv_backward)
torch.library.register_fake("layerwise_ext::conv_bn_act_moments_backward_", _fake_conv_backward)


@torch.library.register_fake("layerwise_ext::update_running_statistics_")
def _(running_mean, running_var, mean, var, shift, count, momentum):
    return None


@torch.library.register_fake("layerwise_ext::pooled_linear_cross_entropy")
def _(m1, weight, bias, target, size, label_smoothing):
    _check_devices(m1, weight=weight, bias=bias, target=target)
    logits = (m1.size(0), weight.size(0))
    return m1.new_empty(()), m1.new_empty(logits), m1.new_empty(logits)


@torch.library.register_fake("layerwise_ext::pooled_linear_cross_entropy_backward")
def _(grad_logits, scale, m1, weight, size, needs_m1, needs_weight, needs_bias):
    return (
        _empty_map(m1, list(m1.shape), _is_channels_last(m1), m1.dtype) if needs_m1 else m1.new_empty(0),
        m1.new_empty(weight.size(0) if needs_weight else 0, weight.size(1)),
        m1.new_empty(weight.size(0) if needs_bias else 0),
    )


# -- Autograd ----------------------------------------------------------------------------------------------------------
#
# One node per layer. It saves z and what is per channel or per cell, never y: a stock network overwrites its
# activations (ReLU(inplace=True), out += identity), and z is nobody else's.


_library = torch.library.Library("layerwise_ext", "FRAGMENT")


def _register_autograd(name: str, setup_context: Any, backward: Any) -> None:
    """As torch.library.register_autograd, without its 50 microseconds per call: it fills in default arguments from the
    schema each time, and these operators have none."""
    operator = getattr(operators, name).default

    def below_autograd(keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        output = below_autograd(keyset, args)
        setup_context(ctx, args, output)
        return output

    function = type(
        f"{name}_function",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(lambda ctx, *grads: (None, *backward(ctx, *grads))),
        },
    )

    def autograd_kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(keyset, *args)  # type: ignore[attr-defined]
        return below_autograd(keyset, args)

    _library.impl(name, autograd_kernel, "Autograd", with_keyset=True)


def _references(saved: Tensor) -> int:
    return sys.getrefcount(saved)


def _count_own_references() -> int:
    """References to a saved tensor when nobody but its node has it: versions of torch and of Python differ in it."""
    counts = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.detach())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            (saved,) = ctx.saved_tensors

            def reader(saved: Tensor) -> None:  # stands for _is_last_reader
                counts.append(_references(saved))

            reader(saved)
            return gradient

    with torch.inference_mode(False), torch.enable_grad():
        Probe.apply(torch.zeros(1, requires_grad=True)).backward()
    return counts[0]


_OWN_REFERENCES = _count_own_references()


def _is_last_reader(ctx: Any, saved: Tensor) -> bool:
    """Whether nobody will read a tensor that a node saved again, so that its memory may be put to other use.

    Not so while tracing (it is a stand-in then), where saved-tensor hooks saw it, with retain_graph=True, while
    somebody else has the saved tensor itself (``grad_fn.saved_tensors``), and while anything but the node's own two
    handles, the saved tensor and the storage looked at here, refers to its memory.
    """
    if type(saved) is not Tensor or ctx.hooked or torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    if _references(saved) > _OWN_REFERENCES:
        return False
    return torch._C._storage_Use_Count(saved.untyped_storage()._cdata) <= 2


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


def _once_differentiable(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    if not torch.is_grad_enabled():  # the usual case: no create_graph=True
        return gradients
    mark = torch.empty(0, requires_grad=True)
    return tuple(None if g is None else _OnceDifferentiable.apply(g, mark) for g in gradients)


def _like(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else gradient.to(parameter.dtype)


def _absent(m1: Tensor, m2: Tensor, bins: list[int], second_moment: bool) -> tuple[Tensor, ...]:
    """The moments that were not asked for."""
    return () if bins and second_moment else (m2,) if bins else (m1, m2)


def _setup_bn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, weight, bias, mean, _, *form, second_moment = inputs
    _, m1, m2, sums, mean_z, var_z = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, mean_z, var_z, *_absent(m1, m2, form[-1], second_moment))
    ctx.save_for_backward(z, sums, mean_z, var_z, weight, bias)
    ctx.form = form  # eps, activation, negative_slope, bins
    ctx.count = z.numel() // z.size(1) if mean is None else 0  # 0: the statistics do not depend on z


def _backward_bn(ctx: Any, grad_y: Any, grad_m1: Any, grad_m2: Any, *_: Any) -> tuple[Tensor | None, ...]:
    z, sums, mean, var, weight, bias = ctx.saved_tensors
    gradients = (grad_y, grad_m1, grad_m2)
    common = (mean, var, weight, bias, *ctx.form)
    # Replicas would add up their sums here, between the two operators.
    dgamma, dbeta = operators.bn_act_moments_backward_sums(z, *gradients, sums, *common)
    dz = None
    if ctx.needs_input_grad[1]:
        dz = operators.bn_act_moments_backward(z, *gradients, dgamma, dbeta, *common, ctx.count)
    return (*_once_differentiable((dz, _like(dgamma, weight), _like(dbeta, bias))), *([None] * 7))


_register_autograd("bn_act_moments", _setup_bn, _backward_bn)


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, conv_weight, conv_bias, weight, bias, mean, _, *convolution_and_form, second_moment = inputs
    ctx.convolution, form = convolution_and_form[:4], convolution_and_form[4:]
    _, m1, m2, sums, mean_z, var_z, z = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, mean_z, var_z, z, *_absent(m1, m2, form[-1], second_moment))
    # Detached, z and sums have handles of their own, which _is_last_reader tells from everybody else's.
    ctx.save_for_backward(input, conv_weight, conv_bias, z.detach(), sums.detach(), mean_z, var_z, weight, bias)
    ctx.form = form
    ctx.count = z.numel() // z.size(1) if mean is None else 0
    ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _backward_conv(ctx: Any, grad_y: Any, grad_m1: Any, grad_m2: Any, *_: Any) -> tuple[Tensor | None, ...]:
    input, conv_weight, conv_bias, z, sums, mean, var, weight, bias = ctx.saved_tensors
    gradients = (grad_y, grad_m1, grad_m2)
    common = (mean, var, weight, bias, *ctx.form)
    dgamma, dbeta = operators.bn_act_moments_backward_sums(z, *gradients, sums, *common)
    if _is_last_reader(ctx, sums):
        sums.untyped_storage().resize_(0)  # the weight gradient needs room
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[1:4]
    grad_input = grad_weight = grad_bias = None
    if needs_input or needs_weight:
        backward = (
            operators.conv_bn_act_moments_backward_
            if _is_last_reader(ctx, z)
            else operators.conv_bn_act_moments_backward
        )
        grad_input, grad_weight = backward(
            z, *gradients, dgamma, dbeta, *common, ctx.count, input, conv_weight, *ctx.convolution,
            needs_input, needs_weight,
        )  # fmt: skip
    if conv_bias is not None and needs_bias:
        # The sum of dz: zero behind batch statistics, which cancel any shift, gamma*rstd*dbeta behind fixed ones.
        grad_bias = torch.zeros_like(conv_bias)
        if ctx.count == 0:
            scale = torch.rsqrt(var + ctx.form[0]) * (1 if weight is None else weight)
            grad_bias = (scale * dbeta).to(conv_bias.dtype)
    grads = (grad_input if needs_input else None, grad_weight if needs_weight else None, grad_bias)
    return (*_once_differentiable((*grads, _like(dgamma, weight), _like(dbeta, bias))), *([None] * 11))


_register_autograd("conv_bn_act_moments", _setup_conv, _backward_conv)


def _setup_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    m1, weight, _, _, size, _ = inputs
    _, _, grad_logits = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(grad_logits)
    ctx.save_for_backward(m1, weight, grad_logits)
    ctx.size = size


def _backward_head(ctx: Any, grad_loss: Any, grad_logits: Any, *_: Any) -> tuple[Tensor | None, ...]:
    m1, weight, gradient = ctx.saved_tensors
    scale = grad_loss
    if grad_logits is not None:  # somebody uses the logits, too
        gradient = grad_logits if grad_loss is None else torch.addcmul(grad_logits, gradient, grad_loss)
        scale = None
    needs = ctx.needs_input_grad[1:4]
    grads = operators.pooled_linear_cross_entropy_backward(gradient, scale, m1, weight, ctx.size, *needs)
    wanted = tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))
    return (*_once_differentiable(wanted), None, None, None)


_register_autograd("pooled_linear_cross_entropy", _setup_head, _backward_head)
