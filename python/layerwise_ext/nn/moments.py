"""What a local head sees of a stage's output: sums over pooling cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise_ext import functional

_NO_SECOND_MOMENT = "m2 was not computed: the head's attribute second_moment is False"


class PooledMoments:
    """Sums of y and y*y over the cells of an adaptive average pooling of y ``[N, C, H, W]``.

    Args:
        m1: ``[N, C, bh, bw]``, the sum of y over each cell; float32, or float64 for float64 y.
        m2: the same for y*y, or None where the head declared that it does not look at it.
        size: ``(H, W)`` of y.
        y: the map itself, or None where the head declared that it does not look at it.

    Where H or W is not a multiple of the number of cells, the cells overlap, as in ``adaptive_avg_pool2d``.
    """

    def __init__(self, m1: Tensor, m2: Tensor | None, size: tuple[int, int], y: Tensor | None = None) -> None:
        self._m1 = m1
        self._m2 = m2
        self._y = y
        self.size = size
        self._image: Tensor | None = None

    @staticmethod
    def of(y: Tensor, bins: tuple[int, int], *, second_moment: bool = True) -> PooledMoments:
        """The moments of any ``[N, C, H, W]`` tensor, by plain PyTorch; y*y is formed only if ``m2`` is asked for.

        Vectors ``[N, C]``, what linear layers give, are maps of one element. ``second_moment=False`` refuses ``m2``,
        and pools y in its own dtype.

        Raises:
            ValueError: y is neither 4-D nor 2-D, or has fewer rows or columns than ``bins``.
        """
        return _DenseMoments(y[:, :, None, None] if y.dim() == 2 else y, bins, second_moment)

    @property
    def m1(self) -> Tensor:
        return self._m1

    @property
    def m2(self) -> Tensor:
        """
        Raises:
            RuntimeError: the head that the moments were made for declared ``second_moment = False``.
        """
        if self._m2 is None:
            raise RuntimeError(_NO_SECOND_MOMENT)
        return self._m2

    @property
    def y(self) -> Tensor:
        """``[N, C, H, W]``, the map itself.

        Raises:
            RuntimeError: the head that the moments were made for declared ``needs_map = False``.
        """
        if self._y is None:
            raise RuntimeError("y was not kept: the head's attribute needs_map is False")
        return self._y

    @property
    def image(self) -> Tensor:
        """``[N, C', H', W']``, the network's image, or what else the stage was given as one.

        Raises:
            RuntimeError: the head that the moments were made for declared ``needs_image = False``.
        """
        if self._image is None:
            raise RuntimeError("the image was not given: the head's attribute needs_image is False")
        return self._image

    @image.setter
    def image(self, image: Tensor) -> None:
        self._image = image

    @property
    def device(self) -> torch.device:
        return self._m1.device

    @property
    def bins(self) -> tuple[int, int]:
        """``(bh, bw)``, the number of cells."""
        rows, columns = self._m1.shape[2:]
        return rows, columns

    @property
    def channels(self) -> int:
        return self._m1.shape[1]

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
        return self.m2 / self._divisor(self.m2)

    @property
    def variance(self) -> Tensor:
        """``[N, C, bh, bw]``, the unbiased variance of y in each cell; 0 in a cell of one element.

        It is a difference of means, and 0, too, where it is no larger than what rounding leaves of a constant y: for
        32x32 elements in float32, where the standard deviation is below 0.8 % of the root mean square.
        """
        mean, second = self.mean, self.second_moment
        area = self._divisor(mean)
        unbiased = area / max(area - 1, 1) if isinstance(area, float) else area / (area - 1).clamp(min=1)
        biased = second - mean * mean
        # Sums of equal numbers are rounded the same way again and again: their error grows with their number, and was
        # seen to reach a third of it. A NaN stays one.
        rounding = torch.finfo(second.dtype).eps * (16 + area / 2)
        return torch.where(biased <= rounding * second, 0.0, biased * unbiased)

    @property
    def std(self) -> Tensor:
        """``[N, C, bh, bw]``, the square root of ``variance``; its gradient is 0, not infinite, where y is constant."""
        variance = self.variance
        constant = variance == 0
        return torch.where(constant, 0.0, torch.where(constant, 1.0, variance).sqrt())

    def over_map(self) -> PooledMoments:
        """Moments of a single cell, the whole map, from those of its cells; ``m2`` must be there.

        The mean of y over the map is taken as the mean of the cells' means, and so is that of y*y: exactly that of all
        elements where cells do not overlap. Where they do, an element counts in each of its cells, so the elements that
        cells share weigh more; the weights are the same for both moments, so the variance is one of weighted elements
        and never negative.
        """
        if self.bins == (1, 1):
            return self
        m1, m2 = self._over_map(self._m1), self._over_map(self.m2)
        return PooledMoments(m1, m2, self.size, self._y)

    def _over_map(self, sums: Tensor) -> Tensor:
        divisor, cells = self._divisor(sums), sums.shape[2] * sums.shape[3]
        if isinstance(divisor, float):  # cells that are alike do not overlap
            return sums.sum((2, 3), keepdim=True)
        return (sums * (self.size[0] * self.size[1] / cells / divisor)).sum((2, 3), keepdim=True)

    def sums(self) -> tuple[Tensor, tuple[int, int]]:
        """Sums over cells, and the ``(H, W)`` of a map that has them: their mean over its cells is ``mean``."""
        return self._m1, self.size

    def mean_linear(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear(mean.flatten(1), weight, bias)``, ``[N, out_features]``, in the dtype of ``weight``.

        The division goes to the weight, and so does the order of the features: the small tensor is rewritten instead of
        one of N samples, forward and backward.
        """
        if weight.dtype not in (torch.float32, torch.float64):  # sums leave the range of float16
            return F.linear(self.mean.flatten(1).to(weight.dtype), weight, bias)
        n, channels, rows, columns = self._m1.shape
        by_cell = weight.unflatten(1, (channels, rows, columns)) / self._divisor(self._m1)
        m1 = self._m1
        if m1.stride(1) == 1:  # channels_last: as it lies in memory
            m1, by_cell = m1.permute(0, 2, 3, 1), by_cell.permute(0, 2, 3, 1)
        return F.linear(m1.reshape(n, -1).to(weight.dtype), by_cell.reshape(weight.shape).to(weight.dtype), bias)

    def _divisor(self, m: Tensor) -> float | Tensor:
        """The cell area; a number where all cells are alike, which saves building a tensor at each step."""
        (height, width), (rows, columns) = self.size, m.shape[2:]
        if height % rows == 0 and width % columns == 0:
            return float((height // rows) * (width // columns))
        return functional.cell_area(self.size, (rows, columns), device=m.device).to(m.dtype)


class _DenseMoments(PooledMoments):
    """Moments of a materialised y; the means come first here and the sums are derived from them."""

    def __init__(self, y: Tensor, bins: tuple[int, int], second_moment: bool) -> None:
        if y.dim() != 4:
            raise ValueError(f"the stage's output has shape {tuple(y.shape)}; moments need [N, C, H, W] or [N, C]")
        if bins[0] > y.shape[2] or bins[1] > y.shape[3]:
            raise ValueError(f"the head pools to {bins} cells but the map is only {tuple(y.shape[2:])}")
        self._y: Tensor = y
        self._image = None
        self._bins = bins
        # A variance is a difference, in which a mean in bfloat16 would be felt. By itself the mean may be rounded: the
        # pool accumulates in float32 and rounds once, at the end.
        self._exact = _accumulated(y) if second_moment else None
        self._mean = _accumulated(F.adaptive_avg_pool2d(y if self._exact is None else self._exact, bins))
        self.size = (y.shape[2], y.shape[3])

    @property
    def m1(self) -> Tensor:
        return self._mean * self._divisor(self._mean)

    @property
    def device(self) -> torch.device:
        return self._mean.device

    @property
    def bins(self) -> tuple[int, int]:
        return self._bins

    @property
    def channels(self) -> int:
        return self._mean.shape[1]

    @property
    def m2(self) -> Tensor:
        second = self.second_moment
        return second * self._divisor(second)

    @property
    def mean(self) -> Tensor:
        return self._mean

    def over_map(self) -> PooledMoments:
        return self if self._bins == (1, 1) else PooledMoments(self.m1, self.m2, self.size, self._y).over_map()

    def sums(self) -> tuple[Tensor, tuple[int, int]]:
        return self._mean, self._bins  # one element per cell

    def mean_linear(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(self._mean.flatten(1).to(weight.dtype), weight, bias)

    @property
    def second_moment(self) -> Tensor:
        if self._exact is None:
            raise RuntimeError(_NO_SECOND_MOMENT)
        return F.adaptive_avg_pool2d(self._exact * self._exact, self._bins)


def _accumulated(x: Tensor) -> Tensor:
    """In the dtype of the moments: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()
