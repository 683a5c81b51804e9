"""Data files: what is read, and what is refused with which words. All files are made here."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from layerwise_ext import data


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, gzipped: bool, images: int = 6, labels: int = 6, dot: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        for kind, array in (
            ("images-idx3-ubyte", generator.integers(0, 256, (images, 5, 4), np.uint8)),
            ("labels-idx1-ubyte", np.arange(labels, dtype=np.uint8)),
        ):
            name = f"{prefix}-{kind.replace('-idx', '.idx') if dot else kind}"
            content = idx(array)
            (folder / (name + ".gz" * gzipped)).write_bytes(gzip.compress(content) if gzipped else content)


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("folder", [".", "fashion_mnist", "FashionMNIST/raw"])
def test_idx_layouts(tmp_path: Path, folder: str, gzipped: bool) -> None:
    write_idx(tmp_path / folder, gzipped)
    images, labels = data.load("fashion-mnist", tmp_path)
    assert images.shape == (6, 1, 5, 4)
    assert images.dtype == torch.uint8
    assert labels.tolist() == list(range(6))
    expected = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
    assert np.array_equal(images[:, 0].numpy(), expected)
    assert len(data.load("fashion-mnist", tmp_path, "test").labels) == 6


def test_names_with_a_dot(tmp_path: Path) -> None:
    write_idx(tmp_path, gzipped=False, dot=True)
    assert len(data.load("mnist", tmp_path).labels) == 6


def test_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path, gzipped=True)
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path))
    assert len(data.load("mnist").labels) == 6
    monkeypatch.delenv("LAYERWISE_DATA")
    with pytest.raises(data.DataError, match="--data-dir or LAYERWISE_DATA"):
        data.load("mnist")


@pytest.mark.parametrize("keep", [0, 3, 10, 16, 17, -1])
def test_truncated_idx(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "images"
    path.write_bytes(idx(np.zeros((2, 3, 3), np.uint8))[:keep])
    with pytest.raises(data.DataError, match=r"images: .*(shorter than|after the header)"):
        data.read_idx(path, 3)


def test_damaged_idx(tmp_path: Path) -> None:
    good = idx(np.zeros((2, 3, 3), np.uint8))
    path = tmp_path / "images"
    path.write_bytes(good + b"x")
    with pytest.raises(data.DataError, match=r"19 bytes after the header, which announces \(2, 3, 3\): 18 bytes"):
        data.read_idx(path, 3)
    with pytest.raises(data.DataError, match=r"begins with 00 00 08 03; .* 1 dimensions begins with 00 00 08 01"):
        data.read_idx(path, 1)
    path.write_bytes(b"\x00\x00\x0d\x03" + good[4:])
    with pytest.raises(data.DataError, match="begins with 00 00 0d 03"):
        data.read_idx(path, 3)


@pytest.mark.parametrize("damage", ["cut", "not gzip", "flipped"])
def test_damaged_gzip(tmp_path: Path, damage: str) -> None:
    content = gzip.compress(idx(np.random.default_rng(0).integers(0, 9, (2, 30, 30), np.uint8)))
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    path = tmp_path / "images.gz"
    path.write_bytes({"cut": content[:-20], "not gzip": b"hello, world", "flipped": flipped}[damage])
    with pytest.raises(data.DataError, match=r"images\.gz: not a complete gzip file"):
        data.read_idx(path, 3)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="no such folder"):
        data.load("mnist", tmp_path / "nowhere")
    with pytest.raises(data.DataError, match=r"train-images-idx3-ubyte.* was not found; looked for .*MNIST/raw"):
        data.load("mnist", tmp_path)
    with pytest.raises(data.DataError, match=r"data_batch_1\.bin was not found.*cifar-10-batches-bin"):
        data.load("cifar10", tmp_path)


def test_counts_and_labels_must_fit(tmp_path: Path) -> None:
    write_idx(tmp_path / "a", gzipped=False, images=6, labels=5)
    with pytest.raises(data.DataError, match=r"6 images, but .* has 5 labels"):
        data.load("mnist", tmp_path / "a")
    write_idx(tmp_path / "b", gzipped=False, images=12, labels=12)
    with pytest.raises(data.DataError, match="label 11 of image 11; labels are 0 to 9"):
        data.load("mnist", tmp_path / "b")


def cifar_records(labels: list[int]) -> bytes:
    return b"".join(
        bytes([label]) + bytes([label]) * 1024 + bytes([100]) * 1024 + bytes([200]) * 1024 for label in labels
    )


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-bin"])
def test_cifar10(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    for i in range(1, 6):
        (tmp_path / folder / f"data_batch_{i}.bin").write_bytes(cifar_records([i, i + 1]))
    (tmp_path / folder / "test_batch.bin").write_bytes(cifar_records([9]))
    images, labels = data.load("cifar10", tmp_path)
    assert labels.tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert images.shape == (10, 3, 32, 32)
    assert images[4, :, 7, 9].tolist() == [3, 100, 200]
    assert data.load("cifar10", tmp_path, "test").labels.tolist() == [9]


@pytest.mark.parametrize(("content", "message"), [
    (b"", "0 bytes, not a positive multiple of 3073"),
    (cifar_records([1])[:-1], "3072 bytes, not a positive multiple"),
    (cifar_records([1, 10]), "label 10 of image 1; labels are 0 to 9"),
])  # fmt: skip
def test_damaged_cifar10(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(data.DataError, match=rf"test_batch\.bin: {message}"):
        data.load("cifar10", tmp_path, "test")


def test_digits_are_split_alike_each_time() -> None:
    train, test = data.load("digits"), data.load("digits", split="test")
    assert len(train.labels) + len(test.labels) == 1797
    assert train.images.shape[1:] == (1, 8, 8)
    assert int(train.images.max()) == 255
    assert torch.bincount(test.labels).min() >= 34  # stratified
    assert torch.equal(data.load("digits").images, train.images)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="data is 'imagenet'; allowed: digits"):
        data.load("imagenet")
    with pytest.raises(ValueError, match="split is 'validation'"):
        data.load("digits", split="validation")


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
    torch.testing.assert_close(loader.images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    again = data.MemoryLoader(split, 4, normalization, shuffle=True, seed=1)
    assert torch.cat([labels for _, labels in again]).tolist() == epochs[0]
    dropping = data.MemoryLoader(split, 4, normalization, drop_last=True)
    assert [len(labels) for _, labels in dropping] == [4, 4]
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"batch size is {size}; allowed: 1 to 10"):
            data.MemoryLoader(split, size, normalization)
