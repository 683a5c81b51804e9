"""The benchmarks of chains and whole models, and the roofline."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import bench_chain
import bench_model
import harness
import pytest
import roofline
from chain_peers import CHECKPOINTS, LAYERS, SEGMENTS, Case
from layerwise_ext import _memory
from peers import EAGER, OURS


def test_chain_result_file(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_chain, "QUICK", harness.Sampling(warmup=1, min_rounds=2, max_rounds=2, seconds=0.0))
    path = tmp_path / "bench_chain-tiny.json"
    options = ["--cases", "vgg16,4,4", "resnet18,4,4", "resnet50,4,4", "--no-compile", "--no-memory"]
    assert bench_chain.main(["--quick", *options, "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["benchmark"] == "bench_chain"
    assert result["settings"]["complete"] is False
    assert [(e["case"]["network"], e["dtype"]) for e in result["rows"]] == [
        (network, dtype) for network in ("vgg16", "resnet18", "resnet50") for dtype in ("fp32", "bf16")
    ]
    for entry in result["rows"]:
        assert entry["milliseconds"].keys() == {OURS, *SEGMENTS, LAYERS, EAGER, *CHECKPOINTS}
        assert entry["ratio"].keys() == {*SEGMENTS, LAYERS, EAGER, *CHECKPOINTS}
        assert entry["error"].keys() == entry["times"].keys() == entry["milliseconds"].keys()
        assert {len(rounds) for rounds in entry["times"].values()} == {entry["rounds"]}
    assert result["summary"]["fp32"]["ratio"][EAGER].keys() == {"geometric_mean", "worst"}


@pytest.mark.skipif(_memory.unavailable() is not None, reason=str(_memory.unavailable()))
def test_memory_of_a_chain():
    arguments = bench_chain.parse(["--threads", "1"])
    case = Case("vgg16", 16, 8)  # its largest maps have half a MiB, all pre-activations about 2
    peaks = bench_chain.memory_in_fresh_process(OURS, case, "fp32", arguments)
    assert 2 << 20 <= peaks["activation_bytes"] <= peaks["peak_bytes"] + (1 << 20) <= 12 << 20
    entry = {"activation_bytes": {OURS: 1, EAGER: 2}, "peak_bytes": {OURS: 1}}
    assert bench_chain.memory_ratio(entry, EAGER) == 0.5
    assert bench_chain.memory_ratio(entry, EAGER, "peak_bytes") is None


def test_chains_are_compared_at_equal_memory_and_within_a_round():
    entry = {
        "activation_bytes": dict.fromkeys(bench_chain.CHAINS, 60) | {"again:2": 50, "segments:8": 40, EAGER: 100},
        "times": {EAGER: [10.0, 30.0, 20.0], "again:2": [8.0, 24.0, 30.0], "segments:8": [20.0, 20.0, 20.0]},
    }
    assert bench_chain.ratio_within(entry, EAGER) == pytest.approx(10 / 8)
    entry["activation_bytes"] |= {"again:2": 56}
    assert bench_chain.ratio_within(entry, EAGER) == pytest.approx(1.0)
    entry["activation_bytes"] |= {"segments:8": 56}
    assert bench_chain.ratio_within(entry, EAGER) == 0
    del entry["activation_bytes"]["again:2"]
    assert bench_chain.ratio_within(entry, EAGER) is None


def test_different_chains_are_not_timed(monkeypatch, tmp_path, capsys):
    right = bench_chain.training_step

    def wrong(name, *arguments):
        step = right(name, *arguments)
        if name != LAYERS:
            return step

        def loss():
            value = step.loss()
            for parameter in step.module.parameters():
                parameter.grad *= 1.01
            return value

        return dataclasses.replace(step, loss=loss)

    monkeypatch.setattr(bench_chain, "training_step", wrong)
    output = tmp_path / "result.json"
    options = ["--quick", "--cases", "vgg16,4,4", "--dtypes", "fp32", "--no-compile", "--no-memory"]
    assert bench_chain.main([*options, "--output", str(output)]) == 1
    assert "loss and gradients of layers differ" in capsys.readouterr().err
    assert not output.exists()


def test_only_a_complete_run_of_chains_writes_the_published_file():
    assert bench_chain.parse([]).output.name == "bench_chain-cpu.json"
    for options in (["--quick"], ["--no-compile"], ["--no-memory"], ["--dtypes", "fp32"], ["--cases", "vgg16,4"]):
        assert bench_chain.parse(options).output.name == "bench_chain-cpu-partial.json"


@pytest.mark.parametrize("text", ["", "vgg16", "vgg99,4", "vgg16,0", "vgg16,4,-1", "vgg16,4,8,1"])
def test_bad_case(text):
    with pytest.raises(ValueError, match="case must be"):
        Case.parse(text)


def test_models_and_roofline(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    assert bench_model.main(["--quick", "--no-compile", "--output", str(path)]) == 0
    cases = json.loads(path.read_text())["cases"]
    assert [(c["case"]["network"], c["case"]["mode"], c["dtype"]) for c in cases] == [
        ("resnet18", "train", "fp32"),
        ("resnet18", "train", "bf16"),
        ("resnet50", "infer", "fp32"),
        ("resnet50", "infer", "bf16"),
    ]
    assert all(c["differences"][bench_model.OURS] < 0.1 for c in cases)
    assert set(cases[2]["ratio"]) == {bench_model.EAGER, bench_model.FOLDED}
    path = tmp_path / "roofline.json"
    assert roofline.main(["--quick", "--output", str(path)]) == 0
    passes = json.loads(path.read_text())["passes"]
    assert len({p["pass"] for p in passes}) == 13
    assert all(p["share_of_copy"] == 1 for p in passes if p["pass"] == "copy")
