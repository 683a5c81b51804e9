"""Pretraining without labels: stacked autoencoders, one layer after another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from layerwise_ext import functional
from layerwise_ext._modules import Layer, layers_of
from layerwise_ext.nn import ConvBNReLU2d, HeadOutput, LocalHead, LocalStage
from layerwise_ext.nn.moments import PooledMoments
from layerwise_ext.train.evaluation import Batches
from layerwise_ext.train.greedy import GreedyTrainer
from layerwise_ext.train.metrics import StepResult
from layerwise_ext.train.optimizers import OptimizerFactory, adam


class AutoencoderPretrainer(GreedyTrainer):
    """Stacked autoencoders, ``epochs`` epochs each (Bengio et al. 2007; denoising: Vincent et al. 2008).

    The first layer is trained to give a code from which a decoder reconstructs its input, with the mean squared error;
    then the data set is encoded once, in eval mode, and the second layer is trained on the codes, and so on: greedy
    training, in which the stages are the layers and their heads the decoders. The layers are trained in place: any
    other trainer then goes on with the network. The decoders stay here and are not needed any more.

    A decoder undoes its layer backwards: a pooled map is enlarged by repetition, space-to-depth is undone, and the
    transpose of the convolution or linear map, with a bias, follows. Autoencoders of convolutions need what makes the
    code smaller or the task harder, a pool or noise: a convolution with more channels than its input may copy it.

    Loaders give images alone or pairs ``(images, target)``, whose targets are not looked at. :meth:`evaluate` has the
    reconstruction error of each layer, without noise, as its loss; there is nothing to :meth:`predict`.

    Args:
        layers: a :class:`~layerwise_ext.models.StagedModel` or stages in a row, of which the bodies are trained and the
            heads left alone, and whose codes are what the next stage gets; or modules in a row, such as
            ``nn.Sequential(nn.Linear(784, 256), nn.ReLU())`` or a ConvBNReLU2d. Each has one convolution or linear
            layer.
        optimizer: makes an optimiser from a list of parameters, those of a layer and its decoder, or a sequence of such
            functions, one for each layer.
        tied: decode with the layer's own weight instead of one of the decoder's.
        noise: share of the elements of a layer's input that are set to zero, at random, before it is encoded; what is
            to be reconstructed is the input without noise. It comes from torch's global generator.
        **options: see :class:`GreedyTrainer`. ``seed`` is that of the decoders' initial weights, too; early stopping
            must look at ``val_loss``.

    Raises:
        TypeError: a layer that is not a module; what :class:`GreedyTrainer` says.
        ValueError: no layers; a layer with none or several convolutions and linear layers, or one that the decoder
            cannot undo; lazy modules that have not run; ``noise`` outside [0, 1); (when run) a code that the decoder
            cannot undo, such as a flattened map, or one whose decoder gives another shape than the input; what
            :class:`GreedyTrainer` says.

    Attributes:
        stages: the layers with their decoders; ``stage`` and ``stage_epoch`` say which one is being trained.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        optimizer: OptimizerFactory | Sequence[OptimizerFactory] = adam,
        *,
        tied: bool = False,
        noise: float = 0.0,
        **options: Any,
    ) -> None:
        layers = list(layers)
        if not layers:
            raise ValueError("layers is empty; there is nothing to train")
        if not 0 <= noise < 1:
            raise ValueError(f"noise is {noise}; allowed: 0 to below 1, the share of elements set to zero")
        weighted = [_weighted(index, layer) for index, layer in enumerate(layers)]
        seed = options.get("seed")
        generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
        stages = []
        for index, (layer, own) in enumerate(zip(layers, weighted, strict=True)):
            stages.append(_Autoencoder(layer, _Decoder(index, own, tied, generator), noise))
        super().__init__(stages, optimizer, **options)
        self.generator.set_state(generator.get_state())

    @property
    def decoders(self) -> list[nn.Module]:
        """Of the layers."""
        return [stage.head for stage in self.stages]

    def step(self, x: Tensor, target: Tensor | None = None, *, weight: float = 1.0, update: bool = True) -> StepResult:
        """One step of the current layer on its inputs, ``[N, C, H, W]`` or ``[N, D]``; see :meth:`Trainer.step`."""
        return super().step(x, _no_target(x) if target is None else target, weight=weight, update=update)

    def _on_device(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            if not isinstance(x, Tensor):
                raise TypeError(f"the loader gave a {type(x).__name__}; images, or pairs (images, target), are needed")
            x = self._images_on_device(x)
            yield x, _no_target(x)

    def _next_stage(self) -> None:
        super()._next_stage()
        for stage in self.stages[: self.stage]:
            stage.eval()


def _no_target(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)


class _Autoencoder(LocalStage):
    """A layer, with what a :class:`LocalStage` does behind it, and its decoder."""

    def __init__(self, layer: nn.Module, decoder: _Decoder, noise: float) -> None:
        super().__init__(layer.body if isinstance(layer, LocalStage) else layer, decoder)
        self.downsample = layer.downsample if isinstance(layer, LocalStage) else None
        self.noise = noise

    def moments(
        self, x: Tensor, image: Tensor | None = None, *, detach: bool | None = None
    ) -> tuple[Tensor, PooledMoments]:
        """The code of ``x`` with noise; the decoder sees all of it, and ``x`` without noise."""
        noisy = F.dropout(x, self.noise) * (1 - self.noise) if self.noise and self.training else x
        code = self.features(noisy)
        size = (code.shape[2], code.shape[3]) if code.dim() == 4 else (1, 1)
        moments = PooledMoments(code, None, size, code)
        moments.image = x
        return code, moments


def _weighted(index: int, layer: nn.Module) -> Layer:
    """The convolution or linear layer of layers[index]."""
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layers[{index}] is {type(layer).__name__}; a LocalStage or another module is needed")
    encoder = layer.body if isinstance(layer, LocalStage) else layer
    if any(map(is_lazy, encoder.parameters())):
        raise ValueError(f"layers[{index}] has a lazy module without parameters; run it once before")
    found = layers_of(encoder)
    if len(found) != 1:
        raise ValueError(f"layers[{index}] has {len(found)} convolutions and linear layers; 1 is needed")
    module = found[0].module
    if found[0].is_computed or not isinstance(module, (nn.Linear, nn.Conv2d)):
        raise ValueError(
            f"layers[{index}] has a {type(module).__name__} that a decoder cannot undo; an nn.Linear or an nn.Conv2d "
            "with a weight of its own is needed"
        )
    if isinstance(module, nn.Conv2d) and module.padding == "same" and any(k % 2 == 0 for k in module.kernel_size):
        raise ValueError(f"layers[{index}] has padding='same' and kernel_size {module.kernel_size}; it must be odd")
    return found[0]


class _Decoder(LocalHead):
    """From a layer's code to its input: :class:`AutoencoderPretrainer`."""

    needs_map = True
    weight: nn.Parameter | None

    def __init__(self, index: int, layer: Layer, tied: bool, generator: torch.Generator) -> None:
        super().__init__()
        self._name = f"layers[{index}]"
        self._layer = (layer,)  # no child: its parameters are the encoder's
        own, _ = layer.parameters()
        if tied:
            self.weight = None
        else:
            fan_in = own.numel() // own.shape[1]
            if isinstance(layer.module, nn.Conv2d):
                fan_in //= layer.module.groups
            values = torch.empty(own.shape).normal_(std=fan_in**-0.5, generator=generator)
            self.weight = nn.Parameter(values.to(own))
        channels = layer.module.in_channels if isinstance(layer.module, nn.Conv2d) else own.shape[1]
        self.bias = nn.Parameter(own.new_zeros(channels))

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        """The reconstruction error, with or without a target."""
        x = moments.image
        return HeadOutput(None, F.mse_loss(self.decode(moments.y, x.shape), x))

    def decode(self, code: Tensor, shape: torch.Size) -> Tensor:
        """``code`` of an input of ``shape``, to that shape."""
        (layer,) = self._layer
        weight = layer.parameters()[0] if self.weight is None else self.weight
        if isinstance(layer.module, nn.Linear):
            if code.dim() < 2 or code[0].numel() != layer.module.out_features:
                raise self._refusal(code, f"[N, {layer.module.out_features}]")
            y = F.linear(code.flatten(1), weight.T, self.bias)
            if y.numel() != math.prod(shape):
                raise ValueError(f"{self._name}: its decoder gives {y[0].numel()} elements, its input is {list(shape)}")
            return y.view(shape)
        conv = cast(nn.Conv2d, layer.module)
        stride, padding = _geometry(layer)
        kernel = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        size, rest = [], []
        for n, s, p, k in zip(shape[2:], stride, padding, kernel, strict=True):
            size.append((n + 2 * p - k - 1) // s + 1)
            rest.append((n + 2 * p - k - 1) % s)  # rows that the convolution did not reach
        if not _can_be_enlarged(code, conv.out_channels, size):
            raise self._refusal(code, f"[N, {conv.out_channels}, H, W], pooled or after space-to-depth,")
        z = _enlarged(code, conv.out_channels, size)
        y = F.conv_transpose2d(z, weight, self.bias, stride, padding, rest, conv.groups, conv.dilation)
        if y.shape != shape:
            raise ValueError(f"{self._name}: its decoder gives shape {list(y.shape)}, its input is {list(shape)}")
        return y

    def _refusal(self, code: Tensor, needed: str) -> ValueError:
        return ValueError(
            f"{self._name} gives a code {list(code.shape)} that a decoder cannot undo; {needed} is needed"
        )


def _geometry(layer: Layer) -> tuple[list[int], list[int]]:
    """Stride, that of a fused layer's downsampling included, and padding."""
    conv = cast(nn.Conv2d, layer.module)
    stride = list(conv.stride)
    if isinstance(layer.owner, ConvBNReLU2d) and layer.owner.downsample is not None:
        mode, factor = layer.owner.downsample
        if mode == "stride":
            stride = [s * f for s, f in zip(stride, functional._pair("downsample factor", factor), strict=True)]
    if isinstance(conv.padding, str):
        same = conv.padding == "same"
        return stride, [d * (k - 1) // 2 * same for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return stride, list(conv.padding)


def _can_be_enlarged(code: Tensor, channels: int, size: Sequence[int]) -> bool:
    if code.dim() != 4 or 0 in code.shape:
        return False
    cells = math.prod(n // m for n, m in zip(size, code.shape[2:], strict=True))
    return code.shape[1] in (channels, channels * cells)


def _enlarged(code: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """The map that was downsampled to the code, by repetition, or as it was where the code has all of it."""
    if code.shape[1] != channels:
        rows, columns = (n // m for n, m in zip(size, code.shape[2:], strict=True))
        code = functional.depth_to_space(code, (rows, columns))
    return code if list(code.shape[2:]) == list(size) else F.interpolate(code, size=list(size))
