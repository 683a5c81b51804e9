"""Loads the operator library and registers what Python adds to it: fake kernels and autograd formulas.

The operators themselves are declared in ``csrc/schemas.h``. They are internal: call :mod:`layerwise_ext.functional`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Form(NamedTuple):
    """What follows the convolution, in the order of the operators' arguments; Form in csrc/checks.h."""

    eps: float = 1e-5
    activation: str = "relu"
    negative_slope: float = 0.01
    upper_slope: float = 1 / 3
    slope: Tensor | None = None  # [C], of 'prelu'
    seed: Tensor | None = None  # one int64, of 'rrelu'
    residual: Tensor | None = None
    downsample: str = "none"
    window: Sequence[int] = ()
    ceil_mode: bool = False
    bins: Sequence[int] = ()

    def output_size(self, z: Tensor) -> list[Any]:
        """``[N, C, H, W]`` of y."""
        n, c, h, w = z.shape
        if self.downsample == "none":
            return [n, c, h, w]
        rows, columns = self.window
        whole = self.downsample != "space_to_depth" or (h % rows == 0 and w % columns == 0)
        if not whole or (not self.ceil_mode and (h < rows or w < columns)):
            raise RuntimeError(f"a map of size {[h, w]} cannot be cut into windows of {[rows, columns]}")
        if self.downsample == "space_to_depth":
            return [n, c * rows * columns, h // rows, w // columns]
        if self.ceil_mode:
            return [n, c, (h + rows - 1) // rows, (w + columns - 1) // columns]
        return [n, c, h // rows, w // columns]


_FORM_SIZE = len(Form._fields)


def _fake_outputs(z: Tensor, form: Form, second_moment: bool, needs_y: bool) -> tuple[Tensor, ...]:
    _check_devices(z, slope=form.slope, seed=form.seed, residual=form.residual)
    size = form.output_size(z)
    channels_last, dtype = _is_channels_last(z), _accumulation_dtype(z)
    none = [0, size[1], 1, 1]
    moments = [*size[:2], *form.bins] if form.bins else none
    m1, m2 = (_empty_map(z, shape, channels_last, dtype) for shape in (moments, moments if second_moment else none))
    kinds = (2 if second_moment else 1) * (3 if form.activation == "prelu" else 2)
    sums = z.new_empty(kinds * m1.numel(), dtype=dtype)
    mean, var = (z.new_empty(z.size(1), dtype=dtype) for _ in range(2))
    return _empty_map(z, size if needs_y else none, channels_last, z.dtype), m1, m2, sums, mean, var


@torch.library.register_fake("layerwise_ext::batch_norm_statistics")
def _(z):
    return tuple(z.new_empty(z.size(1), dtype=_accumulation_dtype(z)) for _ in range(2))


@torch.library.register_fake("layerwise_ext::bn_act_moments")
def _(z, weight, bias, mean, var, *form_and_wanted):
    *form, second_moment, needs_y = form_and_wanted
    _check_devices(z, weight=weight, bias=bias, running_mean=mean, running_var=var)
    return _fake_outputs(z, Form(*form), second_moment, needs_y)


def _fake_convolution(input: Tensor, conv_weight: Tensor, *convolution: Any) -> Tensor:
    *geometry, groups = convolution  # stride, padding, dilation
    z = _aten.convolution(input, conv_weight.to(input.dtype), None, *geometry, False, [0, 0], groups)
    return _empty_map(z, list(z.shape), _is_channels_last(z), z.dtype)


@torch.library.register_fake("layerwise_ext::convolution_statistics")
def _(input, conv_weight, *convolution):
    _check_devices(input, conv_weight=conv_weight)
    z = _fake_convolution(input, conv_weight, *convolution)
    return z, *(z.new_empty(z.size(1), dtype=_accumulation_dtype(z)) for _ in range(2))


@torch.library.register_fake("layerwise_ext::conv_bn_act_moments")
def _(input, conv_weight, conv_bias, weight, bias, mean, var, stride, padding, dilation, groups, *form_and_wanted):
    *form, second_moment, needs_y = form_and_wanted
    _check_devices(input, conv_weight=conv_weight, conv_bias=conv_bias)
    _check_devices(input, weight=weight, bias=bias, running_mean=mean, running_var=var)
    z = _fake_convolution(input, conv_weight, stride, padding, dilation, groups)
    return (*_fake_outputs(z, Form(*form), second_moment, needs_y), z)


@torch.library.register_fake("layerwise_ext::conv_bn_act_inference")
def _(input, conv_weight, conv_bias, weight, bias, mean, var, stride, padding, dilation, groups, *form):
    _check_devices(input, conv_weight=conv_weight, conv_bias=conv_bias)
    _check_devices(input, weight=weight, bias=bias, running_mean=mean, running_var=var)
    z = _fake_convolution(input, conv_weight, stride, padding, dilation, groups)
    return _empty_map(z, Form(*form).output_size(z), _is_channels_last(z), z.dtype)


def _fake_residual(z: Tensor, form: Form, needed: bool) -> Tensor:
    if form.residual is None or not needed:
        return z.new_empty(0)
    return _empty_map(z, list(z.shape), _is_channels_last(z), z.dtype)


@torch.library.register_fake("layerwise_ext::bn_act_moments_backward_sums")
def _(z, grad_y, grad_m1, grad_m2, sums, mean, var, weight, bias, *form):
    sizes = (z.size(1), z.size(1), 0 if Form(*form).slope is None else z.size(1))
    return tuple(z.new_empty(size, dtype=_accumulation_dtype(z)) for size in sizes)


@torch.library.register_fake("layerwise_ext::bn_act_moments_backward")
def _(z, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, *form_and_rest):
    *form, _, needs_residual = form_and_rest
    dz = _empty_map(z, list(z.shape), _is_channels_last(z), z.dtype)
    return dz, _fake_residual(z, Form(*form), needs_residual)


def _fake_conv_backward(z, grad_y, grad_m1, grad_m2, dgamma, dbeta, mean, var, weight, bias, *form_and_rest):
    form = Form(*form_and_rest[:_FORM_SIZE])
    _, input, conv_weight, stride, padding, dilation, groups, *needs = form_and_rest[_FORM_SIZE:]
    needs_input, needs_weight, needs_residual, overwrite_grad_y = needs
    grad_input = z.new_empty(0)
    if needs_input:  # ATen chooses its layout
        convolution = (stride, padding, dilation, False, [0, 0], groups)
        w = conv_weight.to(input.dtype)
        dz = _empty_map(z, list(z.shape), _is_channels_last(z), z.dtype)
        grad_input, _, _ = _aten.convolution_backward(dz, input, w, None, *convolution, [True, False, False])
    grad_weight = torch.empty_like(conv_weight) if needs_weight else z.new_empty(0)
    return grad_input, grad_weight, _fake_residual(z, form, needs_residual and not overwrite_grad_y)


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


def _absent(output: Sequence[Tensor], bins: Sequence[int], second_moment: bool, needs_y: bool) -> tuple[Tensor, ...]:
    """Those of y, m1, m2 that were not asked for."""
    wanted = (needs_y, bool(bins), bool(bins) and second_moment)
    return tuple(t for t, is_wanted in zip(output[:3], wanted, strict=True) if not is_wanted)


def _save_form(ctx: Any, form: Form) -> tuple[Tensor | None, ...]:
    """Keeps a form on the node but for its tensors, which are returned to be saved."""
    tensors = (form.slope, form.seed, form.residual)
    ctx.form = form._replace(slope=None, seed=None, residual=None)
    return tensors


def _saved_form(ctx: Any, slope: Tensor | None, seed: Tensor | None, residual: Tensor | None) -> Form:
    form: Form = ctx.form
    return form._replace(slope=slope, seed=seed, residual=residual)


def _form_gradients(form: Form, dslope: Tensor, grad_residual: Tensor | None) -> list[Tensor | None]:
    gradients = {"slope": _like(dslope, form.slope), "residual": grad_residual}
    return [gradients.get(name) for name in form._fields]


def _setup_bn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, weight, bias, mean, _, *rest, second_moment, needs_y = inputs
    form = Form(*rest)
    *_, sums, mean_z, var_z = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, mean_z, var_z, *_absent(output, form.bins, second_moment, needs_y))
    ctx.save_for_backward(z, sums, mean_z, var_z, weight, bias, *_save_form(ctx, form))
    ctx.count = z.numel() // z.size(1) if mean is None else 0  # 0: the statistics do not depend on z


def _backward_bn(ctx: Any, grad_y: Any, grad_m1: Any, grad_m2: Any, *_: Any) -> tuple[Tensor | None, ...]:
    z, sums, mean, var, weight, bias, *tensors = ctx.saved_tensors
    form = _saved_form(ctx, *tensors)
    gradients = (grad_y, grad_m1, grad_m2)
    common = (mean, var, weight, bias, *form)
    dgamma, dbeta, dslope = operators.bn_act_moments_backward_sums(z, *gradients, sums, *common)
    totals = _over_replicas(ctx, dgamma, dbeta)
    needs_z, needs_residual = ctx.needs_input_grad[1], _needs_residual(ctx, 6)
    dz = grad_residual = None
    if needs_z or needs_residual:
        dz, grad_residual = operators.bn_act_moments_backward(
            z, *gradients, *totals, *common, ctx.count, needs_residual
        )
    form_gradients = _form_gradients(form, dslope, grad_residual if needs_residual else None)
    of_tensors = (dz if needs_z else None, _like(dgamma, weight), _like(dbeta, bias))
    return _once_differentiable((*of_tensors, None, None, *form_gradients, None, None))


def _over_replicas(ctx: Any, *sums: Tensor) -> tuple[Tensor, ...]:
    """The sums that dz depends on: this process's, or those of all replicas (:mod:`layerwise_ext._replicas`)."""
    return ctx.group.add(sums) if hasattr(ctx, "group") else sums


def _needs_residual(ctx: Any, first: int) -> bool:
    """Whether the residual needs a gradient; ``first`` is the place of the form among the node's inputs."""
    return bool(ctx.needs_input_grad[first + Form._fields.index("residual")])


_register_autograd("bn_act_moments", _setup_bn, _backward_bn)


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, conv_weight, conv_bias, weight, bias, mean, _, *rest, second_moment, needs_y = inputs
    ctx.convolution, form = rest[:4], Form(*rest[4:])
    *_, sums, mean_z, var_z, z = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, mean_z, var_z, z, *_absent(output, form.bins, second_moment, needs_y))
    # Detached, z and sums have handles of their own, which _is_last_reader tells from everybody else's.
    ctx.save_for_backward(
        input, conv_weight, conv_bias, z.detach(), sums.detach(), mean_z, var_z, weight, bias, *_save_form(ctx, form)
    )
    ctx.count = z.numel() // z.size(1) if mean is None else 0
    ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _backward_conv(ctx: Any, grad_y: Any, grad_m1: Any, grad_m2: Any, *_: Any) -> tuple[Tensor | None, ...]:
    input, conv_weight, conv_bias, z, sums, mean, var, weight, bias, *tensors = ctx.saved_tensors
    form = _saved_form(ctx, *tensors)
    gradients = (grad_y, grad_m1, grad_m2)
    common = (mean, var, weight, bias, *form)
    dgamma, dbeta, dslope = operators.bn_act_moments_backward_sums(z, *gradients, sums, *common)
    if _is_last_reader(ctx, sums):
        sums.untyped_storage().resize_(0)  # the weight gradient needs room
    totals = _over_replicas(ctx, dgamma, dbeta)
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[1:4]
    needs_residual = _needs_residual(ctx, 12)
    grad_input = grad_weight = grad_bias = grad_residual = None
    if needs_input or needs_weight or needs_residual:
        backward = (
            operators.conv_bn_act_moments_backward_
            if _is_last_reader(ctx, z)
            else operators.conv_bn_act_moments_backward
        )
        grad_input, grad_weight, grad_residual = backward(
            z, *gradients, *totals, *common, ctx.count, input, conv_weight, *ctx.convolution,
            needs_input, needs_weight, needs_residual, False,
        )  # fmt: skip
    if conv_bias is not None and needs_bias:
        # The sum of dz: zero behind batch statistics, which cancel any shift, gamma*rstd*dbeta behind fixed ones.
        grad_bias = torch.zeros_like(conv_bias)
        if ctx.count == 0:
            scale = torch.rsqrt(var + form.eps) * (1 if weight is None else weight)
            grad_bias = (scale * dbeta).to(conv_bias.dtype)
    wanted = (
        grad_input if needs_input else None, grad_weight if needs_weight else None, grad_bias,
        _like(dgamma, weight), _like(dbeta, bias), *([None] * 6),
        *_form_gradients(form, dslope, grad_residual if needs_residual else None), None, None,
    )  # fmt: skip
    return _once_differentiable(wanted)


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
