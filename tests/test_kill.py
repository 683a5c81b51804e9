"""kill -9 at random moments: the run that goes on ends as one that was never killed, and no file is ever half-written.

    LAYERWISE_KILLS=20 pytest tests/test_kill.py

kills each run so many times; without it, once or twice (once where processes take their time to start). Moments are
drawn with a fixed seed, evenly over the time that the run takes when nobody kills it, or over what of it follows the
first checkpoint. Every other time the whole process group is killed, otherwise the process itself: workers must then
end without being told. A run that is over before its moment is compared, too, and begins again.

Runs are forked from a process that has imported everything and started no threads, so that a run begins at once.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import layerwise_ext as lw
import pytest
import torch
import torch.distributed as dist
import yaml
from layerwise_ext import checkpoint, cli, data, models
from layerwise_ext.train import GreedyTrainer
from layerwise_ext.train.feature_file import FeatureFile
from test_decoupled import equal, without_seconds

if not sys.platform.startswith("linux"):
    pytest.skip("reads /proc", allow_module_level=True)

DEADLINE = 600  # seconds for what takes a few of them
KILLS = os.environ.get("LAYERWISE_KILLS")
TINY = ["train", "--data", "digits", "--model", "8,M,8", "--width-multiplier", "1", "--batch-size", "64"]
TINY += ["--limit-train", "320", "--threads", "1"]


# -- The runs: each goes on from what is in the folder -----------------------------------------------------------------


def command_line(folder: Path, *options: str) -> int:
    resume = ["--resume"] if (folder / "config.yaml").exists() else []
    return cli.main([*TINY, *options, "--output", str(folder), *resume])


def greedy_from_a_file(folder: Path) -> int:
    """As the documentation says; the command line keeps features in memory."""
    torch.set_num_threads(1)
    split = data.Split(*(part[:320] for part in data.load("digits")))
    augment = data.Augment(1, cutout=2)
    loader = data.MemoryLoader(split, 64, data.Normalization.of(split.images), shuffle=True, augment=augment)
    model = models.vgg([8, "M", 8, 8], in_channels=1, image_size=(8, 8), hidden=32, seed=0)
    trainer = GreedyTrainer(model, seed=0, progress=False, cache_dir=folder / "features", ema_decay=0.9)
    folder.mkdir(exist_ok=True)
    path = folder / "checkpoint.pt"
    if path.exists():
        trainer.load_state_dict(lw.checkpoint.load(path))
    trainer.fit(loader, 4, on_epoch_end=lambda trainer, _: lw.checkpoint.save(path, trainer.state_dict()))
    return 0


DECOUPLED = ["--mode", "decoupled", "--workers", "2", "--epochs", "20"]
RUNS: dict[str, tuple[int, Callable[..., int], list[str]]] = {  # how often it is killed if nobody says so
    "joint": (2, command_line, ["--mode", "joint", "--deep-supervision", "0.3", "--optimizer", "sgd",
                                "--epochs", "12"]),
    "local": (2, command_line, ["--mode", "local", "--ema-decay", "0.9", "--patience", "3", "--augment", "standard",
                                "--cutout", "3", "--accumulate", "2", "--clip-norm", "1", "--epochs", "12"]),
    "greedy": (2, command_line, ["--mode", "greedy", "--classes-per-batch", "4", "--epochs", "4"]),
    "greedy from a file": (2, greedy_from_a_file, []),
    "autoencoder": (2, command_line, ["--pretrain", "denoising", "--pretrain-epochs", "4", "--epochs", "4"]),
    "decoupled": (1, command_line, DECOUPLED),
    "asynchronous": (1, command_line, [*DECOUPLED, "--asynchronous"]),
}  # fmt: skip


# -- The process that they are forked from -----------------------------------------------------------------------------


def serve(connection: Any) -> None:
    """Forks a process for each ``(name, folder)``; sends its id, then its exit status."""
    data.load("digits")  # imports what it needs
    importlib.import_module("torch._dynamo")  # as optimisers do when they are first used
    while (job := connection.recv()) is not None:
        pid = os.fork()
        if pid == 0:
            run(*job)
        with contextlib.suppress(OSError):  # it may have done so itself, and ended
            os.setpgid(pid, pid)
        connection.send(pid)
        connection.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def run(name: str, folder: Path) -> None:
    os.setpgid(0, 0)
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 70
    try:
        _, function, options = RUNS[name]
        status = function(folder, *options)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


class Outcome(NamedTuple):
    """Of a run: whether it was over before it was killed; seconds to its first checkpoint, and to its end."""

    is_over: bool
    start: float
    whole: float


class Server:
    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def run(
        self, name: str, folder: Path, moment: float | None = None, *, in_training: bool = False, group: bool = False
    ) -> Outcome:
        """Go on in ``folder``, kill it ``moment`` seconds after its start, or after its first checkpoint."""
        began = time.monotonic()
        before = version(folder / "checkpoint.pt")
        self.connection.send((name, folder))
        pid = self.connection.recv()
        is_over, start = False, 0.0
        if in_training or moment is None:
            while not is_over and version(folder / "checkpoint.pt") == before:
                is_over = self.connection.poll(0.01)
            start = time.monotonic() - began
        if not is_over and not self.connection.poll(DEADLINE if moment is None else moment):
            with contextlib.suppress(ProcessLookupError):  # it has ended in this moment
                (os.killpg if group else os.kill)(pid, signal.SIGKILL)
        status = self.connection.recv()
        outcome = Outcome(status == 0, start, time.monotonic() - began)
        assert status == 0 or (status == -signal.SIGKILL and moment is not None), log_of(folder)
        deadline = time.monotonic() + DEADLINE
        while left := members(pid):
            assert time.monotonic() < deadline, f"processes {left} outlive the one that started them\n{log_of(folder)}"
            time.sleep(0.01)
        return outcome


def version(path: Path) -> Any:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def members(group: int) -> list[int]:
    """Processes of the group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(path.parent.name))
    return found


