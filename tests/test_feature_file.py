"""Features of frozen stages in a file: what is read is what was written, or the file is refused."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from layerwise_ext.train import GreedyTrainer, Trainer, feature_file
from layerwise_ext.train.feature_cache import FeatureCache
from layerwise_ext.train.feature_file import FeatureFileError
from test_train import arrays, loader, network, same, trainer_for
from test_train_resume import resumable, resume_after

CPU = torch.device("cpu")


def batches(
    layout: torch.memory_format, dtype: torch.dtype = torch.float32, target_dtype: torch.dtype = torch.int64
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    data, targets = torch.randn(10, 3, 3, 5).to(dtype), (torch.arange(10) * 1.5).to(target_dtype)
    return [(x.to(memory_format=layout), t) for x, t in zip(data.split(4), targets.split(4), strict=True)]


@pytest.mark.parametrize(
    ("dtype", "target_dtype"),
    [(torch.float32, torch.int64), (torch.bfloat16, torch.float64), (torch.float64, torch.bfloat16)],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_file_gives_the_batches_of_memory(
    tmp_path: Path, layout: torch.memory_format, dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    data, path = batches(layout, dtype, target_dtype), tmp_path / "features"
    path.with_name(f".features.{os.getpid()}.tmp").write_bytes(b"left by a process of this number that was killed")
    memory, written = (FeatureCache.fill(data, 3, 1 << 20, p, "key") for p in (None, path))
    caches = [memory, written, FeatureCache.open(path, "key", CPU)]
    read = [list(cache.batches(torch.Generator().manual_seed(1))) for cache in caches if cache is not None]
    assert len(read) == 3 and [len(x) for x, _ in read[0]] == [4, 4, 2]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    for part in range(2):
        everything = torch.cat([batch[part] for batch in data])
        assert torch.equal(torch.cat([batch[part] for batch in read[0]]), everything[order])
    for other in read[1:]:
        for (x, target), (expected, expected_target) in zip(other, read[0], strict=True):
            assert torch.equal(x, expected) and torch.equal(target, expected_target)
            assert x.is_contiguous(memory_format=layout) and (x.dtype, target.dtype) == (dtype, target_dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["features"]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(b"something else" * 1000), "is not a finished file of features"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes()[:4000]), "bytes instead of"),
        (lambda path: path.write_bytes(bytes(4096) + path.read_bytes()[4096:]), "is not a finished file"),
        (lambda path: flip(path, 30), "has a damaged header"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"batch_size": 4', b'"batch_size": 5')), "header"),
        (lambda path: flip(path, 4096), "its checksum is another one"),
        (lambda path: flip(path, 4096 + 10 * 45 * 4 - 1), "its checksum is another one"),
        (lambda path: flip(path, path.stat().st_size - 8 * 3), "its checksum is another one"),  # the last target
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "features"
    FeatureCache.fill(batches(torch.contiguous_format), 3, 1 << 20, path, "key")
    FeatureCache.open(path, "key", CPU)
    with pytest.raises(FeatureFileError, match="is of something else: it has another key"):
        FeatureCache.open(path, "another key", CPU)
    damage(path)
    with pytest.raises(FeatureFileError, match=message):
        FeatureCache.open(path, "key", CPU)


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path) -> None:
    def failing() -> Any:
        yield batches(torch.contiguous_format)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureCache.fill(failing(), 3, 1 << 20, tmp_path / "features", "key")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_falls_back_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_file.os, "posix_fallocate", no_room)
    trainer = trainer_for(GreedyTrainer, network(), cache_dir=tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.fit(loader(), 2)
    plain = trainer_for(GreedyTrainer, network(), cache=False)
    plain.fit(loader(), 2)
    assert all(same(a.state_dict(), b.state_dict()) for a, b in zip(trainer.stages, plain.stages, strict=True))
    assert ["No space left on device" in record.getMessage() for record in caplog.records] == [True] * 2
    assert list(tmp_path.iterdir()) == []


# -- Greedy training with a file ---------------------------------------------------------------------------------------


def test_training_from_a_file_is_training_from_memory(tmp_path: Path) -> None:
    memory, data = resumable(GreedyTrainer, True)
    expected = memory.fit(data, 2)
    trainer, data = resumable(GreedyTrainer, True, cache_dir=tmp_path / "new" / "folder")
    files = []
    history = trainer.fit(
        data, 2, on_epoch_end=lambda *_: files.append([p.name for p in (tmp_path / "new").glob("folder/*")])
    )
    assert [record["train_loss"] for record in history] == [record["train_loss"] for record in expected]
    assert files == [[]] * 2 + [["stage1.features"]] * 2 + [["stage2.features"]] * 2
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize("own_generator", [True, False])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, stop: int, own_generator: bool) -> None:
    resume_after(GreedyTrainer, stop, own_generator, cache_dir=tmp_path)


def interrupted(tmp_path: Path, **options: Any) -> tuple[dict[str, Any], list[float]]:
    """The state after the first of two epochs of stage 1, and the losses of a run that went on."""

    def stop(trainer: Trainer, record: dict[str, Any]) -> None:
        if trainer.epoch == 3:
            raise KeyboardInterrupt

    straight, data = resumable(GreedyTrainer, True)
    expected = [record["train_loss"][0] for record in straight.fit(data, 2)]
    first, data = resumable(GreedyTrainer, True, cache_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        first.fit(data, 2, on_epoch_end=stop)
    assert (tmp_path / "stage1.features").exists()
    return first.state_dict(), expected


def test_a_resumed_run_removes_the_file_of_a_stage_that_was_done(tmp_path: Path) -> None:
    """Of a process that was killed between the last checkpoint of the stage and the removal."""

    class Killed(Exception):
        pass

    def kill(trainer: Trainer, record: dict[str, Any]) -> None:
        if trainer.epoch == 4:
            raise Killed

    first, data = resumable(GreedyTrainer, True, cache_dir=tmp_path)
    with pytest.raises(Killed):
        first.fit(data, 2, on_epoch_end=kill)
    assert [path.name for path in tmp_path.iterdir()] == ["stage1.features"]
    second, data = resumable(GreedyTrainer, True, cache_dir=tmp_path)
    second.load_state_dict(first.state_dict())
    files = []
    second.fit(data, 2, on_epoch_end=lambda *_: files.append([path.name for path in tmp_path.iterdir()]))
    assert files == [["stage2.features"]] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [None, "foreign", "checksum"])
def test_a_resumed_run_reads_its_file_and_no_other(
    tmp_path: Path, damage: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    state, expected = interrupted(tmp_path)
    path = tmp_path / "stage1.features"
    if damage == "foreign":
        with torch.no_grad():
            images, target = arrays()
            path.unlink()
            FeatureCache.fill([(images.repeat(1, 6, 1, 1), target)], 1, 1 << 20, path, "of another run")
    elif damage == "checksum":
        flip(path, 5000)
    trainer, data = resumable(GreedyTrainer, True, cache_dir=tmp_path)
    calls = []
    trainer.stages[0].body.register_forward_hook(lambda *_: calls.append(None))
    trainer.load_state_dict(state)
    with caplog.at_level(logging.WARNING):
        history = trainer.fit(data, 2)
    assert [record["train_loss"][0] for record in history] == expected
    assert len(calls) == 3 * (1 if damage is None else 2)  # for stage 2, and for stage 1 where the file was no good
    assert any("computed again" in record.getMessage() for record in caplog.records) == (damage is not None)


def test_bad_arguments(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="which is not a folder"):
        GreedyTrainer(network(), cache_dir=tmp_path / "file")
    with pytest.raises(ValueError, match="with cache=False; leave one of the two out"):
        GreedyTrainer(network(), cache_dir=tmp_path, cache=False)
