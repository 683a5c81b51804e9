"""What a run leaves in its folder: weights, what is best, held-out images; going on after a kill at any write."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from layerwise_ext import checkpoint, cli, data, models, train
from layerwise_ext.train import AutoencoderPretrainer

TINY = ["train", "--model", "4,M,4", "--width-multiplier", "1", "--batch-size", "32", "--limit-train", "200"]


def run(output: Path, *options: str) -> Path:
    assert cli.main([*TINY, "--output", str(output), *options]) == 0
    return output


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main([*TINY, *options]) == 2
    return capsys.readouterr().err


def rows(path: Path) -> list[dict[str, str]]:
    """Without times."""
    return [{**row, "seconds": ""} for row in csv.DictReader(path.open())]


def accuracies(folder: Path, name: str) -> dict[int, float]:
    """Of the network's output, by epoch."""
    return {int(row["epoch"]): float(row[f"{name}_accuracy"]) for row in rows(folder / "metrics.csv")
            if row["stage"] == "2"}  # fmt: skip


def accuracy_of(path: Path, split: data.Split, normalization: data.Normalization) -> float:
    """Of a file of weights, by the network that it names."""
    tensors, texts = checkpoint.load_weights(path)
    options = json.loads(texts["network"])
    model = getattr(models, options.pop("function"))(**options).eval()
    model.backbone().load_state_dict(tensors, strict=True)
    (batch,) = data.MemoryLoader(split, len(split.labels), normalization)
    with torch.no_grad():
        return float((model(batch[0]).argmax(1) == batch[1]).double().mean())


def first(split: data.Split, count: int) -> data.Split:
    return data.Split(*(part[:count] for part in split))


# -- Weights and what is best ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--head", "goodness"], ["--plain", "--ema-decay", "0.8"]])
def test_files_of_weights_rebuild_the_network(tmp_path: Path, options: list[str]) -> None:
    folder = run(tmp_path / "run", "--epochs", "4", "--lr", "0.05", *options)
    if options != ["--head", "goodness"]:  # the network of the checkpoint is that of its last weights
        tables = []
        for path in (folder, folder / "last.safetensors"):
            assert cli.main(["probe", str(path)]) == 0
            tables.append((folder / "separability.csv").read_text())
        assert tables[0] == tables[1]
    found = accuracies(folder, "test")
    best = max(found, key=lambda epoch: (found[epoch], -epoch))
    normalization = data.Normalization.of(first(data.load("digits"), 200).images)
    for name, epoch in (("last", 4), ("best", best)):
        path = folder / f"{name}.safetensors"
        _, texts = checkpoint.load_weights(path)
        assert (texts["epoch"], texts["accuracy"]) == (str(epoch), repr(found[epoch]))
        assert texts["accuracy_on"] == "test images" and json.loads(texts["options"])["model"] == "4,M,4"
        measured = accuracy_of(path, data.load("digits", split="test"), normalization)
        assert measured == pytest.approx(found[epoch], abs=1.5 / 360)
    result = json.loads((folder / "result.json").read_text())
    assert result["best"] == {
        "epoch": best, "accuracy": found[best], "accuracy_on": "test images", "test_accuracy": found[best]
    }  # fmt: skip
    assert result["epoch"] == 4 and result["final"] == pytest.approx(found[4], abs=1.5 / 360)