def log_of(folder: Path) -> str:
    return folder.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    ours, theirs = get_context("spawn").Pipe()
    temporary = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            patch.setenv(name, "1")
        process = get_context("spawn").Process(target=serve, args=(theirs,))
        process.start()
    theirs.close()
    yield Server(ours)
    ours.send(None)
    process.join()
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")] == []


# -- What must hold ----------------------------------------------------------------------------------------------------


def check_files(folder: Path) -> None:
    """After a kill, and at the end."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in paths:
        if path.suffix != ".tmp":
            READERS[path.suffix](path)
    unfinished = [path.name.split(".")[1] for path in paths if path.suffix == ".tmp"]
    assert len(set(unfinished)) == len(unfinished), "what was left by an earlier kill has not been removed"
    table, state = folder / "metrics.csv", folder / "checkpoint.pt"
    if state.exists() and table.exists():
        assert abs(int(read_table(table)[-1]["epoch"]) - checkpoint.load(state)["epoch"]) <= 1


def read_state(path: Path) -> dict[str, Any]:
    state = checkpoint.load(path)
    return {**state, "history": without_seconds(state["history"])}


def read_table(path: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader(path.open(newline="")))
    assert rows and all(None not in row and None not in row.values() and float(row["seconds"]) > 0 for row in rows)
    return [{**row, "seconds": ""} for row in rows]


READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": read_state,
    ".csv": read_table,
    ".safetensors": checkpoint.load_weights,
    ".json": lambda path: json.loads(path.read_text()),
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".features": FeatureFile.open,
}


def check_same(folder: Path, whole: Path) -> None:
    assert files(folder) == files(whole)
    for path in whole.glob("*.*"):
        read = READERS[path.suffix]
        assert equal(read(folder / path.name), read(path)), path.name


def check_over(folder: Path, whole: Path) -> None:
    """Of a run that never gives the same numbers twice."""
    assert files(folder) == files(whole)
    history = checkpoint.load(folder / "checkpoint.pt")["history"]
    assert [record["epoch"] for record in history] == list(range(1, 21))
    assert {row["epoch"] for row in read_table(folder / "metrics.csv")} == set(map(str, range(1, 21)))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_as_one_that_was_not(server: Server, tmp_path: Path, name: str) -> None:
    if "--workers" in RUNS[name][2] and not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    check_end = check_over if name == "asynchronous" else check_same
    kills = int(KILLS or RUNS[name][0])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = server.run(name, whole)
    assert first.is_over
    moments = random.Random(name)
    done, is_over = 0, False
    while done < kills or not is_over:
        if done == kills:
            is_over = server.run(name, killed).is_over
        else:
            in_training = done % 4 in (0, 3)
            moment = moments.uniform(0, first.whole - in_training * first.start)
            is_over = server.run(name, killed, moment, in_training=in_training, group=done % 2 == 1).is_over
        done += not is_over
        if killed.exists():
            check_files(killed)
        if is_over:
            check_end(killed, whole)
            shutil.rmtree(killed)
    print(f"{name}: killed {done} times; a run takes {first.whole:.1f} s, {first.start:.1f} s to its first checkpoint")


# -- Files -------------------------------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    path, other = tmp_path / "a[1].json", tmp_path / "other.json"
    for target in (path, other):
        (tmp_path / f".{target.name}.0123.tmp").write_text("half of a")
    with checkpoint.replacing(path) as temporary:
        temporary.write_text("first")
        checkpoint.write_text(path, "second")  # as another process would
        assert path.read_text() == "second" and temporary.exists()
    assert path.read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.json.0123.tmp", "a[1].json"]


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_then_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(handle: int) -> None:
        events.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def recorded_replace(source: Path, target: Path) -> Path:
        events.append(("replace", source.stat().st_ino))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    checkpoint.write_text(tmp_path / "file", "text")
    file, folder = (path.stat().st_ino for path in (tmp_path / "file", tmp_path))
    assert events == [("fsync", file), ("replace", file), ("fsync", folder)]
