"""Data files: what is read, and what is refused with which words. All files are made here."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from layerwise_ext import data
from PIL import Image


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


def test_a_folder_of_the_set_s_own_comes_first(tmp_path: Path) -> None:
    """MNIST, Fashion-MNIST and KMNIST have files of the same names."""
    write_idx(tmp_path, gzipped=False)
    own = tmp_path / "FashionMNIST" / "raw"
    write_idx(own, gzipped=False, images=4, labels=4)
    assert len(data.load("fashion-mnist", tmp_path).labels) == 4
    assert len(data.load("mnist", tmp_path).labels) == 6
    (own / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(data.DataError, match=r"train-labels-idx1-ubyte.* was not found; looked for .*FashionMNIST/raw"):
        data.load("fashion-mnist", tmp_path)  # not the labels of another set


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
    with pytest.raises(data.DataError, match="label 10 of image 10; labels are 0 to 9"):
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


def cifar100_records(labels: list[tuple[int, int]]) -> bytes:
    return b"".join(bytes(pair) + cifar_records([pair[1]])[1:] for pair in labels)


@pytest.mark.parametrize("folder", [".", "cifar-100-binary"])
def test_cifar100(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "train.bin").write_bytes(cifar100_records([(3, 42), (19, 99)]))
    (tmp_path / folder / "test.bin").write_bytes(cifar100_records([(0, 7)]))
    images, labels = data.load("cifar100", tmp_path)
    assert labels.tolist() == [42, 99]
    assert images.shape == (2, 3, 32, 32)
    assert images[:, :, 31, 0].tolist() == [[42, 100, 200], [99, 100, 200]]
    assert data.load("cifar100-coarse", tmp_path).labels.tolist() == [3, 19]
    assert data.load("cifar100", tmp_path, "test").labels.tolist() == [7]


@pytest.mark.parametrize(("content", "message"), [
    (cifar100_records([(1, 2)])[:-1], "3073 bytes, not a positive multiple of 3074"),
    (cifar100_records([(1, 2), (20, 3)]), "label 20 of image 1; labels are 0 to 19"),
    (cifar100_records([(1, 100)]), "label 100 of image 0; labels are 0 to 99"),
])  # fmt: skip
def test_damaged_cifar100(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    for name in ("cifar100", "cifar100-coarse"):
        with pytest.raises(data.DataError, match=rf"train\.bin: {message}"):
            data.load(name, tmp_path)


# -- SVHN and STL-10 ---------------------------------------------------------------------------------------------------


def write_svhn(path: Path, labels: list[int], **changes: np.ndarray) -> np.ndarray:
    images = np.random.default_rng(len(labels)).integers(0, 256, (32, 32, 3, len(labels)), np.uint8)
    content = {"X": images, "y": np.array(labels, np.uint8)[:, None], **changes}
    scipy.io.savemat(path, {name: array for name, array in content.items() if array is not None}, do_compression=True)
    return images


@pytest.mark.parametrize("folder", [".", "SVHN"])
def test_svhn(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    for split, given, expected in (("train", [1, 10, 9], [1, 0, 9]), ("test", [10, 2], [0, 2]), ("extra", [5], [5])):
        stored = write_svhn(tmp_path / folder / f"{split}_32x32.mat", given)
        images, labels = data.load("svhn", tmp_path, split)
        assert labels.tolist() == expected
        assert images.dtype == torch.uint8
        assert images[-1, 2, 30, 4] == stored[30, 4, 2, -1]
        assert np.array_equal(images.permute(2, 3, 1, 0).numpy(), stored)


@pytest.mark.parametrize(("labels", "changes", "message"), [
    ([1, 11], {}, "label 11 of image 1; labels are 1 to 10"),
    ([0, 1], {}, "label 0 of image 0; labels are 1 to 10"),
    ([1, 2], {"y": np.array([[1], [2], [3]], np.uint8)}, r"2 images, but .* has 3 labels"),
    ([1, 2], {"X": None}, r"has no variable X; uint8 \[32, 32, 3, N\] was expected"),
    ([1, 2], {"X": np.zeros((2, 3, 32, 32), np.uint8)}, r"X is uint8 \[2, 3, 32, 32\]; uint8 \[32, 32, 3, N\]"),
    ([1, 2], {"X": np.zeros((32, 32, 3, 2))}, r"X is float64 \[32, 32, 3, 2\]; uint8"),
    ([1, 2], {"y": np.array([[0.5], [1]])}, r"y is float64 \[2, 1\]; integers \[N, 1\] was expected"),
])  # fmt: skip
def test_damaged_svhn(tmp_path: Path, labels: list[int], changes: dict[str, np.ndarray], message: str) -> None:
    write_svhn(tmp_path / "test_32x32.mat", labels, **changes)
    with pytest.raises(data.DataError, match=rf"test_32x32\.mat: {message}"):
        data.load("svhn", tmp_path, "test")


@pytest.mark.parametrize("keep", [0, 100, 200, -500])
def test_truncated_svhn(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "train_32x32.mat"
    write_svhn(path, [1, 2])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(data.DataError, match=r"train_32x32\.mat: (not a complete MATLAB file|has no variable X)"):
        data.load("svhn", tmp_path)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy.io", "PIL", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(data.DataError, match=r"read by scipy: pip install 'layerwise_ext\[data\]'"):
        data.read_svhn(tmp_path / "train_32x32.mat")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").touch()
    with pytest.raises(data.DataError, match=r"decoded by Pillow: pip install 'layerwise_ext\[data\]'"):
        data.read_image_folder(tmp_path, 8)
    with pytest.raises(data.DataError, match="fetched by torchvision, which is not installed"):
        data.download("mnist", tmp_path)


def write_stl10(folder: Path, labels: list[int], images: int | None = None) -> np.ndarray:
    """What the images should look like, [N, 3, 96, 96]."""
    folder.mkdir(exist_ok=True)
    wanted = np.random.default_rng(0).integers(0, 256, (images or len(labels), 3, 96, 96), np.uint8)
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(b"".join(channel.T.tobytes() for image in wanted for channel in image))
        (folder / f"{split}_y.bin").write_bytes(bytes(labels))
    return wanted


@pytest.mark.parametrize("folder", [".", "stl10_binary"])
def test_stl10(tmp_path: Path, folder: str) -> None:
    wanted = write_stl10(tmp_path / folder, [10, 1, 5])
    for split in ("train", "test"):
        images, labels = data.load("stl10", tmp_path, split)
        assert labels.tolist() == [9, 0, 4]
        assert np.array_equal(images.numpy(), wanted)
    (tmp_path / folder / "unlabeled_X.bin").write_bytes((tmp_path / folder / "test_X.bin").read_bytes())
    images, labels = data.load("stl10", tmp_path, "unlabeled")
    assert labels.tolist() == [-1] * 3
    assert labels.dtype == torch.int64
    assert np.array_equal(images.numpy(), wanted)


def test_damaged_stl10(tmp_path: Path) -> None:
    for number, (labels, images, message) in enumerate([
        ([1, 2, 11], 3, r"train_y\.bin: label 11 of image 2; labels are 1 to 10"),
        ([1, 0], 2, r"train_y\.bin: label 0 of image 1"),
        ([1, 2], 1, r"train_X\.bin: 1 images, but .*train_y\.bin has 2 labels"),
    ]):  # fmt: skip
        write_stl10(tmp_path / str(number), labels, images)
        with pytest.raises(data.DataError, match=message):
            data.load("stl10", tmp_path / str(number))
    path = tmp_path / "0" / "train_X.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(data.DataError, match=r"train_X\.bin: 82943 bytes, not a positive multiple of 27648"):
        data.load("stl10", tmp_path / "0")


# -- Image files -------------------------------------------------------------------------------------------------------


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    """``size`` is (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], colour).convert(mode).save(path)


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def write_folders(folder: Path) -> None:
    write_image(folder / "train" / "cat" / "b.png", GREEN)
    write_image(folder / "train" / "cat" / "a.jpeg", GREEN)
    write_image(folder / "train" / "Bear" / "deep" / "x.PNG", RED, (16, 24))
    write_image(folder / "train" / "dog" / "1.bmp", BLUE, mode="P")
    (folder / "train" / "dog" / "notes.txt").write_text("no image")
    (folder / "train" / ".hidden").mkdir()
    write_image(folder / "test" / "dog" / "1.png", BLUE, mode="L")


