"""Batches: the loader, augmentation against loops over images, classes per batch, subsets, resumed runs."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layerwise_ext import data
from layerwise_ext.models import vgg
from layerwise_ext.train import GreedyTrainer, LabelledPairs, LocalTrainer, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


def images_of(count: int, channels: int = 3, size: tuple[int, int] = (7, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(1, 256, (count, channels, *size), dtype=torch.uint8, generator=generator)  # 0 is the fill


def random_split(count: int, classes: int = 4, **options: Any) -> data.Split:
    generator = torch.Generator().manual_seed(1)
    return data.Split(images_of(count, **options), torch.randint(classes, (count,), generator=generator))


# -- The loader --------------------------------------------------------------------------------------------------------


def test_loader_gives_each_image_once_in_a_new_order() -> None:
    split = data.Split(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 4, 4), torch.arange(10))
    normalization = data.Normalization.of(split.images)
    loader = data.MemoryLoader(split, 4, normalization, shuffle=True, seed=1)
    epochs = [torch.cat([labels for _, labels in loader]).tolist() for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert len(loader) == 3
    for images, labels in loader:
        expected = (labels.float() / 255 - normalization.mean[0]) / normalization.std[0]
        torch.testing.assert_close(images[:, 1, 2, 2], expected)
        assert images.is_contiguous(memory_format=torch.channels_last)
    again = data.MemoryLoader(split, 4, normalization, shuffle=True, seed=1)
    assert torch.cat([labels for _, labels in again]).tolist() == epochs[0]
    dropping = data.MemoryLoader(split, 4, normalization, drop_last=True)
    assert [len(labels) for _, labels in dropping] == [4, 4]
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"batch size is {size}; allowed: 1 to 10"):
            data.MemoryLoader(split, size, normalization)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalized_images_have_mean_zero_and_deviation_one(channels: int) -> None:
    images = images_of(20, channels)
    normalization = data.Normalization.of(images)
    for layout in (torch.contiguous_format, torch.channels_last):
        normalized = normalization.apply(images.contiguous(memory_format=layout))
        assert normalized.is_contiguous(memory_format=torch.channels_last)
        expected = images.double() / 255
        expected = (expected - expected.mean((0, 2, 3), keepdim=True)) / expected.std((0, 2, 3), keepdim=True)
        torch.testing.assert_close(normalized.double(), expected, rtol=0, atol=1e-5)
    flat = data.Normalization.of(torch.full((2, 1, 2, 2), 9, dtype=torch.uint8))
    assert flat.apply(torch.full((1, 1, 2, 2), 9, dtype=torch.uint8)).abs().max() < 1e-3


def test_the_loader_keeps_bytes() -> None:
    split = random_split(8)
    loader = data.MemoryLoader(split, 3, data.Normalization.of(split.images))
    assert loader.images.dtype == torch.uint8
    images, labels = next(iter(loader))
    torch.testing.assert_close(images, loader.normalization.apply(split.images[:3]))
    assert labels.tolist() == split.labels[:3].tolist()


# -- Augmentation ------------------------------------------------------------------------------------------------------


def crop_loop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Image by image, with the draws of RandomCrop(2, fill=9)."""
    offsets = torch.randint(5, (2, len(images)), generator=generator)
    out = torch.empty_like(images)
    for image, top, left, result in zip(images, *offsets.tolist(), out, strict=True):
        padded = torch.full((image.shape[0], image.shape[1] + 4, image.shape[2] + 4), 9, dtype=image.dtype)
        padded[:, 2:-2, 2:-2] = image
        result.copy_(padded[:, top : top + image.shape[1], left : left + image.shape[2]])
    return out


def flip_loop(images: Tensor, generator: torch.Generator) -> Tensor:
    flipped = torch.rand(len(images), generator=generator) < 0.3
    return torch.stack([image.flip(2) if f else image for image, f in zip(images, flipped.tolist(), strict=True)])


