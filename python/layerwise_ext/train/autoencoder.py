"""Pretraining without labels: stacked autoencoders, one layer after another."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from layerwise_ext import functional
from layerwise_ext._modules import Layer, layers_of
from layerwise_ext.nn import ConvBNReLU2d, LocalStage
from layerwise_ext.train import random_state
from layerwise_ext.train.common import length
from layerwise_ext.train.feature_cache import FeatureCache
from layerwise_ext.train.optimizers import OptimizerFactory, adam
from layerwise_ext.train.replicas import ReplicaGroup

logger = logging.getLogger(__name__)


class AutoencoderPretrainer:
    """Stacked autoencoders, ``epochs`` epochs each (Bengio et al. 2007; denoising: Vincent et al. 2008).

    The first layer is trained to give a code from which a decoder reconstructs its input, with the mean squared error;
    then the data set is encoded once, in eval mode, and the second layer is trained on the codes, and so on. The layers
    are trained in place: any other trainer then goes on with the network. The decoders stay here and are not needed any
    more.

    A decoder undoes its layer backwards: a pooled map is enlarged by repetition, space-to-depth is undone, and the
    transpose of the convolution or linear map, with a bias, follows. Autoencoders of convolutions need what makes the
    code smaller or the task harder, a pool or noise: a convolution with more channels than its input may copy it.

    Args:
        layers: a :class:`~layerwise_ext.models.StagedModel` or stages in a row, of which the bodies are trained and the
            heads left alone, and whose codes are what the next stage gets; or modules in a row, such as
            ``nn.Sequential(nn.Linear(784, 256), nn.ReLU())`` or a ConvBNReLU2d. Each has one convolution or linear
            layer.
        optimizer: makes an optimiser from a list of parameters; called once per layer, for it and its decoder.
        tied: decode with the layer's own weight instead of one of the decoder's.
        noise: share of the elements of a layer's input that are set to zero, at random, before it is encoded; what is
            to be reconstructed is the input without noise.
        device: where the layers are moved and the batches are sent; None: where the layers are.
        seed: of the trainer's own generator, which shuffles codes and draws the decoders' initial weights; None:
            torch's initial seed. Noise comes from torch's global generator.
        progress: show a progress bar.
        channels_last: keep maps and parameters in torch.channels_last.
        cache: False encodes the data set anew in each epoch (fresh augmentation, no memory).
        cache_limit_bytes: where the codes would take more than this, or the loader has no length to tell, they are
            computed in each epoch, with a warning in the log.
        process_group: processes that train together, each on its part of every batch, as in :class:`Trainer`; each
            keeps the codes of its part. None: this process alone.

    Raises:
        TypeError: a layer that is not a module; ``process_group`` is no process group.
        ValueError: no layers; a layer with none or several convolutions and linear layers, or one that the decoder
            cannot undo; lazy modules that have not run; ``noise`` outside [0, 1); (when run) a code that the decoder
            cannot undo, such as a flattened map, or one whose decoder gives another shape than the input.

    Attributes:
        layer: index of the layer that is being trained; ``len(layers)`` when all are done.
        layer_epoch: finished epochs of that layer.
        epoch: finished epochs of all layers.
        history: one record per finished epoch as in :class:`Trainer`: ``epoch``, ``stages`` (the index of the layer),
            ``train_loss`` (its reconstruction error), ``train_accuracy`` (NaN), ``seconds``.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        optimizer: OptimizerFactory = adam,
        *,
        tied: bool = False,
        noise: float = 0.0,
        device: torch.device | str | None = None,
        seed: int | None = None,
        progress: bool = True,
        channels_last: bool = True,
        cache: bool = True,
        cache_limit_bytes: int = 2 << 30,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.layers = list(layers)
        if not self.layers:
            raise ValueError("layers is empty; there is nothing to train")
        if not 0 <= noise < 1:
            raise ValueError(f"noise is {noise}; allowed: 0 to below 1, the share of elements set to zero")
        weighted = [_weighted(index, layer) for index, layer in enumerate(self.layers)]
        self.noise = noise
        self.device = weighted[0].parameters()[0].device if device is None else torch.device(device)
        self._replicas = ReplicaGroup(process_group)
        self.progress = progress and self._replicas.rank == 0
        self.channels_last = channels_last
        self.cache = cache
        self.cache_limit_bytes = cache_limit_bytes
        self.generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
        self.decoders = [_Decoder(i, layer, tied, self.generator) for i, layer in enumerate(weighted)]
        self._encoders = [layer.body if isinstance(layer, LocalStage) else layer for layer in self.layers]
        for module in (*self.layers, *self.decoders):
            module.to(self.device)
            if channels_last:
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizers = []
        for encoder, decoder in zip(self._encoders, self.decoders, strict=True):
            parameters = [*encoder.parameters(), *decoder.parameters()]
            self.optimizers.append(optimizer([p for p in parameters if p.requires_grad]))
        self.layer = 0
        self.layer_epoch = 0
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self._codes: FeatureCache | None = None
        self._fits = True
        self._loader: Any = None
        self._saved_random_state: dict[str, Any] | None = None
        # Generators as they were when the current layer's inputs were computed: a resumed run computes them again.
        self._cache_random_state: dict[str, Any] | None = None

    def step(self, x: Tensor, *, weight: float = 1.0) -> Tensor:
        """One step of the current layer on its inputs, ``[N, C, H, W]`` or ``[N, D]``; the loss, not read back.

        With ``process_group`` all processes take the step on their parts, each with a ``weight`` of its loss.
        """
        optimizer = self.optimizers[self.layer]
        noisy = F.dropout(x, self.noise) * (1 - self.noise) if self.noise else x
        y = self.decoders[self.layer](_encode(self.layers[self.layer], noisy), x.shape)
        loss = F.mse_loss(y, x)
        optimizer.zero_grad(set_to_none=True)  # of whatever was done with the layer before
        (loss if weight == 1.0 else loss * weight).backward()
        self._replicas.average(p for group in optimizer.param_groups for p in group["params"])()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int,
        on_epoch_end: Callable[[AutoencoderPretrainer, dict[str, Any]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Train each layer until it has ``epochs`` epochs, those before :meth:`load_state_dict` included.

        Args:
            loader: any iterable of batches, images or pairs ``(images, target)``, whose targets are not looked at.
            epochs: of each layer.
            on_epoch_end: called as ``on_epoch_end(trainer, record)`` with everything up to date, so that a checkpoint
                of :meth:`state_dict` written there continues with the next epoch; in the first process only.

        Returns:
            ``history``.

        Raises:
            ValueError: ``epochs`` below 1; (``process_group``) as :meth:`Trainer.fit`.
            RuntimeError: the loader gave no batches; (``process_group``) as :meth:`Trainer.fit`.
        """
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}; allowed: 1 or more, of each layer")
        self._replicas.check_same("epoch", self.epoch)
        modules = [*self._encoders, *self.decoders]
        self._replicas.broadcast(t for m in modules for t in (*m.parameters(), *m.buffers()))
        self._loader = loader
        if self._saved_random_state is not None:
            random_state.restore(self._saved_random_state, loader, self.device)
            self._saved_random_state = None
        while self.layer < len(self.layers):
            if self.layer_epoch >= epochs:
                self._next_layer()
                continue
            record = self._train_epoch(loader)
            self.epoch += 1
            self.layer_epoch += 1
            self.history.append(record)
            logger.info("epoch %d: layer %d, train_loss %.4g", record["epoch"], self.layer, record["train_loss"][0])
            if on_epoch_end is not None and self._replicas.rank == 0:
                on_epoch_end(self, record)
        return self.history

    def _train_epoch(self, loader: Iterable[Any]) -> dict[str, Any]:
        start = time.perf_counter()
        for index, encoder in enumerate(self._encoders[: self.layer + 1]):
            encoder.train(index == self.layer)
        self._replicas.share_random_state(loader, self.generator, self.device, self.epoch)
        batches, total = self._epoch_batches(loader)
        sum_of_losses, samples = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with tqdm(total=total, desc=f"layer {self.layer}", unit="batch", leave=False, disable=not self.progress) as bar:
            for [((x, _), weight)] in self._replicas.updates(batches):
                with self._replicas.own_randomness(self.device):
                    sum_of_losses.add_(self.step(x, weight=weight), alpha=len(x))
                samples += len(x)
                bar.update()
        if samples == 0:
            raise RuntimeError("loader gave no batches; note that an iterator is used up after one epoch")
        self._replicas.broadcast(self._encoders[self.layer].buffers())
        sums = self._replicas.add_up(torch.stack((sum_of_losses, torch.full_like(sum_of_losses, samples))))
        loss = float(sums[0] / sums[1])
        if not math.isfinite(loss):
            logger.warning("epoch %d: the loss of layer %d is %s", self.epoch + 1, self.layer, loss)
        return {
            "epoch": self.epoch + 1,
            "stages": [self.layer],
            "train_loss": [loss],
            "train_accuracy": [math.nan],
            "seconds": time.perf_counter() - start,
        }

    def _next_layer(self) -> None:
        # A finished layer is never trained again: what its optimiser remembers would only take memory.
        self.optimizers[self.layer].state.clear()
        for encoder in self._encoders[: self.layer + 1]:  # also those that were finished before load_state_dict
            encoder.eval()
        self.layer += 1
        self.layer_epoch = 0
        self._codes = None
        self._fits = True
        self._cache_random_state = None

    # -- Inputs of the current layer -----------------------------------------------------------------------------------

    def _epoch_batches(self, loader: Iterable[Any]) -> tuple[Iterable[tuple[Tensor, Tensor]], int | None]:
        """The inputs of the current layer, with targets that say nothing."""
        if self.layer > 0 and self.cache and self._fits and self._codes is None:
            self._fill_cache(loader)
        if self._codes is None:
            return self._inputs(loader), length(loader)
        return self._codes.batches(self._replicas.own_generator(self.generator)), len(self._codes)

    def _inputs(self, loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._replicas.share(loader):
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            if not isinstance(x, Tensor):
                raise TypeError(f"the loader gave a {type(x).__name__}; images, or pairs (images, target), are needed")
            last = self.channels_last and x.dim() == 4
            layout = torch.channels_last if last else torch.preserve_format
            x = x.to(self.device, non_blocking=True, memory_format=layout)
            with torch.no_grad():
                for layer in self.layers[: self.layer]:
                    x = _encode(layer, x)
            yield x, torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def _fill_cache(self, loader: Iterable[Any]) -> None:
        """Encode the data set; a resumed run sees the same order and augmentation."""
        now = random_state.capture(loader, self.device)
        replay = self._cache_random_state
        if replay is not None:
            random_state.restore(replay, loader, self.device)
        self._codes = FeatureCache.fill(self._inputs(loader), length(loader), self.cache_limit_bytes)
        self._fits = self._replicas.all(self._codes is not None)
        if not self._fits:
            self._codes = None
        if replay is not None or not self._fits:
            random_state.restore(now, loader, self.device)
        if self._fits and replay is None:
            self._cache_random_state = now

    # -- Checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on as if :meth:`fit` had not stopped.

        Tensors, numbers, strings, lists and dictionaries only; the tensors are the live ones. See
        :meth:`Trainer.state_dict` for the generators.
        """
        state = self._saved_random_state
        if state is None and self._loader is not None:
            state = random_state.capture(self._loader, self.device)
        return {
            "trainer": type(self).__name__,
            "processes": self._replicas.size,
            "epoch": self.epoch,
            "layer": self.layer,
            "layer_epoch": self.layer_epoch,
            "history": copy.deepcopy(self.history),
            "encoders": [encoder.state_dict() for encoder in self._encoders],
            "decoders": [decoder.state_dict() for decoder in self.decoders],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "random_state": state,
            "cache_random_state": self._cache_random_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict` into a trainer made with the same arguments; see :meth:`Trainer.load_state_dict`
        for another number of processes.

        Raises:
            ValueError: the state is of another trainer, or of another number of layers.
        """
        if state["trainer"] != type(self).__name__:
            raise ValueError(f"the state is of a {state['trainer']}; this is a {type(self).__name__}")
        if len(state["encoders"]) != len(self.layers):
            raise ValueError(f"the state has {len(state['encoders'])} layers; this trainer has {len(self.layers)}")
        self._replicas.compare(state.get("processes", 1))
        for modules, saved in ((self._encoders, state["encoders"]), (self.decoders, state["decoders"])):
            for module, module_state in zip(modules, saved, strict=True):
                module.load_state_dict(module_state)
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(optimizer_state))
        self.generator.set_state(state["generator"])
        self.epoch = state["epoch"]
        self.layer = state["layer"]
        self.layer_epoch = state["layer_epoch"]
        self.history = copy.deepcopy(state["history"])
        self._saved_random_state = state["random_state"]
        self._cache_random_state = state["cache_random_state"]
        self._codes = None
        self._fits = True


def _encode(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.features(x) if isinstance(layer, LocalStage) else cast(Tensor, layer(x))


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


class _Decoder(nn.Module):
    """From a layer's code to its input: :class:`AutoencoderPretrainer`."""

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

    def forward(self, code: Tensor, shape: torch.Size) -> Tensor:
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