def test_held_out_images_choose_and_test_images_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders: list[int] = []
    evaluate = train.LocalTrainer._evaluate

    def count(self: Any, loader: Any, *options: Any) -> Any:
        loaders.append(len(loader.labels))
        return evaluate(self, loader, *options)

    monkeypatch.setattr(train.LocalTrainer, "_evaluate", count)
    folder = run(tmp_path / "run", "--epochs", "3", "--lr", "0.05", "--validation", "0.25", "--seed", "5")
    rest, held = data.hold_out(first(data.load("digits"), 200), 0.25, seed=5)
    assert loaders == [len(held.labels)] * 3 + [360] * 2  # the last epoch's weights and the best ones
    found = accuracies(folder, "validation")
    best = max(found, key=lambda epoch: (found[epoch], -epoch))
    result = json.loads((folder / "result.json").read_text())["best"]
    assert (result["epoch"], result["accuracy"]) == (best, found[best])
    assert result["accuracy_on"] == "held-out training images"
    normalization = data.Normalization.of(rest.images)
    path = folder / "best.safetensors"
    assert accuracy_of(path, held, normalization) == pytest.approx(found[best], abs=1.5 / len(held.labels))
    test = accuracy_of(path, data.load("digits", split="test"), normalization)
    assert result["test_accuracy"] == pytest.approx(test, abs=1.5 / 360)
    assert cli.main(["probe", str(path)]) == 0
    assert (folder / "separability.csv").exists()


def test_what_early_stopping_put_back_is_tested_again(tmp_path: Path) -> None:
    """The epoch that ends a stage is recorded as it was trained, and saved as what the stage went back to."""
    folder = run(tmp_path / "run", "--epochs", "40", "--lr", "0.3", "--patience", "1", "--mode", "joint")
    found = accuracies(folder, "test")
    assert 1 < len(found) < 40
    _, texts = checkpoint.load_weights(folder / "last.safetensors")
    normalization = data.Normalization.of(first(data.load("digits"), 200).images)
    measured = accuracy_of(folder / "last.safetensors", data.load("digits", split="test"), normalization)
    assert float(texts["accuracy"]) == pytest.approx(measured, abs=1.5 / 360)
    assert float(texts["accuracy"]) == found[len(found) - 1]


def test_greedy_training_keeps_weights_when_the_output_is_trained(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "--mode", "greedy", "--epochs", "2", "--ensemble")
    assert int(checkpoint.load_weights(folder / "best.safetensors")[1]["epoch"]) in (5, 6)
    result = json.loads((folder / "result.json").read_text())
    assert result["stages"] == [0, 1, 2] and 0 <= result["ensemble"] <= 1


def test_options_reach_networks_and_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, dict[str, Any]]] = []
    for kind in (train.GreedyTrainer, train.AutoencoderPretrainer):

        def keep(self: Any, *arguments: Any, kind: Any = kind, before: Any = kind.__init__, **options: Any) -> None:
            if type(self) is kind:
                made.append((kind.__name__, options))
            before(self, *arguments, **options)

        monkeypatch.setattr(kind, "__init__", keep)
    folder = run(
        tmp_path / "run", "--mode", "greedy", "--head", "conv", "--head-depth", "1", "--epochs", "1",
        "--cache-limit", "5", "--cache-dir", str(tmp_path / "kept"),
        "--pretrain", "denoising", "--pretrain-epochs", "1", "--pretrain-noise", "0.3", "--pretrain-tied",
        "--optimizer", "sgd", "--nesterov", "--clip-norm", "1", "--activation", "gelu",
    )  # fmt: skip
    options = dict(made)
    assert options["GreedyTrainer"]["cache_limit_bytes"] == 5 << 20 and options["GreedyTrainer"]["cache"]
    assert options["GreedyTrainer"]["cache_dir"] == tmp_path / "kept" and (tmp_path / "kept").is_dir()
    pretrainer = options["AutoencoderPretrainer"]
    assert pretrainer["noise"] == 0.3 and pretrainer["tied"] and pretrainer["clip_norm"] == 1
    network = json.loads(checkpoint.load_weights(folder / "last.safetensors")[1]["network"])
    assert (network["head_depth"], network["activation"]) == (1, "gelu")
    assert all(group["nesterov"] for optimizer in checkpoint.load(folder / "checkpoint.pt")["optimizers"]
               for group in optimizer["param_groups"])  # fmt: skip


