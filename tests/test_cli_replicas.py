"""The command line under torchrun."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from layerwise_ext import cli

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)
# Plain SGD, as Adam turns the rounding of gradients that should be 0 into steps.
TINY = ["train", "--data", "digits", "--model", "8,M,8", "--batch-size", "65", "--limit-train", "320"]
TINY += ["--optimizer", "sgd", "--lr", "0.05", "--device", "cpu", "--threads", "1"]


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "layerwise_ext", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def metrics(run: Path, epochs: int) -> list[dict[str, str]]:
    rows = csv.DictReader((run / "metrics.csv").open())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if int(row["epoch"]) <= epochs]


def test_two_processes_write_what_one_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--epochs", "2", "--augment", "standard"]
    process = torchrun(*TINY, *options, "--output", str(tmp_path / "two"))
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert output.count("epoch 1: ") == output.count("epoch 2: ") == output.count("written to") == 1
    assert cli.main([*TINY, *options, "--output", str(tmp_path / "one")]) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in two.iterdir())
    for row, expected in zip(metrics(two, 2), metrics(one, 2), strict=True):
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(float(value), rel=1e-3, abs=0.02 if "accuracy" in name else 0)
    # A run that is over, in one process.
    assert cli.main([*TINY, *options, "--output", str(two), "--resume"]) == 0
    assert f"resumed after epoch 2 of {two}" in capsys.readouterr().out


def test_a_signal_ends_all_and_the_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--mode", "greedy", "--pretrain", "denoising", "--pretrain-epochs", "1", "--no-sync-batch-norm"]
    process = torchrun(*TINY, *options, "--epochs", "100000", "--output", str(run))
    deadline = time.monotonic() + 600
    while not (run / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode != 0
    assert errors.count("interrupted after epoch") == 1
    assert "go on with the same command and --resume" in errors
    assert len((run / "pretraining.csv").read_text().splitlines()) == 1 + 3  # a row for each layer
    rows = metrics(run, 100000)
    assert cli.main([*TINY, *options, "--output", str(run), "--resume", "--epochs", rows[-1]["epoch"]]) == 0
    assert metrics(run, 100000)[: len(rows)] == rows


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    for options, message in (
        (["--batch-size", "1"], "--batch-size is 1; the 2 processes need 2 or more"),
        (["--cuda-graph"], "--cuda-graph captures one process, torchrun has started 2; leave it out"),
    ):
        assert cli.main([*TINY, *options, "--output", str(tmp_path / "run")]) == cli.USAGE
        assert message in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for device, message in (
        ("cuda:0", "--device is 'cuda:0'; allowed with torchrun: cpu, and cuda for a GPU each"),
        ("cuda", "torchrun has started more processes than there are GPUs (1); use --device cpu, or fewer"),
    ):
        assert cli.main([*TINY, "--device", device, "--output", str(tmp_path / "run")]) == cli.USAGE
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
