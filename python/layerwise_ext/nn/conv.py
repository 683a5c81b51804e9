"""Convolution, batch normalisation and a piecewise linear activation as one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from layerwise_ext import functional

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
ACTIVATIONS = ("relu", "leaky_relu", "identity")

# Names of the children in a checkpoint of nn.Sequential(Conv2d, BatchNorm2d, activation).
_SEQUENTIAL_NAMES = {"0.": "conv.", "1.": "bn."}


class ConvBNReLU2d(nn.Module):
    """``act(batch_norm(conv(x)))`` in one fused operator, with standard parameters and checkpoints.

    The children ``conv`` (a plain :class:`torch.nn.Conv2d`) and ``bn`` (a plain :class:`torch.nn.BatchNorm2d`) hold all
    parameters and buffers, so ``state_dict`` has the keys ``conv.*`` and ``bn.*``. Checkpoints of
    ``nn.Sequential(Conv2d, BatchNorm2d, ReLU)``, whose keys are ``0.*`` and ``1.*``, load as well. Batch norm follows
    :class:`torch.nn.BatchNorm2d` in everything: ``bn.training`` decides between batch and running statistics,
    ``momentum=None`` averages cumulatively, ``track_running_stats=False`` always uses the batch (Ioffe & Szegedy 2015,
    arXiv 1502.03167).

    The children's ``forward`` is never called: hooks registered on ``conv`` or ``bn`` do not run. Hooks on this layer
    run when it is called, not when a :class:`LocalStage` asks it for moments: register those on the stage.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in
            :class:`torch.nn.Conv2d`; ``padding`` may be ``'same'`` or ``'valid'``. ``bias`` is False by default because
            batch norm removes any constant per channel.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`.
        activation: ``'relu'``, ``'leaky_relu'`` or ``'identity'``.
        negative_slope: slope of ``'leaky_relu'`` below zero; unused by the others.
        device, dtype: of the parameters; float32, bfloat16 or float64.

    Shapes:
        input ``[N, in_channels, H, W]``; output ``[N, out_channels, H', W']`` in the input's memory format.

    Raises:
        ValueError: unknown ``activation``; what Conv2d and BatchNorm2d reject.
    """

    conv: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: PaddingMode = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str = "relu",
        negative_slope: float = 0.01,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; allowed: {', '.join(map(repr, ACTIVATIONS))}")
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation = activation
        self.negative_slope = negative_slope

    @classmethod
    def from_modules(cls, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: nn.Module | None = None) -> ConvBNReLU2d:
        """A layer that shares the given modules, parameters and buffers included.

        ``act``: nn.ReLU, nn.LeakyReLU, nn.Identity, or None for no activation. The layer takes its training flag from
        ``bn``.

        Raises:
            TypeError: a module that is not a plain (initialised) one of these classes.
            ValueError: different channel counts, or hooks on ``conv`` or ``bn``, which the fused layer would not run.
        """
        _check_plain("conv", conv, nn.Conv2d)
        _check_plain("bn", bn, nn.BatchNorm2d)
        if conv.out_channels != bn.num_features:
            raise ValueError(f"conv gives {conv.out_channels} channels but bn normalises {bn.num_features}")
        activation, negative_slope = _describe_activation(act)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.conv = conv
        layer.bn = bn
        layer.activation = activation
        layer.negative_slope = negative_slope
        layer.training = bn.training
        return layer

    def to_modules(self) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.Module]:
        """``(conv, bn, act)``: this layer's own children, and a plain activation module."""
        act: nn.Module
        if self.activation == "relu":
            act = nn.ReLU()
        elif self.activation == "leaky_relu":
            act = nn.LeakyReLU(self.negative_slope)
        else:
            act = nn.Identity()
        return self.conv, self.bn, act.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, out_channels, H', W']``."""
        tensors, options = self._arguments(x)
        return functional.conv_bn_act(*tensors, **options)

    def forward_moments(
        self, x: Tensor, bins: tuple[int, int], second_moment: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, m1, m2)``: the output and its sums of y and y*y, ``[N, out_channels, *bins]``, over each pooling cell.

        The cells are those of ``adaptive_avg_pool2d(y, bins)``; m2 is None with ``second_moment=False``. See
        :func:`layerwise_ext.functional.conv_bn_act_moments`.
        """
        tensors, options = self._arguments(x)
        return functional.conv_bn_act_moments(*tensors, bins=bins, second_moment=second_moment, **options)

    def _arguments(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Tensors and options of the operator; counts the batch, as nn.BatchNorm2d.forward does."""
        border, tensors, options = self._settings()
        if border is not None:
            x = border.around(x)
        return (x, *tensors), options

    def _settings(self) -> tuple[Border | None, tuple[Any, ...], dict[str, Any]]:
        """What the input is padded with, the operator's other tensors, its options; counts the batch.

        Everything is read from the children at each call, since users change them after construction (stride and
        dilation for segmentation, momentum, a parametrised weight).
        """
        conv, bn = self.conv, self.bn
        border, padding = _padding(conv)

        training, momentum = bn.training, bn.momentum
        running_mean, running_var = bn.running_mean, bn.running_var
        if not training:
            training = running_mean is None and running_var is None
        elif not bn.track_running_stats:
            running_mean = running_var = None
        elif bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(bn.num_batches_tracked)
        tensors = (conv.weight, conv.bias, running_mean, running_var, bn.weight, bn.bias)
        options = {
            "stride": conv.stride,
            "padding": padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
            "training": training,
            "momentum": 0.0 if momentum is None else momentum,
            "eps": bn.eps,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
        }
        return border, tensors, options

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        # load_state_dict hands each module a dictionary of its own, and children are loaded from this one afterwards:
        # renaming here is enough, and missing or unexpected keys are then reported as for any module. A dictionary
        # that has both spellings is left alone, so that strict loading rejects it.
        if not any(key.startswith(prefix + name) for key in state_dict for name in _SEQUENTIAL_NAMES.values()):
            for old, new in _SEQUENTIAL_NAMES.items():
                for key in [key for key in state_dict if key.startswith(prefix + old)]:
                    state_dict[prefix + new + key[len(prefix + old) :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        if self.activation == "leaky_relu":
            return f"activation='leaky_relu', negative_slope={self.negative_slope}"
        return f"activation={self.activation!r}"


class Border(NamedTuple):
    """Padding that the operator does not know: ``amounts`` and ``mode`` of torch.nn.functional.pad."""

    amounts: list[int]
    mode: str

    def around(self, x: Tensor) -> Tensor:
        return F.pad(x, self.amounts, mode=self.mode)


def _padding(conv: nn.Conv2d) -> tuple[Border | None, Any]:
    """What the input must be padded with to be padded as ``conv`` does it, and the zeros left for the operator."""
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        return Border(conv._reversed_padding_repeated_twice, conv.padding_mode), (0, 0)
    if padding.__class__ is not str:
        return None, padding
    if padding == "valid":
        return None, (0, 0)
    height, width = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    if height % 2 == 0 and width % 2 == 0:
        return None, (height // 2, width // 2)
    # 'same' with an even kernel: the odd row or column goes to the end, as in torch.nn.functional.conv2d.
    return Border([width // 2, width - width // 2, height // 2, height - height // 2], "constant"), (0, 0)


def _check_plain(name: str, module: nn.Module, expected: type[nn.Module]) -> None:
    """The operator replaces ``module.forward``: refuse anything in which that would change the result."""
    if not isinstance(module, expected) or type(module).forward is not expected.forward:
        raise TypeError(f"{name} is {type(module).__name__}; a plain nn.{expected.__name__} is needed")
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise TypeError(f"{name} is an uninitialised {type(module).__name__}; run the model once before fusing it")
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        raise ValueError(f"{name} has hooks, which the fused layer would not run; remove them first")


def _describe_activation(act: nn.Module | None) -> tuple[str, float]:
    if act is None or type(act) is nn.Identity:
        return "identity", 0.01
    if type(act) is nn.ReLU:
        return "relu", 0.01
    if type(act) is nn.LeakyReLU:
        return "leaky_relu", act.negative_slope
    raise TypeError(f"act is {type(act).__name__}; allowed: nn.ReLU, nn.LeakyReLU, nn.Identity, None")
