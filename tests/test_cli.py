"""The command line: training, resuming, refusing, the demo."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import layerwise_ext as lw
import pytest
import torch
from layerwise_ext import checkpoint, cli, data, demo, models
from layerwise_ext.cli import config, trainers
from layerwise_ext.cli import options as cli_options
from layerwise_ext.models.resnet import STEMS
from layerwise_ext.models.vgg import POOLS
from PIL import Image

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
    return checkpoint.load_weights(output / "last.safetensors")[0]


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", ["joint", "local"])
def test_train_and_resume_equal_one_run(tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "whole", "--mode", mode, "--epochs", "2") == 0
    assert "test accuracy 0." in capsys.readouterr().out
    assert train(tmp_path / "parts", "--mode", mode, "--epochs", "1") == 0
    assert train(tmp_path / "parts", "--mode", mode, "--epochs", "2", "--resume") == 0
    assert same(tmp_path / "whole", tmp_path / "parts")
    rows = list(csv.DictReader((tmp_path / "whole" / "metrics.csv").open()))
    assert {row["epoch"] for row in rows} >= {"1", "2"}
    assert all(0 <= float(row["test_accuracy"]) <= 1 for row in rows)
    assert not list(tmp_path.glob("*/.*.tmp"))


def test_epochs_of_a_resumed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*TINY, "--output", str(tmp_path), "--resume"]
    assert train(tmp_path, "--epochs", "2") == 0
    before = (tmp_path / "config.yaml").read_text()
    assert f"--epochs is 1, but 2 of the run in {tmp_path} are done" in refused(capsys, *run, "--epochs", "1")
    assert (tmp_path / "config.yaml").read_text() == before
    greedy = tmp_path / "greedy"  # its first stages have had their epochs
    assert train(greedy, "--mode", "greedy", "--epochs", "1", "--cache-limit", "1") == 0
    run = [*TINY, "--mode", "greedy", "--output", str(greedy), "--resume"]
    message = refused(capsys, *run, "--epochs", "2", "--cache-limit", "1")
    assert f"--epochs is 2, but the run in {greedy} has stages with 1" in message
    assert "--cache-limit is 2, but the run in" in refused(capsys, *run, "--epochs", "1", "--cache-limit", "2")


def test_decoupled_training_equals_local_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "local", "--epochs", "2", "--threads", "1") == 0
    decoupled = ["--mode", "decoupled", "--workers", "2", "--threads", "1"]
    assert train(tmp_path / "decoupled", *decoupled, "--epochs", "2") == 0
    assert same(tmp_path / "local", tmp_path / "decoupled")
    assert checkpoint.load(tmp_path / "decoupled" / "checkpoint.pt")["partition"] == [2, 1]  # the last stage is large
    command = [*TINY, "--output", str(tmp_path / "decoupled"), "--mode", "decoupled", "--resume"]
    assert "--workers is 3, but the run in" in refused(capsys, *command, "--workers", "3")
    assert "--workers is for --mode decoupled, not local" in refused(capsys, *TINY, "--workers", "2")
    message = refused(capsys, *command, "--workers", "2", "--partition", "1,2")
    assert "--partition is '1,2', but the run in" in message
    new = [*TINY, "--output", str(tmp_path / "new"), "--mode", "decoupled", "--partition"]
    assert "--partition is '1,x'; numbers of stages such as 3,4 are allowed" in refused(capsys, *new, "1,x")
    assert "partition is [1, 1]; allowed: numbers from 1 whose sum is 3" in refused(capsys, *new, "1,1")
    assert "workers is 2 and partition is [1, 2]; one of them" in refused(capsys, *new, "1,2", "--workers", "2")
    options = config.complete(argparse.Namespace(config=None, mode="decoupled", partition="1,2"))
    model = models.vgg([8, "M", 8], in_channels=1, image_size=(8, 8))
    assert trainers.trainer_of(options, model, None).layout.partition == (1, 2)
    assert "--buffer is for --mode decoupled --asynchronous" in refused(capsys, *command, "--buffer", "2")
    assert "workers is 9; allowed: 1 to 3" in refused(
        capsys, *TINY, "--output", str(tmp_path / "new"), "--mode", "decoupled", "--workers", "9"
    )


def test_a_lost_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    save = checkpoint.save

    def save_and_kill(*arguments: Any) -> None:
        save(*arguments)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    monkeypatch.setattr(checkpoint, "save", save_and_kill)
    options = ["--mode", "decoupled", "--epochs", "2"]
    assert train(tmp_path / "run", *options) == cli.FAILED
    errors = capsys.readouterr().err
    assert "layerwise-ext: error: worker" in errors and "SIGKILL" in errors and "Traceback" not in errors
    monkeypatch.undo()
    assert train(tmp_path / "run", *options, "--resume") == 0


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
    assert "--detach is for --mode local, not joint" in refused(capsys, *run, "--mode", "joint", "--no-detach")
    assert "blocks with detach=False" in refused(capsys, *run, "--no-detach", "--blocks", "2,1")
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


@pytest.mark.parametrize("init", [init for init in cli.INITS if init != "default"])
def test_initialisation_from_data(tmp_path: Path, init: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--init", init, "--epochs", "1", "--lr", "1e-30", "--optimizer", "sgd", "--limit-train", "120"]
    assert train(tmp_path / "run", *options) == 0
    loaded = data.load("digits")
    images = data.Normalization.of(loaded.images[:120]).apply(loaded.images[[i * 120 // 64 for i in range(64)]])
    model = models.vgg([8, "M", 8], in_channels=1, image_size=(8, 8), seed=7)
    initialize = lw.init.lsuv_ if init == "lsuv" else lw.init.data_dependent_
    initialize(model, images, generator=torch.Generator().manual_seed(0))
    for name, value in model.backbone_state_dict().items():
        if name.endswith(("conv.weight", "conv.bias")):
            torch.testing.assert_close(weights(tmp_path / "run")[name], value, rtol=1e-4, atol=1e-5)
    assert "--init is 'default', but the run in" in refused(
        capsys, *TINY, "--output", str(tmp_path / "run"), *options[4:], "--resume"
    )


def test_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run, "--epochs", "2", "--lr", "0.01") == 0
    capsys.readouterr()
    assert cli.main(["probe", str(run)]) == 0
    table = capsys.readouterr().out
    assert "probe accuracy" in table and "320 training images, 360 test images" in table
    rows = list(csv.DictReader((run / "separability.csv").open()))
    assert [row["layer"] for row in rows] == ["stages.0", "stages.1", "stages.2"]
    assert all(float(row["accuracy"]) > 0.8 for row in rows)

    # The same by hand; a file of weights has the network without the local heads.
    parts = [data.load("digits", split=split) for split in ("train", "test")]
    parts[0] = data.Split(*(part[:320] for part in parts[0]))
    normalization = data.Normalization.of(parts[0].images)
    model = models.vgg([8, "M", 8], in_channels=1, image_size=(8, 8))
    model.backbone().load_state_dict(weights(run))
    loaders = [data.MemoryLoader(part, 100, normalization) for part in parts]
    found = lw.probe.separability(model, *loaders, dim=64)
    output = tmp_path / "new" / "folder" / "table.csv"
    moved = tmp_path / "moved.safetensors"
    (run / "last.safetensors").rename(moved)  # knows the options of its run
    assert cli.main(["probe", str(moved), "--dim", "64", "--output", str(output)]) == 0
    for row, expected in zip(csv.DictReader(output.open()), found.layers, strict=True):
        assert float(row["accuracy"]) == expected.accuracy
        assert float(row["fisher_ratio"]) == pytest.approx(expected.fisher_ratio, rel=1e-4)
        assert float(row["cosine_gap"]) == pytest.approx(expected.cosine_gap, rel=1e-4)
    assert cli.main(["probe", str(run), "--limit-train", "50", "--output", str(output)]) == 0
    assert "50 training images" in capsys.readouterr().out


def test_refusals_of_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert f"{run} does not exist; name a run folder" in refused(capsys, "probe", str(run))
    run.mkdir()
    assert f"{run / 'checkpoint.pt'} does not exist" in refused(capsys, "probe", str(run))
    (run / "checkpoint.pt").touch()
    assert "config.yaml does not exist; name a run folder" in refused(capsys, "probe", str(run))
    shutil.rmtree(run)
    assert train(run, "--epochs", "1") == 0
    assert "metrics.csv cannot be used" in refused(capsys, "probe", str(run / "metrics.csv"))
    (run / "bad.safetensors").write_bytes((run / "last.safetensors").read_bytes()[:-1])
    assert "bad.safetensors cannot be used" in refused(capsys, "probe", str(run / "bad.safetensors"))
    checkpoint.save_weights(run / "other.safetensors", {"weight": torch.zeros(1)}, {})
    assert "other.safetensors cannot be used ('options')" in refused(capsys, "probe", str(run / "other.safetensors"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("8,M,8", "8,M,16"))
    assert "checkpoint.pt cannot be used" in refused(capsys, "probe", str(run))
    (run / "config.yaml").write_text("[1]")
    assert "config.yaml: holds a list; a table of options" in refused(capsys, "probe", str(run))
    (run / "config.yaml").write_text(config)
    assert "--device is 'banana'" in refused(capsys, "probe", str(run), "--device", "banana")
    file = str(run / "config.yaml")
    assert "is a folder; name a file" in refused(capsys, "probe", str(run), "--output", str(run))
    assert "config.yaml is a file; name a folder" in refused(capsys, "probe", str(run), "--output", f"{file}/table.csv")
    assert not (run / "separability.csv").exists()


def test_the_names_are_those_of_the_package() -> None:
    assert cli.HEADS == models.HEADS
    assert cli.DATA == data.NAMES
    assert cli_options.STEMS == STEMS and cli_options.POOLS == POOLS


def test_augmentation_and_classes_per_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--augment", "standard", "--cutout", "3", "--classes-per-batch", "4"]
    assert train(tmp_path / "whole", *options, "--epochs", "2") == 0
    assert train(tmp_path / "parts", *options, "--epochs", "1") == 0
    message = refused(capsys, *TINY, "--output", str(tmp_path / "parts"), *options[:4], "--resume")
    assert "--classes-per-batch is None, but the run in" in message
    assert train(tmp_path / "parts", *options, "--epochs", "2", "--resume") == 0
    assert same(tmp_path / "whole", tmp_path / "parts")
    for leave_out in range(0, 6, 2):  # each of them matters
        rest = options[:leave_out] + options[leave_out + 2 :]
        assert train(tmp_path / str(leave_out), *rest, "--epochs", "1") == 0
        assert not same(tmp_path / "whole", tmp_path / str(leave_out))
    message = refused(capsys, *TINY, "--output", str(tmp_path / "no"), "--classes-per-batch", "11")
    assert "classes_per_batch is 11; allowed: 1 to 10" in message


def test_networks_have_an_output_for_each_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = bytes(i for label in range(64) for i in (label % 20, label, *(label for _ in range(3072))))
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(records)
    run = ["--data-dir", str(tmp_path), "--model", "4,M,4,M", "--batch-size", "32", "--epochs", "1"]
    for name, head, classes in (("cifar100", "predsim", 100), ("cifar100-coarse", "pooled_linear", 20)):
        output = tmp_path / name
        assert cli.main(["train", "--data", name, *run, "--head", head, "--output", str(output)]) == 0
        plain = models.vgg([4, "M", 4, "M"], in_channels=3, num_classes=classes, fused=False)
        plain.backbone().load_state_dict(weights(output), strict=True)
        for stage in checkpoint.load(output / "checkpoint.pt")["stages"]:
            assert any(key.startswith("head.") and len(value) == classes for key, value in stage.items() if value.dim())


def test_image_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for index, name in enumerate(("cat", "dog", "owl")):
            for number in range(2):
                path = tmp_path / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 10), (80 * index, 10 * number, 0)).save(path)
    run = ["train", "--data", "image-folder", "--data-dir", str(tmp_path), "--model", "4,M,4", "--batch-size", "3"]
    run += ["--epochs", "1", "--output", str(tmp_path / "run")]
    assert "image_size is None; image-folder needs the size" in refused(capsys, *run)
    assert "--limit-train takes the first images" in refused(capsys, *run, "--image-size", "8", "--limit-train", "3")
    assert cli.main([*run, "--image-size", "8", "--augment", "standard"]) == 0
    assert "(6 images;" in capsys.readouterr().out
    message = refused(capsys, "probe", str(tmp_path / "run"), "--data-dir", str(tmp_path), "--limit-train", "3")
    assert "--limit-train takes the first images" in message
    plain = models.vgg([4, "M", 4], in_channels=3, num_classes=3, image_size=(8, 8), fused=False)
    plain.backbone().load_state_dict(weights(tmp_path / "run"), strict=True)
    message = refused(capsys, *TINY, "--output", str(tmp_path / "no"), "--image-size", "8")
    assert "image_size is 8, but images of digits have 8x8; leave it out" in message


def test_backbone_loads_strictly_into_the_plain_network(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--epochs", "1") == 0
    plain = models.vgg([8, "M", 8], in_channels=1, image_size=(8, 8), fused=False)
    plain.backbone().load_state_dict(weights(tmp_path / "run"), strict=True)


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
    assert refused(capsys, *TINY, *run, "--banana").endswith("unrecognized arguments: --banana\n")
    assert "--widht-multiplier=2; did you mean --width-multiplier?" in refused(capsys, *TINY, "--widht-multiplier=2")
    assert "arguments: --no-pretrain; did you mean --pretrain?" in refused(capsys, *TINY, "--no-pretrain")
    (tmp_path / "file").touch()
    assert "file is a file; name a folder" in refused(capsys, *TINY, "--output", str(tmp_path / "file" / "run"))
    none = ["--data", "mnist", "--data-dir", str(tmp_path / "none")]  # options are looked at before data
    assert "--lr-milestones is '3,2'" in refused(capsys, *TINY, *run, *none, "--lr-milestones", "3,2")
    assert "--blocks is 'x'" in refused(capsys, *TINY, *run, *none, "--blocks", "x")
    assert "--sead 1; did you mean --seeds?" in refused(capsys, "study", "layerwise", "--threads", "1", "--sead", "1")
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
    lines = (run / "config.yaml").read_text().splitlines()
    older = [line for line in lines if line.partition(":")[0] not in ("accumulate", "init", "label_smoothing")]
    assert len(older) == len(lines) - 3
    (run / "config.yaml").write_text("\n".join(older))  # of before there were these options
    message = refused(capsys, *TINY, "--output", str(run), "--resume", "--accumulate", "2")
    assert "--accumulate is 2, but the run in" in message and "has 1" in message
    assert train(run, "--epochs", "2", "--resume") == 0
    (run / "config.yaml").rename(run / "config.json")
    for command in (["probe", str(run)], [*TINY, "--output", str(run), "--resume"]):
        assert "a run of an earlier version, config.json in place of config.yaml" in refused(capsys, *command)
    (run / "config.json").rename(run / "config.yaml")
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
        [mode, layers] for mode in demo.MODES for layers in ("fused", "plain")
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
