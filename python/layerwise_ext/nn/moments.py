"""What a local head sees of a stage's output: sums over pooling cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise_ext import functional


class PooledMoments:
    """Sums of y and y*y over the cells of an adaptive average pooling of y ``[N, C, H, W]``.

    Args:
        m1: ``[N, C, bh, bw]``, the sum of y over each cell; float32, or float64 for float64 y.
        m2: the same for y*y.
        size: ``(H, W)`` of y.

    Where H or W is not a multiple of the number of cells, the cells overlap, as in ``adaptive_avg_pool2d``.
    """

    def __init__(self, m1: Tensor, m2: Tensor, size: tuple[int, int]) -> None:
        self._m1 = m1
        self._m2 = m2
        self.size = size

    @staticmethod
    def of(y: Tensor, bins: tuple[int, int]) -> PooledMoments:
        """The moments of any ``[N, C, H, W]`` tensor, by plain PyTorch; y*y is formed only if ``m2`` is asked for.

        Raises:
            ValueError: y is not 4-D, or has fewer rows or columns than ``bins``.
        """
        return _DenseMoments(y, bins)

    @property
    def m1(self) -> Tensor:
        return self._m1

    @property
    def m2(self) -> Tensor:
        return self._m2

    @property
    def bins(self) -> tuple[int, int]:
        """``(bh, bw)``, the number of cells."""
        rows, columns = self.mean.shape[2:]
        return rows, columns

    @property
    def area(self) -> Tensor:
        """``[bh, bw]``, the number of elements in each cell, in the dtype and on the device of ``m1``."""
        mean = self.mean
        return functional.cell_area(self.size, self.bins, device=mean.device).to(mean.dtype)

    @property
    def mean(self) -> Tensor:
        """``[N, C, bh, bw]``, the mean of y over each cell: ``adaptive_avg_pool2d(y, bins)``."""
        return self._m1 / self._divisor(self._m1)

    @property
    def second_moment(self) -> Tensor:
        """``[N, C, bh, bw]``, the mean of y*y over each cell."""
        return self._m2 / self._divisor(self._m2)

    @property
    def variance(self) -> Tensor:
        """``[N, C, bh, bw]``, the unbiased variance of y in each cell; 0 in a cell of one element."""
        mean, area = self.mean, self.area
        return ((self.second_moment - mean * mean) * (area / (area - 1).clamp(min=1))).clamp(min=0)

    @property
    def std(self) -> Tensor:
        """``[N, C, bh, bw]``, the square root of ``variance``; its gradient is 0, not infinite, where y is constant."""
        variance = self.variance
        positive = variance > 0
        return torch.where(positive, variance, 1).sqrt() * positive

    def _divisor(self, m: Tensor) -> float | Tensor:
        """The cell area; a number where all cells are alike, which saves building a tensor at each step."""
        (height, width), (rows, columns) = self.size, m.shape[2:]
        if height % rows == 0 and width % columns == 0:
            return float((height // rows) * (width // columns))
        return functional.cell_area(self.size, (rows, columns), device=m.device).to(m.dtype)


class _DenseMoments(PooledMoments):
    """Moments of a materialised y; the means come first here and the sums are derived from them."""

    def __init__(self, y: Tensor, bins: tuple[int, int]) -> None:
        if y.dim() != 4:
            raise ValueError(f"the stage's output has shape {tuple(y.shape)}; moments need [N, C, H, W]")
        if bins[0] > y.shape[2] or bins[1] > y.shape[3]:
            raise ValueError(f"the head pools to {bins} cells but the map is only {tuple(y.shape[2:])}")
        self._y = y
        self._bins = bins
        # Under bfloat16 the pool accumulates in float32 and rounds once, at the end.
        self._mean = _accumulated(F.adaptive_avg_pool2d(y, bins))
        self.size = (y.shape[2], y.shape[3])

    @property
    def m1(self) -> Tensor:
        return self._mean * self._divisor(self._mean)

    @property
    def m2(self) -> Tensor:
        second = self.second_moment
        return second * self._divisor(second)

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def second_moment(self) -> Tensor:
        y = _accumulated(self._y)
        return F.adaptive_avg_pool2d(y * y, self._bins)


def _accumulated(x: Tensor) -> Tensor:
    """In the dtype of the moments: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()