def test_image_folder(tmp_path: Path) -> None:
    write_folders(tmp_path)
    assert data.image_folder_classes(tmp_path / "train") == ("Bear", "cat", "dog")
    images, labels = data.load("image-folder", tmp_path, image_size=4)
    assert images.shape == (4, 3, 4, 4) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 1, 1, 2]
    for image, colour in zip(images, (RED, GREEN, GREEN, BLUE), strict=True):
        assert (image.flatten(1).T.int() - torch.tensor(colour)).abs().max() <= 2  # JPEG
    images, labels = data.load("image-folder", tmp_path, "test", image_size=(6, 5))
    assert images.shape == (1, 3, 6, 5)
    assert labels.tolist() == [2]  # counted as in the training part
    (tmp_path / "test").rename(tmp_path / "val")
    assert len(data.load("image-folder", tmp_path, "test", image_size=4).labels) == 1
    assert data.info("image-folder", tmp_path, image_size=16) == data.Info(3, 3, (16, 16), crop_padding=2, flip=True)


def test_images_are_cut_to_their_middle_and_resized(tmp_path: Path) -> None:
    picture = np.zeros((8, 16, 3), np.uint8)
    picture[:, 4:8] = 100
    picture[:, 8:12] = 200
    (tmp_path / "a").mkdir()
    Image.fromarray(picture).save(tmp_path / "a" / "x.png")
    grey = data.read_image_folder(tmp_path, 8, channels=1)
    assert grey.images[0, 0].tolist() == [[100] * 4 + [200] * 4] * 8
    whole = data.read_image_folder(tmp_path, (8, 16))
    assert np.array_equal(whole.images[0].permute(1, 2, 0).numpy(), picture)
    half = data.read_image_folder(tmp_path, (4, 8)).images[0, 0]
    assert half[:, [0, 2, 5, 6]].tolist() == [[0, 88, 175, 25]] * 4  # the filter is a triangle over 4 pixels


