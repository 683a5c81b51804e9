"""Convolution, batch normalisation, activation and downsampling as one layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from layerwise_ext import functional
from layerwise_ext.nn.sync_batch_norm import BatchStatistics, copied_with_group, group_of

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
# The module that stands for each activation; negative_slope and upper_slope are added where it has them.
_MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "identity": nn.Identity,
    "prelu": nn.PReLU,
    "rrelu": nn.RReLU,
    "relu6": nn.ReLU6,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": nn.GELU,
    "hardswish": nn.Hardswish,
}
ACTIVATIONS = tuple(_MODULES)

# Names of the children in a checkpoint of nn.Sequential(Conv2d, BatchNorm2d, activation).
_SEQUENTIAL_NAMES = {"0.": "conv.", "1.": "bn.", "2.": "act."}


class ConvBNReLU2d(nn.Module):
    """``downsample(act(batch_norm(conv(x)) + residual))`` in one fused operator, with standard parameters.

    The children ``conv`` (a plain :class:`torch.nn.Conv2d`) and ``bn`` (a plain :class:`torch.nn.BatchNorm2d`) hold all
    parameters and buffers, so ``state_dict`` has the keys ``conv.*`` and ``bn.*``; ``'prelu'`` adds a child ``act``, a
    plain :class:`torch.nn.PReLU`. Checkpoints of ``nn.Sequential(Conv2d, BatchNorm2d, ReLU)``, whose keys are ``0.*``
    and ``1.*``, load as well. Batch norm follows
    :class:`torch.nn.BatchNorm2d` in everything: ``bn.training`` decides between batch and running statistics,
    ``momentum=None`` averages cumulatively, ``track_running_stats=False`` always uses the batch (Ioffe & Szegedy 2015,
    arXiv 1502.03167). Once :func:`convert_sync_batchnorm` (or PyTorch's own) made ``bn`` a SyncBatchNorm, the layer
    normalises over all processes of its group, on the CPU, too; :func:`revert_sync_batchnorm` undoes it.

    The children's ``forward`` is never called: hooks registered on ``conv`` or ``bn`` do not run. Hooks on this layer
    run when it is called, not when a :class:`LocalStage` asks it for moments: register those on the stage.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in
            :class:`torch.nn.Conv2d`; ``padding`` may be ``'same'`` or ``'valid'``. ``bias`` is False by default because
            batch norm removes any constant per channel.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`.
        activation: ``'relu'``, ``'leaky_relu'``, ``'identity'``, ``'prelu'`` (one learned slope, 0.25 at first),
            ``'rrelu'`` (random slopes in training, their mean in evaluation), ``'relu6'``, ``'tanh'``, ``'sigmoid'``,
            ``'silu'``, ``'gelu'``, ``'gelu_tanh'`` or ``'hardswish'``.
        negative_slope: slope of ``'leaky_relu'`` below zero; the least one of ``'rrelu'``; unused by the others.
        upper_slope: the largest slope of ``'rrelu'``.
        downsample: ``(mode, factor)`` with the mode ``'max'``, ``'avg'``, ``'stride'`` or ``'space_to_depth'`` and the
            factor an int or ``(h, w)``: see :func:`layerwise_ext.functional.bn_act_moments`. The full-resolution
            activation is never written.
        ceil_mode: whether windows that the edge cuts off count, as in the pooling layers.
        process_group: the processes whose batches are normalised together in training, also where
            DistributedDataParallel refuses a SyncBatchNorm (on the CPU).
        device, dtype: of the parameters; float32, bfloat16, float16 or float64.

    Shapes:
        input ``[N, in_channels, H, W]``; residual ``[N, out_channels, H', W']``, the shape of the convolution's output;
        output the same, or what downsampling leaves of it, in the input's memory format.

    Raises:
        ValueError: unknown ``activation`` or ``downsample``; what Conv2d and BatchNorm2d reject.
    """

    conv: nn.Conv2d
    bn: nn.BatchNorm2d | nn.SyncBatchNorm
    act: nn.PReLU | None  # a child only where it has a parameter
    __deepcopy__ = copied_with_group

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
        upper_slope: float = 1 / 3,
        downsample: functional.Downsample = None,
        ceil_mode: bool = False,
        process_group: dist.ProcessGroup | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; allowed: {', '.join(map(repr, ACTIVATIONS))}")
        functional._downsampling(downsample)  # checks it
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
        if activation == "prelu":
            self.act = nn.PReLU(device=device, dtype=dtype)
        self.activation = activation
        self.negative_slope = negative_slope
        self.upper_slope = upper_slope
        self.downsample = downsample
        self.ceil_mode = ceil_mode
        self.process_group = process_group

    @classmethod
    def from_modules(
        cls,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | nn.SyncBatchNorm,
        act: nn.Module | None = None,
        *,
        downsample: functional.Downsample = None,
        ceil_mode: bool = False,
    ) -> ConvBNReLU2d:
        """A layer that shares the given modules, parameters and buffers included.

        ``act``: a module of one of the activations above, or None for no activation. The layer takes its training flag
        from ``bn``, with random slopes from ``act``.

        Raises:
            TypeError: a module that is not a plain (initialised) one of these classes.
            ValueError: different channel counts, or hooks on ``conv`` or ``bn``, which the fused layer would not run.
        """
        _check_plain("conv", conv, nn.Conv2d)
        _check_plain("bn", bn, nn.SyncBatchNorm if isinstance(bn, nn.SyncBatchNorm) else nn.BatchNorm2d)
        if conv.out_channels != bn.num_features:
            raise ValueError(f"conv gives {conv.out_channels} channels but bn normalises {bn.num_features}")
        activation, negative_slope, upper_slope = describe_activation(act, conv.out_channels)
        functional._downsampling(downsample)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.conv = conv
        layer.bn = bn
        if isinstance(act, nn.PReLU):
            layer.act = act
        layer.activation = activation
        layer.negative_slope = negative_slope
        layer.upper_slope = upper_slope
        layer.downsample = downsample
        layer.ceil_mode = ceil_mode
        layer.process_group = None
        layer.training = act.training if isinstance(act, nn.RReLU) else bn.training
        return layer

    def to_modules(self) -> tuple[nn.Module, ...]:
        """``(conv, bn, act)``: this layer's own children and a plain activation module; and a fourth that downsamples.

        With ``downsample=('stride', factor)`` there is no fourth: ``conv`` is then a copy with a larger stride that
        shares the parameters.

        Raises:
            ValueError: a stride with ``padding='same'`` and an even kernel, which no nn.Conv2d has.
        """
        act: nn.Module
        if self.activation == "prelu":
            act = self.act  # type: ignore[assignment]  # mypy: None
        elif self.activation == "leaky_relu":
            act = nn.LeakyReLU(self.negative_slope)
        elif self.activation == "rrelu":
            act = nn.RReLU(self.negative_slope, self.upper_slope)
        elif self.activation == "gelu_tanh":
            act = nn.GELU(approximate="tanh")
        else:
            act = _MODULES[self.activation]()
        modules = (self.conv, self.bn, act.train(self.training))
        if self.downsample is None:
            return modules
        mode, window = functional._downsampling(self.downsample)
        if mode == "stride":
            conv = copy.copy(self.conv)
            border, conv.padding = _padding(conv)
            if border is not None and conv.padding_mode == "zeros":
                raise ValueError(f"an nn.Conv2d with a stride has no padding='same' for kernel_size {conv.kernel_size}")
            conv.stride = (conv.stride[0] * window[0], conv.stride[1] * window[1])
            return conv, *modules[1:]
        return *modules, AcceleratedDownsample2d(mode, (window[0], window[1]), self.ceil_mode).train(self.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[N, C, H, W]`` to ``[N, out_channels, H', W']``; the residual is added before the activation."""
        tensors, options = self._arguments(x)
        return functional.conv_bn_act(*tensors, residual=residual, **options)

    def forward_moments(
        self,
        x: Tensor,
        bins: tuple[int, int],
        second_moment: bool = True,
        residual: Tensor | None = None,
        detached_downsample: functional.Downsample = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, m1, m2)``: the output and its sums of y and y*y, ``[N, channels of y, *bins]``, over each pooling cell.

        The cells are those of ``adaptive_avg_pool2d(y, bins)``; m2 is None with ``second_moment=False``; with
        ``detached_downsample`` y is smaller than what they are of. See
        :func:`layerwise_ext.functional.conv_bn_act_moments`.
        """
        tensors, options = self._arguments(x)
        return functional.conv_bn_act_moments(
            *tensors,
            residual=residual,
            bins=bins,
            second_moment=second_moment,
            detached_downsample=detached_downsample,
            **options,
        )

    def map_size(self, x: Tensor) -> tuple[int, int]:
        """``(H, W)`` of the activation of x ``[N, C, H_in, W_in]`` before its downsampling."""
        conv, stride = self.conv, self.conv.stride
        border, padding = _padding(conv)
        left, right, top, bottom = (0, 0, 0, 0) if border is None else border.amounts
        if self.downsample is not None and self.downsample[0] == "stride":
            window = functional._pair("downsample factor", self.downsample[1])
            stride = (stride[0] * window[0], stride[1] * window[1])
        n, channels, height, width = x.shape
        size = (n, channels, height + top + bottom, width + left + right)
        return functional._conv_size(size, conv.weight, stride, padding, conv.dilation)

    @property
    def is_synchronised(self) -> bool:
        """Whether the layer normalises over several processes in training."""
        return self.process_group is not None or isinstance(self.bn, nn.SyncBatchNorm)

    def _group(self) -> dist.ProcessGroup | None:
        return group_of(self.bn) if isinstance(self.bn, nn.SyncBatchNorm) else self.process_group

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

        statistics = BatchStatistics.of(bn)
        activation, negative_slope = self.activation, self.negative_slope
        if activation == "rrelu" and not self.training:
            activation, negative_slope = "leaky_relu", (negative_slope + self.upper_slope) / 2
        tensors = (conv.weight, conv.bias, statistics.mean, statistics.var, bn.weight, bn.bias)
        options = {
            "stride": conv.stride,
            "padding": padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
            "training": statistics.training,
            "momentum": statistics.momentum,
            "eps": bn.eps,
            "activation": activation,
            "negative_slope": negative_slope,
            "upper_slope": self.upper_slope,
            "slope": self.act.weight if activation == "prelu" else None,  # type: ignore[union-attr]
            "downsample": self.downsample,
            "ceil_mode": self.ceil_mode,
            "process_group": self._group() if bn.training else None,
        }
        return border, tensors, options

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        # load_state_dict hands each module a dictionary of its own, and children are loaded from this one afterwards:
        # renaming here is enough, and missing or unexpected keys are then reported as for any module. A dictionary
        # that has both spellings is left alone, so that strict loading rejects it.
        if not any(key.startswith(prefix + name) for key in state_dict for name in _SEQUENTIAL_NAMES.values()):
            names = dict(_SEQUENTIAL_NAMES)
            if self.activation != "prelu":
                del names["2."]
            for old, new in names.items():
                for key in [key for key in state_dict if key.startswith(prefix + old)]:
                    state_dict[prefix + new + key[len(prefix + old) :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        text = f"activation={self.activation!r}"
        if self.activation in ("leaky_relu", "rrelu"):
            text += f", negative_slope={self.negative_slope}"
        if self.activation == "rrelu":
            text += f", upper_slope={self.upper_slope}"
        if self.downsample is not None:
            text += f", downsample={self.downsample}, ceil_mode={self.ceil_mode}"
        return text


class AcceleratedDownsample2d(nn.Module):
    """:func:`layerwise_ext.functional.downsample` as a layer.

    Behind a :class:`ConvBNReLU2d` its own ``downsample`` is faster. Downsampling earlier than usual, with the same
    layers behind it, is what Ma, Yu, Li, Wang 2020, arXiv 2010.08038, propose for networks that are trained layer by
    layer.

    Args:
        mode: ``'max'``, ``'avg'``, ``'stride'`` or ``'space_to_depth'``.
        factor: size and stride of the windows, an int or ``(h, w)``.
        ceil_mode: whether windows that the edge cuts off count.

    Raises:
        ValueError: another mode, a factor below 1; (when run) a size that space_to_depth's factor does not divide.
    """

    def __init__(self, mode: str = "max", factor: int | Sequence[int] = 2, ceil_mode: bool = False) -> None:
        super().__init__()
        functional._downsampling((mode, factor))
        self.mode = mode
        self.factor = factor
        self.ceil_mode = ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        return functional.downsample(x, self.mode, self.factor, self.ceil_mode)

    def inverse(self, y: Tensor) -> Tensor:
        """The input that ``space_to_depth`` gave y for.

        Raises:
            ValueError: the mode is another one, which loses elements; a number of channels that the factor rules out.
        """
        if self.mode != "space_to_depth":
            raise ValueError(f"mode is {self.mode!r}; only 'space_to_depth' has an inverse")
        return functional.depth_to_space(y, self.factor)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, factor={self.factor}, ceil_mode={self.ceil_mode}"


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


def describe_activation(act: nn.Module | None, channels: int | None = None) -> tuple[str, float, float]:
    """Name, negative_slope and upper_slope of the activation that a module is.

    Raises:
        TypeError: a module of another class.
        ValueError: nn.PReLU with neither one slope nor one for each of so many channels.
    """
    plain = (0.01, 1 / 3)
    if act is None:
        return "identity", *plain
    if type(act) is nn.LeakyReLU:
        return "leaky_relu", act.negative_slope, plain[1]
    if type(act) is nn.RReLU:
        return "rrelu", act.lower, act.upper
    if type(act) is nn.GELU and act.approximate == "tanh":
        return "gelu_tanh", *plain
    if type(act) is nn.PReLU and channels is not None and act.num_parameters not in (1, channels):
        raise ValueError(f"act is nn.PReLU with {act.num_parameters} slopes; allowed: 1 or {channels}")
    for name, kind in _MODULES.items():
        if type(act) is kind:
            return name, *plain
    allowed = ", ".join(f"nn.{kind.__name__}" for kind in dict.fromkeys(_MODULES.values()))
    raise TypeError(f"act is {type(act).__name__}; allowed: {allowed}, None")
