"""Networks of convolutions in a row: VGG and plain networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from layerwise_ext.models import build
from layerwise_ext.models.schedule import Schedule, one_earlier, positions
from layerwise_ext.models.staged import StagedModel
from layerwise_ext.nn import AcceleratedDownsample2d, ConvBNReLU2d

# Output channels of each convolution; 'M' halves the resolution.
VGG_CONFIGS: dict[str, tuple[int | str, ...]] = {
    # Nokland & Eidnes 2019, arXiv 1901.06656
    "vgg8b": (128, 256, "M", 256, 512, "M", 512, "M", 512, "M"),
    "vgg11b": (128, 128, 128, 256, "M", 256, 512, "M", 512, 512, "M", 512, "M"),
    # Simonyan & Zisserman 2015, arXiv 1409.1556
    "vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg16": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    "vgg19": (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
}
# How the resolution is halved.
POOLS = ("max", "avg", "stride", "space_to_depth")

# Above this image size the first convolution is 7x7 with stride 2.
_LARGE_IMAGE = 64


def vgg(
    config: str | Sequence[int | str] = "vgg8b",
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: tuple[int, int] = (32, 32),
    width_multiplier: float = 1.0,
    kernel_size: int = 3,
    downsampling: Schedule = "standard",
    pool: str = "max",
    hidden: int | Sequence[int] | None = 1024,
    bins: int | tuple[int, int] | None = None,
    dim: int = 1024,
    fused: bool = True,
    head: str = "pooled_linear",
    head_depth: int = 2,
    beta: float = 0.99,
    label_smoothing: float = 0.0,
    image_mean: float | Sequence[float] = 0.0,
    image_std: float | Sequence[float] = 1.0,
    activation: str = "relu",
    dropout: float = 0.0,
    seed: int | None = None,
) -> StagedModel:
    """A VGG network, one stage per convolution, then one per fully connected layer; the last one's head is the output.

    All convolutions have a bias and keep the size of the map; the first is 7x7 with stride 2 for images above 64. A
    pool is the ``downsample`` of the stage before it, whose local loss sees the map before pooling. The first fully
    connected layer is a convolution whose kernel covers the whole remaining map: the same function and the same number
    of parameters. Its local loss and the network's output are one and the same head. Classifiers start from zero
    weights.

    Args:
        config: ``'vgg8b'``, ``'vgg11b'`` (Nokland & Eidnes 2019, arXiv 1901.06656), ``'vgg11'``, ``'vgg13'``,
            ``'vgg16'``, ``'vgg19'`` (Simonyan & Zisserman 2015, arXiv 1409.1556, here with batch norm), or a list of
            output channels and ``'M'``, such as ``[32, 'M', 64]``.
        in_channels, num_classes, image_size: of the data; ``image_size`` is ``(H, W)``.
        width_multiplier: scales every layer's channels, fully connected ones as well (rounded, at least 1).
        kernel_size: of the convolutions, odd; the papers' is 3. With the width it is how much convolution a local loss
            has below it.
        downsampling: where the resolution halves: ``'standard'``, as the config says; ``'accelerated'``, each time one
            layer earlier; or the layers, numbered from 0, that work at half the resolution of the one before
            (:mod:`layerwise_ext.models.schedule`). vgg8b has ``[2, 4, 5, 6]``, accelerated ``[1, 3, 4, 5]``.
        pool: how: ``'max'``, ``'avg'``, ``'stride'`` (keeps one of four elements) or ``'space_to_depth'`` (four times
            the channels go into the next convolution; Belilovsky et al. 2019, arXiv 1812.11446).
        hidden: channels of the fully connected stage, or of several in a row; None leaves it out, and the last
            convolution has the output head.
        bins: cells of the heads, an int or ``(bh, bw)``, clipped to the map of each stage. None: the finest grid that
            the paper's rule gives, halving rows and columns in turn until channels * cells <= ``dim``.
        dim: largest number of pooled features of a head when ``bins`` is None (the paper: 2048 for CIFAR, 1024 for
            MNIST).
        fused: False builds ``nn.Sequential(Conv2d, BatchNorm2d, activation)`` in place of each
            :class:`~layerwise_ext.nn.ConvBNReLU2d`, with the same names, parameters and initial values.
        head: the local loss of the stages. ``'pooled_linear'`` is the paper's pred, ``'similarity'`` its sim and
            ``'predsim'`` its predsim, both from the moments of each stage's own output, ``'similarity_projected'`` and
            ``'predsim_projected'`` the paper's form, on a 3x3 convolution of it; ``'contrastive'`` is supervised
            contrastive, ``'conv'`` convolutions and a classifier, ``'mlp_sr'`` a small network on a quarter of the
            resolution (:class:`~layerwise_ext.nn.ConvHead`, :class:`~layerwise_ext.nn.MLPSRHead`), ``'auglocal'`` a
            network of up to three layers like those that follow (Ma et al. 2024, arXiv 2402.17318),
            ``'reconstruction'`` a decoder's distance to the image, ``'infopro'`` and ``'infopro_contrastive'`` that and
            a classifier or the contrastive loss, with :func:`~layerwise_ext.nn.infopro_weights` (Wang et al. 2021,
            arXiv 2101.10832). With predsim the output is the classifier of the last stage's own predsim, whose
            cross-entropy is scaled by ``1 - beta`` as the paper's is; ``'conv'`` and ``'mlp_sr'`` are those of the last
            stage, too, unless its map is one element; otherwise it has a pooled linear classifier. ``'goodness'`` is
            forward-forward: every stage has a :class:`~layerwise_ext.nn.GoodnessHead`, the last one, too, and its body
            begins with a normalisation; it is trained on :class:`~layerwise_ext.train.LabelledPairs`. Joint training
            looks at the last head alone: leave it at ``'pooled_linear'`` there.
        head_depth: layers of a ``'conv'`` head, the linear one included: the k of greedy training (arXiv 1812.11446).
        beta: share of similarity matching in predsim.
        label_smoothing: of the cross-entropies, as in ``torch.nn.functional.cross_entropy``.
        image_mean, image_std: what the images were normalised with, a number or one for each channel; what is
            reconstructed is the image before that, between 0 and 1.
        activation: ``'relu'``, the paper's choice for joint training and pred, ``'leaky_relu'`` (slope 0.01), its
            choice for sim and predsim, or another one of :class:`~layerwise_ext.nn.ConvBNReLU2d`.
        dropout: probability with which a channel of what a stage gives to the next one is zero while training; the
            paper's for vgg8b: 0.2 for CIFAR, 0.1 for Fashion-MNIST.
        seed: initialise from this seed, leaving torch's global generator untouched; None uses the global generator.

    Raises:
        ValueError: an unknown ``config``, ``downsampling``, ``pool``, ``head`` or ``activation``; an even
            ``kernel_size``; ``dropout`` outside [0, 1); an image too small for the pools.
    """
    widths, standard = _parse(config)
    fully_connected = [] if hidden is None else [hidden] if isinstance(hidden, int) else list(hidden)
    if any(width < 1 for width in fully_connected):
        raise ValueError(f"hidden is {hidden}; channels must be at least 1")
    count = len(widths) + len(fully_connected)
    if standard and standard[-1] == count:
        raise ValueError("config ends in 'M' but there is no hidden layer: no layer is left to read the last pool")
    build.check_activation(activation)
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; allowed: {', '.join(map(repr, POOLS))}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; allowed: odd numbers, which keep the size of the map")
    halved = positions(downsampling, standard, one_earlier(standard), count)
    _check_pools(len(halved), image_size)

    units: list[build.Unit] = []
    for index, width in enumerate([*widths, *fully_connected]):
        # The first fully connected layer covers the whole map, those behind it are 1x1.
        geometry = None if index >= len(widths) else (kernel_size, 1)
        if index == 0 and max(image_size) > _LARGE_IMAGE:
            geometry = (7, 2)
        body = _Body(build.channels(width, width_multiplier), geometry, activation, fused,
                     pool if index == 0 and 0 in halved else None)  # fmt: skip
        units.append(build.Unit(body, (pool, 2) if index + 1 in halved else None))
    return build.staged(
        units,
        build.Heads(
            head, head_depth, num_classes, bins, dim, beta, label_smoothing, in_channels, image_mean, image_std
        ),
        in_channels=in_channels,
        image_size=image_size,
        pooled_output=False,
        dropout=dropout,
        seed=seed,
        downsampling=halved,
    )


def cnn(
    depth: int = 6,
    width: int = 128,
    *,
    downsampling: Schedule = "standard",
    pool: str = "space_to_depth",
    hidden: int | Sequence[int] | None = None,
    **options: object,
) -> StagedModel:
    """A plain network: ``depth`` convolutions, twice as wide behind each of two halvings of the resolution.

    The network of greedy training (Belilovsky et al. 2019, arXiv 1812.11446), whose halvings come after a third and
    two thirds of its layers.

    Args:
        depth: number of convolutions, at least 3.
        width: channels of the first.
        downsampling, pool, hidden, options: those of :func:`vgg`. Widths stay where they are when the halvings move.

    Raises:
        ValueError: a smaller ``depth``; what :func:`vgg` refuses.
    """
    if depth < 3:
        raise ValueError(f"depth is {depth}; it must be at least 3")
    first, second = round(depth / 3), round(2 * depth / 3)
    config: list[int | str] = [
        *(width,) * first, "M", *(2 * width,) * (second - first), "M", *(4 * width,) * (depth - second)
    ]  # fmt: skip
    return vgg(config, downsampling=downsampling, pool=pool, hidden=hidden, **options)  # type: ignore[arg-type]


class _Body:
    """Convolution + batch norm + activation for inputs of a shape."""

    def __init__(
        self, channels: int, geometry: tuple[int, int] | None, activation: str, fused: bool, pool: str | None
    ) -> None:
        self.channels = channels
        self.geometry = geometry  # kernel size and stride; None covers the whole map
        self.activation = activation
        self.fused = fused
        self.pool = pool  # of the image

    def __call__(self, shape: torch.Size) -> nn.Module:
        _, in_channels, height, width = shape
        first: OrderedDict[str, nn.Module] = OrderedDict()
        if self.pool is not None:
            first["pool"] = AcceleratedDownsample2d(self.pool, 2)
            in_channels *= 4 if self.pool == "space_to_depth" else 1
        if self.geometry is None:
            geometry: tuple[tuple[int, int], int, int] = ((height, width), 1, 0)
        else:
            kernel_size, stride = self.geometry
            geometry = ((kernel_size, kernel_size), stride, kernel_size // 2)
        layer = ConvBNReLU2d(in_channels, self.channels, *geometry, bias=True, activation=self.activation)
        block = layer if self.fused else plain(layer)
        return nn.Sequential(OrderedDict(**first, block=block)) if first else block


def plain(layer: ConvBNReLU2d) -> nn.Sequential:
    """The same layer in plain modules, under the same names."""
    return nn.Sequential(OrderedDict(zip(("conv", "bn", "act"), layer.to_modules(), strict=True)))


def _parse(config: str | Sequence[int | str]) -> tuple[list[int], list[int]]:
    """The widths, and the numbers of the layers behind each 'M'."""
    if isinstance(config, str):
        if config not in VGG_CONFIGS:
            raise ValueError(f"config is {config!r}; allowed: {', '.join(map(repr, VGG_CONFIGS))}, or a list")
        config = VGG_CONFIGS[config]
    widths: list[int] = []
    halved: list[int] = []
    for layer in config:
        if isinstance(layer, int) and layer > 0:
            widths.append(layer)
        elif layer != "M":
            raise ValueError(f"config holds {layer!r}; allowed: positive numbers of channels and 'M'")
        elif halved and halved[-1] == len(widths):
            raise ValueError("config holds two pools in a row; put a layer between them")
        else:
            halved.append(len(widths))
    if not widths:
        raise ValueError(f"config is {list(config)}; it needs at least one number of channels")
    return widths, halved


def _check_pools(pools: int, image_size: tuple[int, int]) -> None:
    size = min(image_size)
    if size < 1:
        raise ValueError(f"image_size is {tuple(image_size)}; both must be at least 1")
    if max(image_size) > _LARGE_IMAGE:
        size = (size + 1) // 2
    if size < 2**pools:
        raise ValueError(
            f"image_size is {tuple(image_size)}, too small for {pools} 2x2 pools: the map before them is {size} wide "
            f"and must be at least {2**pools}; use fewer pools or larger images"
        )