def cutout_loop(size: int) -> Callable[[Tensor, torch.Generator], Tensor]:
    def loop(images: Tensor, generator: torch.Generator) -> Tensor:
        height, width = images.shape[2:]
        rows = torch.randint(height, (len(images), 1), generator=generator).flatten().tolist()
        columns = torch.randint(width, (len(images), 1), generator=generator).flatten().tolist()
        out = images.clone()
        for image, row, column in zip(out, rows, columns, strict=True):
            top, left = row - size // 2, column - size // 2
            for channel, value in enumerate((50, 60, 70)):
                image[channel, max(0, top) : max(0, top + size), max(0, left) : max(0, left + size)] = value
        return out

    return loop


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("augment", "loop"),
    [
        (data.RandomCrop(2, fill=9), crop_loop),
        (data.RandomFlip(0.3), flip_loop),
        (data.Cutout(3, fill=(50, 59.8, 70)), cutout_loop(3)),
        (data.Cutout(4, fill=(50, 59.8, 70)), cutout_loop(4)),
        (data.Cutout(30, fill=(50, 59.8, 70)), cutout_loop(30)),
    ],
)
def test_augmentation_equals_a_loop_over_images(
    augment: Any, loop: Any, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    images = images_of(40).to(dtype).contiguous(memory_format=layout)
    before = images.clone()
    if isinstance(augment, data.Cutout) and dtype != torch.uint8:
        augment = data.Cutout(augment.size, fill=(50, 60, 70))
    result = augment(images, torch.Generator().manual_seed(5))
    assert torch.equal(result, loop(images, torch.Generator().manual_seed(5)))
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    assert not torch.equal(result, before)


def test_all_shifts_are_drawn_and_centres_of_squares_are_everywhere() -> None:
    dot = torch.zeros(2000, 1, 9, 9, dtype=torch.uint8)
    dot[:, :, 4, 4] = 1
    generator = torch.Generator().manual_seed(0)
    where = data.RandomCrop(2)(dot, generator)[:, 0].sum(0)
    assert int(where.sum()) == 2000
    assert (where[2:7, 2:7] > 2000 / 25 / 2).all()
    covered = data.Cutout(1, fill=1)(torch.zeros(8100, 1, 9, 9), generator)[:, 0].sum(0)
    assert covered.min() > 60 and covered.max() < 140
    flipped = data.RandomFlip()(torch.tensor([1, 0], dtype=torch.uint8).expand(1000, 1, 1, 2), generator)
    assert 430 < int(flipped[:, 0, 0, 1].sum()) < 570


def test_augment_composes() -> None:
    images = images_of(30)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    expected = images
    for part in (data.RandomCrop(4), data.RandomFlip(), data.Cutout(2, fill=7)):
        expected = part(expected, generators[1])
    assert torch.equal(data.Augment(cutout=2, cutout_fill=7)(images, generators[0]), expected)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert data.Augment(0, False)(images) is images
    assert data.standard_augment(data.info("cifar10"), cutout=8) == data.Augment(4, True, 8)
    assert data.standard_augment(data.info("svhn")) == data.Augment(0, False)
    torch.manual_seed(0)
    first = data.Augment()(images)
    torch.manual_seed(0)
    assert torch.equal(data.Augment()(images), first)


def test_augmentation_that_is_refused() -> None:
    for make, message in [
        (lambda: data.RandomCrop(0), "padding is 0; allowed: 1 or more"),
        (lambda: data.RandomFlip(1.5), "probability is 1.5; allowed: 0 to 1"),
        (lambda: data.Cutout(0), "size is 0; allowed: 1 or more"),
        (lambda: data.Augment(-1), "crop_padding is -1; allowed: 0 or more"),
        (lambda: data.Augment(cutout=0), "cutout is 0; allowed: 1 or more pixels, None"),
        (lambda: data.Cutout(1, fill=(1, 2))(images_of(2)), "fill has 2 values; allowed: one, or 3"),
        (lambda: data.Cutout(1, fill=(1, 2, 256))(images_of(2)), "allowed for torch.uint8 images: 0 to 255"),
        (lambda: data.Cutout(1, fill=math.nan), "fill is nan; it must be finite"),
        (lambda: data.Cutout(1, fill=[[1.0]]), r"fill has shape \[1, 1\]; allowed: one number, or one per channel"),
        (lambda: data.RandomCrop(1, -1)(images_of(2)), "fill is -1; allowed for torch.uint8 images: 0 to 255"),
        (lambda: data.RandomCrop(1, math.inf), "fill is inf; it must be finite"),
        (lambda: data.Augment(cutout_fill=math.nan), "cutout_fill is nan; it must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_the_loader_augments_before_it_normalizes() -> None:
    split = random_split(12)
    normalization = data.Normalization.of(split.images)
    loader = data.MemoryLoader(split, 5, normalization, shuffle=True, augment=data.Augment(2, True, 3), seed=3)
    generator = torch.Generator().manual_seed(3)
    seen = []
    for _ in range(2):
        order = torch.randperm(12, generator=generator)
        for (images, labels), chosen in zip(loader, order.split(5), strict=True):
            changed = data.Augment(2, True, 3)(split.images[chosen], generator)
            assert torch.equal(images, normalization.apply(changed))
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(labels, split.labels[chosen])
        seen.append(images)
    assert not torch.equal(*seen)


# -- Classes per batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "batch_size", "classes", "batches"),
    [
        ([20] * 10, 20, 5, 10),  # everything is used
        ([20] * 10, 10, 10, 20),
        ([20] * 10, 4, 1, 50),
        ([30, 0, 30, 30], 6, 2, 15),  # a class without images
        ([100, 10, 10, 10], 4, 2, 15),  # the first class is in every batch, and most of it is left over
        ([17, 23, 9, 31, 5], 7, 3, 8),  # quotas 3, 2, 2
        ([5, 5, 1], 8, 2, 1),
    ],
)
def test_classes_per_batch(counts: list[int], batch_size: int, classes: int, batches: int) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    sampler = data.ClassBatchSampler(labels, batch_size, classes, generator=torch.Generator().manual_seed(1))
    assert len(sampler) == batches
    epochs = [list(sampler) for _ in range(20)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [batch_size] * batches
        used = [index for batch in epoch for index in batch]
        assert len(set(used)) == len(used)
        for batch in epoch:
            present = torch.bincount(labels[batch])
            present = present[present > 0]
            assert len(present) == classes
            assert int(present.max() - present.min()) <= (batch_size % classes > 0)
    assert epochs[0] != epochs[1]
    again = data.ClassBatchSampler(labels, batch_size, classes, generator=torch.Generator().manual_seed(1))
    assert [list(again), list(again)] == epochs[:2]


def test_epochs_end_when_no_further_batch_can_be_filled() -> None:
    """Against all ways of taking classes one after another, for many small sets."""

    def longest(shares: tuple[int, ...], classes: int) -> int:
        shares = tuple(sorted(shares, reverse=True))
        if classes > len(shares) or shares[classes - 1] == 0:
            return 0
        return 1 + longest(tuple(s - (i < classes) for i, s in enumerate(shares)), classes)

    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        shares = torch.randint(1, 9, (5,), generator=generator)
        classes = int(torch.randint(1, 6, (1,), generator=generator))
        labels = torch.arange(5).repeat_interleave(2 * shares)
        sampler = data.ClassBatchSampler(labels, 2 * classes, classes, generator=generator)
        assert len(sampler) == longest(tuple(shares.tolist()), classes) == len(list(sampler))


def test_classes_meet_by_chance() -> None:
    labels = torch.arange(10).repeat_interleave(40)
    sampler = data.ClassBatchSampler(labels, 8, 2, generator=torch.Generator().manual_seed(0))
    pairs = torch.zeros(10, 10)
    positions = torch.zeros(10, 8)
    for _ in range(40):
        for batch in sampler.epoch():
            first, second = labels[batch].unique().tolist()
            pairs[first, second] += 1
            positions[labels[batch], torch.arange(8)] += 1
    above = pairs[torch.ones(10, 10).triu(1).bool()]
    assert int(above.sum()) == 40 * 50
    assert above.min() > 20 and above.max() < 75  # 44 on average
    assert positions.min() > 130 and positions.max() < 270  # 200 on average: no class comes first


def test_images_meet_by_chance() -> None:
    sampler = data.ClassBatchSampler(torch.zeros(20, dtype=torch.int64), 4, 1)
    first, second = ({frozenset(batch) for batch in sampler} for _ in range(2))
    assert first != second
    labels = torch.arange(4).repeat_interleave(torch.tensor([200, 20, 20, 20]))
    sampler = data.ClassBatchSampler(labels, 5, 2, generator=torch.Generator().manual_seed(0))
    batches = labels[torch.cat([sampler.epoch() for _ in range(20)])]
    larger = (batches == 0).sum(1) == 3
    assert 0.4 < larger.double().mean() < 0.6  # the class that is in every batch is not always the larger half of it
    assert (batches.diff(dim=1) != 0).sum(1).max() > 1  # classes are mixed


def test_classes_per_batch_that_are_refused() -> None:
    labels = torch.arange(4).repeat_interleave(5)
    for make, message in [
        (lambda: data.ClassBatchSampler(labels, 8, 5), "classes_per_batch is 5; allowed: 1 to 4"),
        (lambda: data.ClassBatchSampler(labels, 8, 0), "classes_per_batch is 0; allowed: 1 to 4"),
        (lambda: data.ClassBatchSampler(labels, 2, 3), "batch size is 2; allowed: 3, classes_per_batch, or more"),
        (lambda: data.ClassBatchSampler(labels, 12, 2), "fewer than 2 classes have 6 images"),
        (lambda: data.ClassBatchSampler(labels - 1, 8, 2), "has -1, images without a label"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    split = random_split(12)
    with pytest.raises(ValueError, match="classes_per_batch is 2 with shuffle=False"):
        data.MemoryLoader(split, 4, data.Normalization.of(split.images), classes_per_batch=2)


def test_splits_that_are_refused() -> None:
    split = random_split(12)
    normalization = data.Normalization.of(split.images)
    with pytest.raises(ValueError, match="split has 12 images and 11 labels"):
        data.MemoryLoader(data.Split(split.images, split.labels[1:]), 4, normalization)
    with pytest.raises(TypeError, match=r"split\.images is torch\.float32; allowed: torch\.uint8"):
        data.MemoryLoader(data.Split(split.images.float(), split.labels), 4, normalization)


def test_loaders_with_classes_per_batch() -> None:
    split = random_split(60, classes=6)
    normalization = data.Normalization.of(split.images)
    loader = data.MemoryLoader(split, 6, normalization, shuffle=True, classes_per_batch=3)
    batches = list(loader)
    assert len(batches) == len(loader) > 5
    for images, labels in batches:
        assert len(labels.unique()) == 3
        for image, label in zip(images, labels, strict=True):
            same = (normalization.apply(split.images) == image).flatten(1).all(1)
            assert split.labels[same].tolist() == [int(label)]
    sampler = data.ClassBatchSampler(split.labels, 6, 3)
    assert all(len(labels.unique()) == 3 for _, labels in DataLoader(TensorDataset(*split), batch_sampler=sampler))


# -- Subsets -----------------------------------------------------------------------------------------------------------


def test_subsets_have_as_many_of_each_class_and_grow() -> None:
    split = random_split(200)
    small, large = (data.subset(split, per_class=n, seed=5) for n in (3, 20))
    assert torch.bincount(small.labels).tolist() == [3] * 4
    assert torch.bincount(large.labels).tolist() == [20] * 4

    def places(part: data.Split) -> list[int]:
        return [int((split.images == image).flatten(1).all(1).nonzero()) for image in part.images]

    assert places(small) == sorted(places(small))
    assert set(places(small)) < set(places(large))
    assert torch.equal(split.labels[places(large)], large.labels)
    assert places(data.subset(split, per_class=3, seed=5)) == places(small)
    assert places(data.subset(split, per_class=3, seed=6)) != places(small)
    least = int(torch.bincount(split.labels).min())
    label = int(torch.bincount(split.labels).argmin())
    with pytest.raises(ValueError, match=f"per_class is {least + 1}, but class {label} has {least} images"):
        data.subset(split, per_class=least + 1)
    with pytest.raises(ValueError, match="per_class is 0; allowed: 1 or more"):
        data.subset(split, per_class=0)
    with pytest.raises(ValueError, match="images without a label"):
        data.subset(data.Split(split.images, torch.full((200,), -1)), per_class=1)


def test_a_share_of_each_class_is_held_out() -> None:
    split = random_split(200)
    rest, held = data.hold_out(split, 0.25, seed=5)
    counts = torch.bincount(split.labels)
    assert torch.bincount(held.labels).tolist() == [round(0.25 * count) for count in counts.tolist()]

    def places(part: data.Split) -> list[int]:
        return [int((split.images == image).flatten(1).all(1).nonzero()) for image in part.images]

    assert places(held) == sorted(places(held)) and places(rest) == sorted(places(rest))
    assert sorted(places(rest) + places(held)) == list(range(200))
    assert torch.equal(split.labels[places(held)], held.labels) and torch.equal(split.labels[places(rest)], rest.labels)
    assert places(data.hold_out(split, 0.25, seed=5)[1]) == places(held)
    assert places(data.hold_out(split, 0.25, seed=6)[1]) != places(held)
    assert torch.bincount(data.hold_out(split, 0.999)[0].labels).tolist() == [1] * 4
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match=f"fraction is {fraction}; allowed: above 0 and below 1"):
            data.hold_out(split, fraction)
    with pytest.raises(ValueError, match="less than half an image of each class"):
        data.hold_out(split, 0.001)


# -- Resuming ----------------------------------------------------------------------------------------------------------


def memory_loader() -> data.MemoryLoader:
    split = random_split(60, channels=1, size=(8, 8))
    options = {"shuffle": True, "augment": data.Augment(2, True, 3), "classes_per_batch": 2}
    return data.MemoryLoader(split, 8, data.Normalization.of(split.images), **options, seed=1)


def torch_loader() -> DataLoader:
    split = random_split(60, channels=1, size=(8, 8))
    sampler = data.ClassBatchSampler(split.labels, 8, 2, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(split.images.float() / 255, split.labels), batch_sampler=sampler)


def pairs_of_a_loader() -> LabelledPairs:
    return LabelledPairs(memory_loader(), 4, seed=2)


@pytest.mark.parametrize("make_loader", [memory_loader, torch_loader, pairs_of_a_loader])
@pytest.mark.parametrize(("kind", "stop"), [(LocalTrainer, 1), (GreedyTrainer, 1), (GreedyTrainer, 3)])
def test_a_resumed_run_is_bit_identical(kind: type[Trainer], stop: int, make_loader: Callable[[], Any]) -> None:
    class Stop(Exception):
        pass

    file = io.BytesIO()

    def interrupt(trainer: Trainer, record: dict[str, Any]) -> None:
        if trainer.epoch == stop:
            torch.save(trainer.state_dict(), file)
            raise Stop

    def trainer() -> Trainer:
        head = "goodness" if make_loader is pairs_of_a_loader else "pooled_linear"
        model = vgg([4, "M", 6], in_channels=1, num_classes=4, image_size=(8, 8), hidden=None, head=head, seed=0)
        return kind(model, progress=False, seed=0)

    straight, first, second = trainer(), trainer(), trainer()
    straight.fit(make_loader(), 2)
    with pytest.raises(Stop):
        first.fit(make_loader(), 2, on_epoch_end=interrupt)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.fit(make_loader(), 2)
    for mine, theirs in zip(second.stages, straight.stages, strict=True):
        expected = theirs.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in mine.state_dict().items())
