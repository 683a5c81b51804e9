"""Similarity matching as a local loss (Nokland & Eidnes 2019, arXiv 1901.06656)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from layerwise_ext import functional
from layerwise_ext.nn.heads import ClassifierHead, HeadOutput, LocalHead, PooledLinearHead, check_features
from layerwise_ext.nn.moments import PooledMoments


class SimilarityHead(LocalHead):
    """Similarity matching of each channel's standard deviation over the map: 'sim' of the paper, without logits.

    The features of a sample are the unbiased standard deviations of its channels over the whole map, ``[N, C]``, from
    the moments alone; their gradient is 0 where a channel is constant. Of a map of one element, which has none, they
    are the element itself, as the paper takes the outputs of fully connected layers. The loss is
    :func:`~layerwise_ext.functional.similarity_matching_loss` of them.

    ``project=True`` is the paper's form: the standard deviations of a 3x3 convolution of the map, which costs as much
    as a layer and needs the map's gradient in memory.

    Args:
        in_channels: channels of the stage's output, at least 2: one number has no direction. (The paper takes maps of
            three channels or fewer as they are, and standard deviations of others; here it is these for all.)
        num_classes: number of classes, at least 2.
        project: match a convolution of the map, C to C channels without bias, instead of the map.
        kernel_size: of that convolution, an odd number; it keeps the size of the map. (1 is enough for maps of one
            element.)

    Shapes:
        moments of ``[N, in_channels, H, W]``; target ``[N]``, int64 in ``[0, num_classes)``, or -100 for a sample that
        is left out.

    Raises:
        ValueError: moments of another shape; a target of another shape or out of range (on CUDA a device-side
            assertion).
        TypeError: a target that is not int64.
    """

    bins = (1, 1)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        project: bool = False,
        kernel_size: int = 3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if in_channels < 2 or num_classes < 2:
            raise ValueError(f"in_channels, num_classes are {in_channels}, {num_classes}; allowed: at least 2 and 2")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; allowed: odd numbers, which keep the size of the map")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.needs_map = project
        self.second_moment = not project  # of the map; that of the projection is another one
        self.projection: nn.Conv2d | None = None
        if project:
            options = {"padding": kernel_size // 2, "bias": False, "device": device, "dtype": dtype}
            self.projection = nn.Conv2d(in_channels, in_channels, kernel_size, **options)

    def features(self, moments: PooledMoments) -> Tensor:
        """``[N, in_channels]``, what is matched."""
        moments = moments.over_map() if self.projection is None else self._projected(moments.y, self.projection)
        rows, columns = moments.size
        return (moments.mean if rows * columns == 1 else moments.std).flatten(1)

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        check_features(moments, self.in_channels, moments.bins)
        if target is None:
            return HeadOutput(None, None)
        loss = functional.similarity_matching_loss(self.features(moments), target, num_classes=self.num_classes)
        return HeadOutput(None, loss)

    def _projected(self, y: Tensor, projection: nn.Conv2d) -> PooledMoments:
        channels = projection.out_channels
        zero, one = projection.weight.new_zeros(channels), projection.weight.new_ones(channels)
        z, m1, m2 = functional.conv_bn_act_moments(  # a batch norm that changes nothing
            y, projection.weight, None, zero, one,
            padding=(projection.kernel_size[0] // 2, projection.kernel_size[1] // 2), eps=0.0, activation="identity",
        )  # fmt: skip
        return PooledMoments(m1, m2, (z.shape[2], z.shape[3]))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.num_classes}"


class PredSimHead(ClassifierHead):
    """A pooled linear classifier and similarity matching together: 'predsim' of the paper.

    ``loss = (1 - beta) * pred + beta * sim``, with the ``pred`` of a :class:`PooledLinearHead` and the ``sim`` of a
    :class:`SimilarityHead`; the logits are those of ``pred``. One grid of cells serves both: the moments of the whole
    map are put together from those of the cells (:meth:`PooledMoments.over_map`, exact where cells do not overlap).

    Args:
        in_channels, num_classes, bins, bias, zero_init, label_smoothing: as of :class:`PooledLinearHead`, which is the
            child ``pred``.
        beta: share of similarity matching, 0 to 1.
        project, kernel_size: as of :class:`SimilarityHead`, which is the child ``sim``.

    Shapes and errors are those of the two heads.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        bins: int | tuple[int, int] = (4, 4),
        beta: float = 0.99,
        project: bool = False,
        *,
        bias: bool = True,
        zero_init: bool = False,
        label_smoothing: float = 0.0,
        kernel_size: int = 3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta is {beta}; allowed: 0 to 1")
        self.beta = beta
        self.pred = PooledLinearHead(
            in_channels, num_classes, bins, bias,
            zero_init=zero_init, label_smoothing=label_smoothing, device=device, dtype=dtype,
        )  # fmt: skip
        self.sim = SimilarityHead(
            in_channels, num_classes, project=project, kernel_size=kernel_size, device=device, dtype=dtype
        )
        self.bins = self.pred.bins
        self.second_moment = self.sim.second_moment
        self.needs_map = self.sim.needs_map

    def forward(self, moments: PooledMoments, target: Tensor | None = None) -> HeadOutput:
        logits, pred = self.pred(moments, target)
        if target is None:
            return HeadOutput(logits, None)
        return HeadOutput(logits, (1 - self.beta) * pred + self.beta * self.sim(moments, target).loss)

    def to_modules(self) -> nn.Sequential:
        return self.pred.to_modules()

    def extra_repr(self) -> str:
        return f"beta={self.beta}"