@pytest.mark.parametrize(("dtype", "mode"), [("bfloat16", "joint"), ("float16", "local"), ("float16", "decoupled")])
def test_dtypes(tmp_path: Path, dtype: str, mode: str) -> None:
    options = ["--mode", mode, "--dtype", dtype]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, *options, "--epochs", "2")
    run(parts, *options, "--epochs", "1")
    run(parts, *options, "--epochs", "2", "--resume")
    assert rows(whole / "metrics.csv") == rows(parts / "metrics.csv")
    assert all(math.isfinite(float(row["train_loss"])) for row in rows(whole / "metrics.csv"))
    state = checkpoint.load(parts / "checkpoint.pt")
    assert len(state["scalers"]) == (3 if dtype == "float16" else 0)
    assert all(t.dtype != getattr(torch, dtype) for stage in state["stages"] for t in stage.values())


def test_the_example_of_the_docs_reads_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
    if not page.is_file():
        pytest.skip("docs/ is not beside tests/")
    monkeypatch.chdir(run(tmp_path / "run", "--epochs", "1"))
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["model"](torch.zeros(2, 1, 8, 8)).shape == (2, 10)


# -- After a kill ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the command line may catch it."""


@pytest.mark.parametrize("options", [
    ["--mode", "local", "--ema-decay", "0.9", "--lr", "0.05", "--epochs", "2"],
    ["--mode", "greedy", "--patience", "1", "--lr", "0.5", "--epochs", "1"],
    ["--mode", "joint", "--pretrain", "denoising", "--pretrain-epochs", "1", "--validation", "0.25", "--epochs", "1"],
    ["--mode", "joint", "--pretrain", "autoencoder", "--pretrain-on", "all", "--pretrain-epochs", "1", "--epochs", "1"],
])  # fmt: skip
def test_a_kill_at_any_write_changes_nothing(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At each one in turn, once before and once behind the other files of the epoch: the temporary file is left."""
    command = [*TINY, *options, "--limit-train", "100"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    replacing, writes, last = checkpoint.replacing, 0, 0

    @contextmanager
    def counting(path: Path) -> Iterator[Path]:
        nonlocal writes
        writes += 1
        if writes == last:
            path.with_name(f".{path.name}.1.tmp").write_text("half")
            raise Killed
        with replacing(path) as temporary:
            yield temporary

    monkeypatch.setattr(checkpoint, "replacing", counting)
    assert cli.main([*command, "--output", str(whole)]) == 0
    expected = contents(whole)
    total = writes
    for last in range(1, total + 1):
        writes = 0
        folder = killed / str(last)
        with pytest.raises(Killed):
            cli.main([*command, "--output", str(folder)])
        writes = -1000
        assert cli.main([*command, "--output", str(folder), "--resume"]) == 0
        assert contents(folder) == expected, f"write {last} of {total}"


def contents(folder: Path) -> dict[str, Any]:
    """Of every file, without times."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix == ".csv":
            found[path.name] = rows(path)
        elif path.suffix == ".pt":
            found[path.name] = plain(checkpoint.load(path))
        elif path.suffix == ".safetensors":  # whose texts are in any order
            found[path.name] = plain(checkpoint.load_weights(path))
        else:
            found[path.name] = path.read_bytes()
    return found


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items() if name != "seconds"}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def test_the_best_so_far_survives(tmp_path: Path) -> None:
    """A resumed run that gets no better keeps what was best before."""
    folder = run(tmp_path / "run", "--epochs", "3", "--lr", "0.05")
    best = (folder / "best.safetensors").read_bytes()
    state = checkpoint.load(folder / "checkpoint.pt")
    checkpoint.save(folder / "checkpoint.pt", {**state, "best": {"epoch": 2, "accuracy": 1.0}})
    run(folder, "--epochs", "5", "--lr", "0.05", "--resume")
    assert (folder / "best.safetensors").read_bytes() == best
    assert json.loads((folder / "result.json").read_text())["best"]["epoch"] == 2


