"""The benchmark of torchvision's and timm's models."""

from __future__ import annotations

import json
import sys

import fuse_models
import layerwise_ext as lw
import library_models
import pytest
import torch


@pytest.fixture
def small_library(monkeypatch):
    """In place of torchvision and timm: a ResNet of a few blocks by any name."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")

    def build(name):
        with torch.random.fork_rng(devices=[]):
            model = fuse_models.build("resnet")
            model.fc = torch.nn.Linear(8, library_models.NUM_CLASSES, dtype=torch.float64)
        return model

    monkeypatch.setattr(library_models, "library", lambda name: ("small", "1.0"))
    monkeypatch.setattr(library_models, "build", build)


def test_library_models(small_library, tmp_path, capsys):
    output = tmp_path / "result.json"
    assert library_models.main(["--quick", "--output", str(output)]) == 0
    assert "resnet18, 9 of 9 convolutions fused" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["benchmark"] == "library_models" and result["settings"]["complete"] is False
    assert {"torch", "layerwise_ext", "small"} <= result["versions"].keys()
    (entry,) = result["models"]
    assert (entry["convolutions"], entry["fused"], entry["steps"]) == (9, 9, 3)
    same = entry["same_state"]
    assert same.keys() == {"loss", "outputs", "parameter_gradients", "input_gradient", "running_statistics"}
    assert all(len(values) == 3 and max(values) < 1e-10 for values in same.values())
    assert max(same["parameter_gradients"]) > 0  # another program computed them
    assert entry["evaluation"] < 1e-10 and entry["state_dict"] and entry["unfused"]
    assert entry["curves"].keys() == {"original", "fused", "control"}
    assert all(len(set(curve)) == 3 for curve in entry["curves"].values())
    assert entry["parting"]["fused"] < 1e-10 and 0 < entry["parting"]["control"] < 1e-10


def test_fused_models_that_differ_are_named(small_library, monkeypatch, tmp_path, capsys):
    right = library_models.fused_model

    def wrong(name):
        model, report = right(name)
        model.bn1.eps *= 1.001
        return model, report

    monkeypatch.setattr(library_models, "fused_model", wrong)
    output = tmp_path / "result.json"
    assert library_models.main(["--quick", "--models", "resnet18", "--output", str(output)]) == 1
    text = capsys.readouterr().err
    for fault in (
        "loss differ by",
        "parameter gradients differ by",
        "input gradient differ by",
        "evaluation mode differ",
    ):
        assert f"resnet18: {fault}" in text or f"resnet18: outputs in {fault}" in text
    assert "its loss curve parts by" in text and "unfuse_ does not give the original back" in text
    assert not output.exists()


def test_states_and_classes_of_fused_models():
    original, fused = (fuse_models.build("resnet") for _ in range(2))
    count = len(lw.fuse_(fused).fused)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert library_models.exchangeable(original, fused)
    assert not library_models.gives_back(original, fused, count + 1, images)
    lw.fuse_(fused)
    fused.relu = torch.nn.ReLU6()
    assert not library_models.gives_back(original, fused, count, images)
    fused.extra = torch.nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="extra"):
        library_models.exchangeable(original, fused)


@pytest.mark.parametrize("model", ["resnet18", "timm:resnet18"])
def test_missing_library(monkeypatch, tmp_path, capsys, model):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    output = tmp_path / "result.json"
    assert library_models.main(["--quick", "--models", model, "--output", str(output)]) == 1
    assert "pip install torchvision" in capsys.readouterr().err
    assert not output.exists()


def test_models_of_torchvision(tmp_path, capsys):
    try:
        library_models.torchvision()
    except library_models.Unavailable as error:
        pytest.skip(str(error))
    output = tmp_path / "result.json"
    assert library_models.main(["--quick", "--models", "resnet19", "--output", str(output)]) == 1
    assert "model is 'resnet19'; allowed:" in capsys.readouterr().err
    assert library_models.main(["--quick", "--output", str(output)]) == 0
    (entry,) = json.loads(output.read_text())["models"]
    assert (entry["model"], entry["convolutions"], entry["fused"]) == ("resnet18", 20, 20)


def test_only_a_complete_run_of_library_models_writes_the_published_file():
    assert library_models.parse([]).output.name == "library_models-cpu.json"
    for options in (["--quick"], ["--models", "resnet18"], ["--quick", "--models", *library_models.MODELS]):
        assert library_models.parse(options).output.name == "library_models-cpu-partial.json"
    with pytest.raises(SystemExit):
        library_models.parse(["--processes", "0"])
