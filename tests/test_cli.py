"""The command line: training, resuming, refusing, the demo."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from layerwise_ext import checkpoint, cli, data, models

TINY = [
    "train",
    "--data",
    "digits",
    "--model",
    "8,M,8",
    "--width-multiplier",
    "1",
    "--batch-size",
    "64",
    "--limit-train",
    "320",
]


def train(output: Path, *options: str) -> int:
    return cli.main([*TINY, "--output", str(output), *options])


def weights(output: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(output / "backbone.pt")


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", cli.MODES)
def test_train_and_resume_equal_one_run(tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "whole", "--mode", mode, "--epochs", "2") == 0
    assert "test accuracy 0." in capsys.readouterr().out
    assert train(tmp_path / "parts", "--mode", mode, "--epochs", "1") == 0
    assert train(tmp_path / "parts", "--mode", mode, "--epochs", "2", "--resume") == 0
    if mode != "greedy":  # greedy counts epochs per stage: the parts trained the stages in another order
        assert same(tmp_path / "whole", tmp_path / "parts")
    rows = list(csv.DictReader((tmp_path / "whole" / "metrics.csv").open()))
    assert {row["epoch"] for row in rows} >= {"1", "2"}
    assert all(0 <= float(row["test_accuracy"]) <= 1 for row in rows)
    assert not list(tmp_path.glob("*/.*.tmp"))


def test_plain_layers_train_alike(tmp_path: Path) -> None:
    for name, options in (("fused", []), ("plain", ["--plain"])):
        assert train(tmp_path / name, "--epochs", "1", *options) == 0
    fused, plain = weights(tmp_path / "fused"), weights(tmp_path / "plain")
    assert fused.keys() == plain.keys()
    for key, value in fused.items():
        if (
            value.is_floating_point() and "conv.bias" not in key
        ):  # Adam turns the rounding of a zero gradient into steps
            torch.testing.assert_close(plain[key], value, rtol=0, atol=0.02, msg=key)


@pytest.mark.parametrize("head", [head for head in cli.HEADS if head != "pooled_linear"])
def test_heads(tmp_path: Path, head: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--head", head, "--activation", "leaky_relu", "--epochs", "2"]
    assert train(tmp_path / "run", *options) == 0
    assert "test accuracy 0." in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    classifies = "predsim" in head or head in ("conv", "mlp_sr", "auglocal")
    assert all((row["test_accuracy"] == "nan") != classifies for row in rows if row["stage"] == "0")
    assert all(0 <= float(row["test_accuracy"]) <= 1 for row in rows if row["stage"] == "2")
    assert "--head is 'pooled_linear', but the run in" in refused(
        capsys, *TINY, "--output", str(tmp_path / "run"), "--activation", "leaky_relu", "--resume"
    )
    plain = models.vgg([8, "M", 8], in_channels=1, image_size=(8, 8), fused=False)
    plain.backbone().load_state_dict(weights(tmp_path / "run"), strict=True)


@pytest.mark.parametrize("options", [
    ["--model", "resnet20", "--downsampling", "accelerated", "--head", "predsim"],
    ["--model", "cnn", "--width-multiplier", "0.05", "--mode", "joint"],
    ["--model", "8,8,M,8", "--downsampling", "1,2"],
])  # fmt: skip
def test_networks_and_schedules(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", *options, "--epochs", "1") == 0
    assert "test accuracy 0." in capsys.readouterr().out
    assert (
        "--downsampling is 'standard', but"
        in refused(capsys, *TINY, *options[:2], "--output", str(tmp_path / "run"), "--resume")
        or "--downsampling" not in options
    )


@pytest.mark.parametrize(("mode", "options"), [
    ("local", ["--blocks", "2,1", "--deep-supervision", "0.3", "--clip-norm", "1", "--ema-decay", "0.9"]),
    ("joint", ["--deep-supervision", "0.3", "--head", "predsim", "--checkpointing", "--accumulate", "2"]),
])  # fmt: skip
def test_options_of_the_trainers(tmp_path: Path, mode: str, options: list[str]) -> None:
    assert train(tmp_path / "whole", "--mode", mode, "--epochs", "2", *options) == 0
    assert train(tmp_path / "usual", "--mode", mode, "--epochs", "2") == 0
    assert not same(tmp_path / "whole", tmp_path / "usual")
    rows = list(csv.DictReader((tmp_path / "whole" / "metrics.csv").open()))
    assert {row["stage"] for row in rows} == {"0", "1", "2"}
    assert len(rows) == 6
    assert train(tmp_path / "parts", "--mode", mode, "--epochs", "1", *options) == 0
    assert train(tmp_path / "parts", "--mode", mode, "--epochs", "2", *options, "--resume") == 0
    assert same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("options", [[], ["--ema-decay", "0.9"]])
def test_what_is_kept_is_what_was_tested(tmp_path: Path, options: list[str]) -> None:
    assert train(tmp_path, "--epochs", "2", *options) == 0
    plain = models.vgg([8, "M", 8], in_channels=1, image_size=(8, 8), fused=False).backbone().eval()
    plain.load_state_dict(weights(tmp_path), strict=True)
    train_split, test_split = data.load("digits"), data.load("digits", split="test")
    normalization = data.Normalization.of(train_split.images[:320])
    ((images, labels),) = data.MemoryLoader(test_split, len(test_split.labels), normalization)
    accuracy = float((plain(images).argmax(1) == labels).double().mean())
    *_, last = csv.DictReader((tmp_path / "metrics.csv").open())
    assert float(last["test_accuracy"]) == pytest.approx(accuracy, abs=1.5 / len(labels))


def test_patience(tmp_path: Path) -> None:
    """Each stage ends with the first epoch that is no better than the one before it."""
    assert train(tmp_path / "run", "--mode", "greedy", "--epochs", "30", "--patience", "1", "--lr", "0.1") == 0
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    for stage in "012":
        losses = [float(row["test_loss"]) for row in rows if row["stage"] == stage]
        assert 1 < len(losses) < 30
        assert [b < a for a, b in itertools.pairwise(losses)] == [True] * (len(losses) - 2) + [False]


def test_options_of_other_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*TINY, "--output", str(tmp_path / "run")]
    assert "--blocks is for --mode local, not joint" in refused(capsys, *run, "--mode", "joint", "--blocks", "2,1")
    message = refused(capsys, *run, "--mode", "greedy", "--deep-supervision", "1")
    assert "--deep-supervision is for --mode joint or local, not greedy" in message
    assert "--checkpointing is for --mode joint, not local" in refused(capsys, *run, "--checkpointing")
    assert "--blocks is '2,x'; numbers of stages such as" in refused(capsys, *run, "--blocks", "2,x")
    assert "deep_supervision is 1.0 without blocks" in refused(capsys, *run, "--deep-supervision", "1")
    assert "add up to the 3 stages" in refused(capsys, *run, "--blocks", "2,2")
    assert "ema_decay is 2.0; allowed: above 0 and below 1" in refused(capsys, *run, "--ema-decay", "2")
    assert not (tmp_path / "run").exists()


def test_schedules_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "run")
    message = refused(capsys, *TINY, "--downsampling", "1,,2", "--output", output)
    assert "downsampling is '1,,2'; allowed: standard, accelerated, or units such as 1,3,4,5" in message
    message = refused(capsys, *TINY, "--model", "resnet19", "--output", output)
    assert "model is 'resnet19'; allowed: vgg8b" in message and not (tmp_path / "run").exists()


def test_the_heads_are_those_of_the_model() -> None:
    assert cli.HEADS == models.HEADS


def test_backbone_loads_strictly_into_the_plain_network(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--epochs", "1") == 0
    plain = models.vgg([8, "M", 8], in_channels=1, image_size=(8, 8), fused=False)
    plain.backbone().load_state_dict(weights(tmp_path / "run"), strict=True)


@pytest.mark.parametrize("mode", ["local", "greedy"])
def test_killed_run_goes_on_where_its_checkpoint_is(tmp_path: Path, mode: str) -> None:
    options = ["--mode", mode, "--epochs", "6"]
    assert train(tmp_path / "whole", *options) == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "layerwise_ext", *TINY, "--output", str(killed), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (killed / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed / "checkpoint.pt").exists()
    assert train(killed, *options, "--resume") == 0
    assert same(tmp_path / "whole", killed)


def test_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "layerwise_ext", *TINY, "--output", str(tmp_path / "run"), "--epochs", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    try:
        status = cli.main(list(options))
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    assert status == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--output", str(tmp_path / "run")]
    assert "invalid positive int value: '0'" in refused(capsys, *TINY, *run, "--epochs", "0")
    assert "--width-multiplier" in refused(capsys, *TINY, *run, "--width-multiplier", "-1")
    assert "batch size is 5000; allowed: 1 to 320" in refused(capsys, *TINY, *run, "--batch-size", "5000")
    assert "model is '8,X'" in refused(capsys, *TINY, *run, "--model", "8,X")
    assert "'vgg99'" in refused(capsys, *TINY, *run, "--model", "vgg99")
    assert "no such folder" in refused(capsys, *TINY, *run, "--data", "mnist", "--data-dir", str(tmp_path / "none"))
    assert "there is no run" in refused(capsys, *TINY, *run, "--resume")
    assert "unrecognized arguments: --banana" in refused(capsys, *TINY, *run, "--banana")
    assert "--device is 'banana'" in refused(capsys, *TINY, *run, "--device", "banana")
    assert "--device is 'cuda:99'; allowed here: cpu" in refused(capsys, *TINY, *run, "--device", "cuda:99")
    assert "on a CUDA device; they are on cpu" in refused(capsys, *TINY, *run, "--device", "cpu", "--cuda-graph")
    assert "--mode joint has no local losses" in refused(capsys, *TINY, *run, "--mode", "joint", "--head", "predsim")
    assert not (tmp_path / "run").exists()


def test_refusals_of_an_existing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run, "--epochs", "1") == 0
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert "holds a run already" in refused(capsys, *TINY, "--output", str(run))
    message = refused(capsys, *TINY, "--output", str(run), "--resume", "--lr", "0.1")
    assert "--lr is 0.1, but the run in" in message
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    (run / "checkpoint.pt").write_bytes(b"damaged")
    assert "cannot be used" in refused(capsys, *TINY, "--output", str(run), "--resume", "--epochs", "2")


def test_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    checkpoint.write_text(path, "old")

    def fail_half_way() -> None:
        with checkpoint.replacing(path) as temporary:
            temporary.write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--quick", "--output", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert [line.split()[:2] for line in table.splitlines()[2:8]] == [
        [mode, layers] for mode in cli.MODES for layers in ("fused", "plain")
    ]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "demo.json").read_text())["results"]
    for fused, plain in zip(results[::2], results[1::2], strict=True):
        for a, b in zip(fused["accuracy"][0], plain["accuracy"][0], strict=True):
            assert abs(a - b) < 0.1


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for name in ("torch", "CPU kernels", "CUDA kernels", "CUTLASS"):
        assert f"{name}:" in text