def test_the_config_of_a_run_repeats_it(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "--epochs", "2", "--lr-milestones", "1", "--label-smoothing", "0.1",
                 "--dropout", "0.3")  # fmt: skip
    again = tmp_path / "again"
    assert cli.main(["train", str(folder / "config.yaml"), "--output", str(again)]) == 0
    assert contents(again) == contents(folder)
    assert json.loads(checkpoint.load_weights(folder / "last.safetensors")[1]["network"])["dropout"] == 0.3
    assert json.loads(checkpoint.load_weights(folder / "last.safetensors")[1]["network"])["dim"] == 1024
    assert cli.main(["train", str(folder / "config.yaml"), "--output", str(folder), "--resume", "--epochs", "3"]) == 0
    assert len(accuracies(folder, "test")) == 3


def test_a_folder_with_other_files_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "there is no run to go on with" in refused(capsys, "--output", str(tmp_path), "--resume")


# -- Methods -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "noise", "on"), [("autoencoder", 0.0, "train"), ("denoising", 0.2, "train"), ("denoising", 0.2, "all")]
)
def test_pretraining_is_that_of_the_trainer(
    tmp_path: Path, kind: str, noise: float, on: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.LocalTrainer, "fit", interrupt)
    options = ["--pretrain", kind, "--pretrain-epochs", "2", "--lr", "0.01", "--output", str(tmp_path)]
    assert cli.main([*TINY, *options, "--pretrain-on", on]) == cli.INTERRUPTED
    assert "interrupted after epoch 6 of pretraining; go on" in capsys.readouterr().err
    assert [row["stage"] for row in rows(tmp_path / "pretraining.csv")] == ["0", "0", "1", "1", "2", "2"]
    whole = data.load("digits")
    split = first(whole, 200)
    normalization = data.Normalization.of(split.images)
    unlabelled = whole if on == "all" else split
    loader = data.MemoryLoader(unlabelled, 32, normalization, shuffle=True, drop_last=True, seed=0)
    model = models.vgg([4, "M", 4], in_channels=1, image_size=(8, 8), seed=0)
    torch.manual_seed(0)
    adam = lambda parameters: torch.optim.Adam(parameters, lr=0.01)  # noqa: E731
    pretrainer = AutoencoderPretrainer(model, adam, noise=noise, seed=0, progress=False)
    pretrainer.fit(loader, 2)
    for stage, state in zip(model, checkpoint.load(tmp_path / "checkpoint.pt")["stages"], strict=True):
        assert all(torch.equal(value, state[f"body.{name}"]) for name, value in stage.body.state_dict().items())
    assert cli.main(["probe", str(tmp_path)]) == 0  # of what there is so far