@pytest.mark.parametrize(("dtype", "name"), [(np.uint16, "a.png"), (np.int32, "a.tif"), (np.float32, "a.tiff")])
def test_images_of_more_than_8_bits_are_refused(tmp_path: Path, dtype: type, name: str) -> None:
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.full((4, 4), 300, dtype)).save(tmp_path / "cat" / name)
    with pytest.raises(data.DataError, match=rf"{name}: its mode is [IF].*; images of 8 bits per channel are read"):
        data.read_image_folder(tmp_path, 4)


def test_image_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"no folder train; train and test, each with a folder per class"):
        data.load("image-folder", tmp_path, image_size=4)
    write_folders(tmp_path)
    with pytest.raises(data.DataError, match=r"4 images of 3x64x32 take 0\.0 MiB.*choose a smaller image_size"):
        data.read_image_folder(tmp_path / "train", (64, 32), limit_bytes=4 * 3 * 64 * 32 - 1)
    assert len(data.read_image_folder(tmp_path / "train", (64, 32), limit_bytes=4 * 3 * 64 * 32).labels) == 4
    with pytest.raises(ValueError, match="image_size is 0; allowed: 1 or more"):
        data.read_image_folder(tmp_path / "train", 0)
    for size in (16.0, (16.0, 16.0), (4, 4, 4), None):
        with pytest.raises(ValueError, match=r"image_size is .*; allowed: 1 or more pixels"):
            data.read_image_folder(tmp_path / "train", size)
    assert data.read_image_folder(tmp_path / "train", np.int64(4)).images.shape == (4, 3, 4, 4)
    with pytest.raises(ValueError, match="channels is 2; allowed: 1, 3"):
        data.read_image_folder(tmp_path / "train", 4, channels=2)
    with pytest.raises(ValueError, match="image_size is None; image-folder needs"):
        data.load("image-folder", tmp_path)
    with pytest.raises(ValueError, match="image_size is 4, but images of digits have 8x8; leave it out"):
        data.load("digits", image_size=4)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(data.DataError, match=r"train/empty: no images"):
        data.load("image-folder", tmp_path, image_size=4)
    (tmp_path / "train" / "empty").rmdir()
    write_image(tmp_path / "test" / "wolf" / "1.png", RED)
    with pytest.raises(data.DataError, match=r"test/wolf: not one of the 3 classes, which are Bear, cat, dog"):
        data.load("image-folder", tmp_path, "test", image_size=4)
    path = tmp_path / "train" / "cat" / "b.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(data.DataError, match=r"cat/b\.png: not a complete image"):
        data.load("image-folder", tmp_path, image_size=4)
    path.write_bytes(b"GIF")
    with pytest.raises(data.DataError, match=r"cat/b\.png: not a complete image"):
        data.load("image-folder", tmp_path, image_size=4)


def write_packed(path: Path, given: list[int], **changes: Any) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    files, images = [], []
    for _ in given:
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
        images.append(np.asarray(Image.open(file)))
    content = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.array(given, np.uint8),
        **changes,
    }
    np.savez(path, **content)
    return images


def test_cifar10_as_jpeg(tmp_path: Path) -> None:
    expected = write_packed(tmp_path / "cifar10_jpeg_train.npz", [3, 9, 0])
    images, labels = data.load("cifar10-jpeg", tmp_path)
    assert labels.tolist() == [3, 9, 0]
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack(expected))


