"""Random changes of training images, drawn for each image and made for the whole batch at once.

Each is a callable ``(images [B, C, H, W] uint8 or floating, generator) -> images`` of the same shape, dtype and device,
channels_last. What is drawn comes from the generator, None for torch's global one, on the CPU: images on a GPU are
changed in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise_ext.data.sets import Info


def _rows(images: Tensor) -> Tensor:
    """``[B, H, W, C]``, contiguous."""
    return images.permute(0, 2, 3, 1).contiguous()


def _values(name: str, fill: float | Sequence[float]) -> Tensor:
    """float64, ``[]`` or ``[C]``."""
    values = torch.as_tensor(fill, dtype=torch.float64)
    if values.dim() > 1:
        raise ValueError(f"{name} has shape {list(values.shape)}; allowed: one number, or one per channel")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} is {fill}; it must be finite")
    return values


def _fill(fill: float | Sequence[float], images: Tensor) -> Tensor:
    """As :func:`_values`, rounded for images of integers."""
    values = _values("fill", fill)
    if images.is_floating_point():
        return values
    if bool(((values < 0) | (values > 255)).any()):
        raise ValueError(f"fill is {fill}; allowed for {images.dtype} images: 0 to 255")
    return values.round()


@dataclass(frozen=True)
class RandomCrop:
    """The image after a shift of up to ``padding`` pixels up or down and left or right, all equally likely, as a crop
    of the padded image gives it; ``fill`` comes in."""

    padding: int
    fill: float = 0

    def __post_init__(self) -> None:
        if self.padding < 1:
            raise ValueError(f"padding is {self.padding}; allowed: 1 or more pixels")
        if _values("fill", self.fill).dim() > 0:
            raise ValueError(f"fill is {self.fill}; allowed: one number")

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        count, _, height, width = images.shape
        p, fill = self.padding, float(_fill(self.fill, images))
        offsets = torch.randint(2 * p + 1, (2, count), generator=generator).to(images.device)
        padded = F.pad(_rows(images), (0, 0, p, p, p, p), value=fill)
        crops = padded.unfold(1, height, 1).unfold(2, width, 1)  # all of them: [B, 2p + 1, 2p + 1, C, H, W], a view
        chosen = crops.permute(0, 1, 2, 4, 5, 3)[torch.arange(count, device=images.device), offsets[0], offsets[1]]
        return chosen.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class RandomFlip:
    """Left and right exchanged with this probability."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability is {self.probability}; allowed: 0 to 1")

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        flipped = torch.rand(len(images), generator=generator) < self.probability
        rows = _rows(images)
        both = torch.stack((rows, rows.flip(2)), 1).flatten(0, 1)  # whole images are copied faster than pixels selected
        chosen = 2 * torch.arange(len(images)) + flipped
        return both.index_select(0, chosen.to(images.device)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Cutout:
    """A square of ``size`` pixels around a random pixel takes the value ``fill`` (DeVries & Taylor 2017, arXiv
    1708.04552); what of it lies outside the image is lost. ``fill`` is one number or one per channel; the paper's is
    the mean colour."""

    size: int
    fill: float | Sequence[float] = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; allowed: 1 or more pixels")
        _values("fill", self.fill)

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        count, channels, height, width = images.shape
        fill = _fill(self.fill, images)
        if fill.dim() == 1 and len(fill) != channels:
            raise ValueError(f"fill has {len(fill)} values; allowed: one, or {channels}, the number of channels")
        rows = _rows(images)
        row, column = (self._covered(count, length, generator).to(rows.device) for length in (height, width))
        image = torch.arange(count, device=rows.device)[:, None, None]
        changed = rows.clone()
        changed[image, row[:, :, None], column[:, None, :]] = fill.to(rows)
        return changed.permute(0, 3, 1, 2)

    def _covered(self, count: int, length: int, generator: torch.Generator | None) -> Tensor:
        """Which of ``length`` rows or columns the square covers, ``[count, size]``."""
        first = torch.randint(length, (count, 1), generator=generator) - self.size // 2
        # The centre lies inside, so that a square which reaches over an edge covers the last pixel before it, too.
        return (first + torch.arange(self.size)).clamp(0, length - 1)


@dataclass(frozen=True)
class Augment:
    """Random crop, random flip and cutout, in this order.

    Args:
        crop_padding: of :class:`RandomCrop`, filled with 0, which is black before normalization; 0: none.
        flip: half of the images are flipped from left to right.
        cutout: size of the square in pixels; None: none.
        cutout_fill: the square's value or values per channel, on the images' scale.

    Raises:
        ValueError: a number out of range.
    """

    crop_padding: int = 4
    flip: bool = True
    cutout: int | None = None
    cutout_fill: float | Sequence[float] = 0

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding is {self.crop_padding}; allowed: 0 or more pixels")
        if self.cutout is not None and self.cutout < 1:
            raise ValueError(f"cutout is {self.cutout}; allowed: 1 or more pixels, None")
        _values("cutout_fill", self.cutout_fill)

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if self.crop_padding:
            images = RandomCrop(self.crop_padding)(images, generator)
        if self.flip:
            images = RandomFlip()(images, generator)
        if self.cutout is not None:
            images = Cutout(self.cutout, self.cutout_fill)(images, generator)
        return images


def standard_augment(info: Info, *, cutout: int | None = None, cutout_fill: float | Sequence[float] = 0) -> Augment:
    """The usual augmentation of a data set, such as a crop from 4 pixels of padding and a flip for CIFAR; for some,
    nothing (``docs/data.md``)."""
    return Augment(info.crop_padding, info.flip, cutout, cutout_fill)