def test_schedules_and_weight_decay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def keep(self: torch.optim.SGD, *arguments: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        assert self.param_groups[0]["weight_decay"] == 0.01
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", keep)
    options = ["--mode", "joint", "--optimizer", "sgd", "--weight-decay", "0.01", "--lr", "0.1", "--epochs", "4"]
    run(tmp_path / "steps", *options, "--lr-milestones", "1,3", "--lr-decay", "0.5")
    assert rates == pytest.approx([0.1] * 6 + [0.05] * 12 + [0.025] * 6)
    rates.clear()
    run(tmp_path / "cosine", *options, "--lr-schedule", "cosine")
    assert rates[::6] == pytest.approx([0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)])
    options[-1] = "5"
    message = refused(capsys, *options, "--lr-schedule", "cosine", "--resume", "--output", str(tmp_path / "cosine"))
    assert "--epochs is 5, but the run in" in message and "has 4" in message


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    logged: list[Any] = []

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int) -> None:
            logged.append((log_dir, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            logged.append((tag, step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(tmp_path / "run", "--epochs", "1", "--tensorboard")
    assert logged[0] == (str(tmp_path / "run" / "tensorboard"), 1) and ("val_accuracy/stage2", 1) in logged
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = refused(capsys, "--tensorboard", "--output", str(tmp_path / "new"))
    assert "--tensorboard needs a package" in message and "pip install tensorboard" in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("options", "kernels"), [
    (["--kernel-size", "5", "--pool", "space_to_depth"], [(4, 1, 5, 5), (4, 16, 5, 5), (1024, 4, 4, 4)]),
    (["--model", "resnet20", "--stem", "imagenet", "--downsampling", "8"], [(16, 1, 7, 7), (16, 16, 3, 3)]),
])  # fmt: skip
def test_geometry(tmp_path: Path, options: list[str], kernels: list[tuple[int, ...]]) -> None:
    folder = run(tmp_path / "run", *options, "--epochs", "1", "--mode", "joint")
    state, _ = checkpoint.load_weights(folder / "last.safetensors")
    found = [tuple(value.shape) for name, value in state.items() if name.endswith("conv.weight")]
    assert set(kernels) <= set(found)


@pytest.mark.parametrize(("options", "message"), [
    (["--lr-decay", "0.5"], "--lr-decay is for --lr-milestones; leave it out"),
    (["--pretrain-epochs", "2"], "--pretrain-epochs is for --pretrain; leave it out"),
    (["--lr-milestones", "3", "--lr-schedule", "cosine"], "--lr-milestones is for --lr-schedule constant"),
    (["--kernel-size", "4"], "kernel_size is 4; allowed: odd numbers"),
    (["--stem", "imagenet"], "--stem is imagenet, but --model 4,M,4 has none; leave it out"),
    (["--model", "resnet20", "--pool", "avg"], "--pool is avg, but --model resnet20 has none; leave it out"),
    (["--lr-milestones", "3,2"], "--lr-milestones is '3,2'; allowed: ascending epochs"),
    (["--lr-milestones", "0"], "--lr-milestones is '0'; ascending epochs such as 50,75,89 are allowed"),
    (["--mode", "joint", "--ensemble"], "--ensemble is for --mode local or greedy or decoupled, not joint"),
    (["--dropout", "1"], "dropout is 1.0; allowed: 0 to below 1"),
    (["--head-depth", "3"], "--head-depth is for --head conv; leave it out"),
    (["--beta", "0.5", "--head", "similarity"], "--beta is for --head predsim and predsim_projected; leave it out"),
    (["--nesterov"], "--nesterov is for --optimizer sgd; leave it out"),
    (["--pretrain", "autoencoder", "--pretrain-noise", "0.1"], "--pretrain-noise is for --pretrain denoising"),
    (["--pretrain-on", "all"], "--pretrain-on is for --pretrain; leave it out"),
    (["--pretrain", "autoencoder", "--pretrain-on", "extra"], "--pretrain-on is extra; of digits allowed: train, all"),
    (["--pretrain-tied"], "--pretrain-tied is for --pretrain; leave it out"),
    (["--no-cache"], "--cache is for --mode greedy, not local"),
    (["--mode", "greedy", "--no-cache", "--cache-limit", "5"], "--cache-limit is for --cache; leave it out"),
    (["--label-smoothing", "2"], "label_smoothing is 2.0; allowed: 0 to 1"),
    (["--label-smoothing", "0.1", "--head", "goodness"], "label_smoothing is 0.1 with head 'goodness'; allowed: 0"),
    (["--mode", "greedy", "--head", "infopro"], "stages[1] has a InfoProHead, which looks at the image"),
    (["--pretrain", "autoencoder", "--model", "resnet20"], "--pretrain: layers[1] has 2 convolutions"),
    (["--validation", "0.001"], "fraction is 0.001, less than half an image of each class"),
])  # fmt: skip
def test_refusals(tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "--output", str(tmp_path / "run"), *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["yaml", "safetensors"])
def test_packages_that_are_missing(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(capsys, "--output", str(tmp_path / "run"))
    assert "a run folder needs a package" in message and "pip install 'layerwise_ext[cli]'" in message
    assert not (tmp_path / "run").exists()