@pytest.mark.parametrize(("labels", "changes", "message"), [
    ([1, 10], {}, "label 10 of image 1; labels are 0 to 9"),
    ([1, 2], {"labels": np.array([1, 2, 3])}, r"2 images, but .* has 3 labels"),
    ([1, 2], {"labels": np.array([1.0, 2.0])}, r"labels is float64 \[2\]; integers"),
    ([1, 2], {"offsets": np.array([0, 5, 7])}, "offsets do not ascend from 0 to"),
    ([1, 2], {"jpeg": np.array([None, "x"])}, "not a complete npz file"),  # a pickle, which is not read
    ([1], {"jpeg": np.zeros(9, np.uint8), "offsets": np.array([0, 9])}, None),
])  # fmt: skip
def test_damaged_packed_images(tmp_path: Path, labels: list[int], changes: dict[str, Any], message: str | None) -> None:
    path = tmp_path / "cifar10_jpeg_test.npz"
    write_packed(path, labels, **changes)
    expected = r"cifar10_jpeg_test\.npz" + (f": {message}" if message else ", image 0: not a complete image")
    with pytest.raises(data.DataError, match=expected):
        data.load("cifar10-jpeg", tmp_path, "test")


def test_packed_images_of_other_sizes_and_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    write_packed(path, [1])
    with pytest.raises(data.DataError, match=r"image 0: 32x32; 16x32 was expected"):
        data.read_packed_images(path, (16, 32), 10)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(data.DataError, match=r"some\.npz: not a complete npz file"):
        data.read_packed_images(path, (32, 32), 10)


# -- Names -------------------------------------------------------------------------------------------------------------


def test_digits_are_split_alike_each_time() -> None:
    train, test = data.load("digits"), data.load("digits", split="test")
    assert len(train.labels) + len(test.labels) == 1797
    assert train.images.shape[1:] == (1, 8, 8)
    assert int(train.images.max()) == 255
    assert torch.bincount(test.labels).min() >= 34  # stratified
    assert torch.equal(data.load("digits").images, train.images)


@pytest.mark.parametrize(("name", "classes", "image"), [
    ("digits", 10, (1, 8, 8)), ("mnist", 10, (1, 28, 28)), ("kmnist", 10, (1, 28, 28)), ("cifar10", 10, (3, 32, 32)),
    ("cifar100", 100, (3, 32, 32)), ("cifar100-coarse", 20, (3, 32, 32)), ("svhn", 10, (3, 32, 32)),
    ("stl10", 10, (3, 96, 96)), ("fashion-mnist", 10, (1, 28, 28)), ("cifar10-jpeg", 10, (3, 32, 32)),
])  # fmt: skip
def test_info(name: str, classes: int, image: tuple[int, int, int]) -> None:
    info = data.info(name)
    assert (info.num_classes, info.channels, *info.image_size) == (classes, *image)


def test_kmnist_has_its_own_folder(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST" / "raw", gzipped=True, images=3, labels=3)
    write_idx(tmp_path / "KMNIST" / "raw", gzipped=True)
    assert len(data.load("kmnist", tmp_path).labels) == 6
    assert len(data.load("mnist", tmp_path).labels) == 3


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="data is 'imagenet'; allowed: digits"):
        data.load("imagenet")
    with pytest.raises(ValueError, match="split is 'validation'"):
        data.load("digits", split="validation")
    with pytest.raises(ValueError, match="split is 'unlabeled'; allowed: 'train', 'test', 'extra'"):
        data.load("svhn", split="unlabeled")
    with pytest.raises(ValueError, match="data is 'imagenet'; allowed: digits"):
        data.info("imagenet")
    with pytest.raises(ValueError, match="data is 'digits'; allowed: mnist"):
        data.download("digits", "somewhere")


def test_download_asks_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's part is played here: it is not needed for anything else."""
    calls: list[tuple[Any, ...]] = []
    package, datasets, utils = (types.ModuleType(f"torchvision{part}") for part in ("", ".datasets", ".datasets.utils"))
    package.datasets, datasets.utils = datasets, utils  # type: ignore[attr-defined]
    for name in ("MNIST", "FashionMNIST", "KMNIST", "SVHN", "STL10"):
        setattr(datasets, name, lambda *args, name=name, **options: calls.append((name, *args, options)))
    utils.download_and_extract_archive = lambda *args, **options: calls.append((*args, options))  # type: ignore
    for module in (package, datasets, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    folder = str(tmp_path)
    for name in ("kmnist", "svhn", "cifar100"):
        data.download(name, tmp_path)
    assert calls[:3] == [
        ("KMNIST", folder, {"download": True}),
        ("SVHN", folder, {"split": "train", "download": True}),
        ("SVHN", folder, {"split": "test", "download": True}),
    ]
    assert calls[3][:2] == ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", folder)

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("File not found or corrupted.")

    utils.download_and_extract_archive = fail  # type: ignore[attr-defined]
    with pytest.raises(data.DataError, match=r"cifar10 could not be fetched into .* \(File not found"):
        data.download("cifar10", tmp_path)

    def without_scipy(*args: Any, **options: Any) -> None:
        raise ImportError("No module named 'scipy'")

    datasets.SVHN = without_scipy  # type: ignore[attr-defined]
    with pytest.raises(data.DataError, match=r"svhn could not be fetched into .* \(No module named 'scipy'"):
        data.download("svhn", tmp_path)
