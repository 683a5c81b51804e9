"""The benchmark programs run, refuse to time different computations, and write what the README's table is made from."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("benchmarks/ is not beside tests/", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import bench_chain  # noqa: E402
import bench_decoupled  # noqa: E402
import bench_local  # noqa: E402
import bench_model  # noqa: E402
import bench_stage  # noqa: E402
import chain_peers  # noqa: E402
import fuse_models  # noqa: E402
import harness  # noqa: E402
import layerwise_ext as lw  # noqa: E402
import library_models  # noqa: E402
import networks  # noqa: E402
import readme_table  # noqa: E402
import roofline  # noqa: E402
import torch  # noqa: E402
from chain_peers import CHECKPOINTS, LAYERS, SEGMENTS, Case  # noqa: E402
from layerwise_ext import _memory  # noqa: E402
from layerwise_ext.studies import report  # noqa: E402
from layerwise_ext.train import LocalTrainer  # noqa: E402
from peers import COMPILE, CONTIGUOUS, CONVOLUTION, EAGER, OURS, Row  # noqa: E402

TINY = "8,4,16,64,2"  # maps of 2 MiB, so that the memory can be judged as well


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Of a real run with one tiny row and two rounds."""
    path = tmp_path_factory.mktemp("results") / "bench_stage-tiny.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_stage, "QUICK", harness.Sampling(warmup=1, min_rounds=2, max_rounds=2, seconds=0.0))
        options = ["--quick", "--rows", TINY, "--dtypes", "fp32", "--no-compile", "--output", str(path)]
        assert bench_stage.main(options) == 0
    return json.loads(path.read_text())


def test_result_file(result):
    assert result["benchmark"] == "bench_stage"
    assert {"cpu", "cores", "threads", "memory_gib", "layerwise_cpu_capability"} <= result["machine"].keys()
    assert {"torch", "python", "compiler", "layerwise_ext"} <= result["versions"].keys()
    assert result["commit"].keys() == {"hash", "dirty"}
    assert result["settings"]["complete"] is False
    (entry,) = result["rows"]
    assert Row(**entry["row"]) == Row.parse(TINY)
    assert entry["rounds"] == 2
    assert entry["difference_to_eager"] < 1e-3
    assert entry["milliseconds"].keys() == {OURS, EAGER, CONTIGUOUS, CONVOLUTION}
    assert entry["ratio"].keys() == {EAGER, CONTIGUOUS}
    assert all(t["q1"] <= t["median"] <= t["q3"] for t in entry["milliseconds"].values())
    mean = result["summary"]["fp32"]["ratio"][EAGER]
    assert mean["geometric_mean"] == pytest.approx(entry["ratio"][EAGER]["median"])
    assert mean["rows"] == 1


@pytest.mark.skipif(_memory.unavailable() is not None, reason=str(_memory.unavailable()))
def test_peak_memory_of_a_stage_is_at_least_what_it_must_keep(result):
    (entry,) = result["rows"]
    assert entry["least_bytes"] == 2 * 8 * 16 * 64 * 64 * 4
    for peak in entry["peak_bytes"].values():
        assert 0.9 * entry["least_bytes"] <= peak <= 4 * entry["least_bytes"]  # the kernel's counter is not exact


@pytest.mark.skipif(_memory.unavailable() is not None, reason=str(_memory.unavailable()))
def test_peak_memory_counts_live_memory_only():
    program = """
import torch
from layerwise_ext import _memory
_memory.return_freed_memory()
held = torch.ones(4 << 20)

def step():
    a = torch.ones(2 << 20)  # 8 MiB of float32
    b = torch.ones(1 << 20)
    del a
    c = torch.ones(1 << 20), torch.empty(8 << 20)  # the second one is never written

print(_memory.peak_of_step(step, lambda: None) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) == pytest.approx(12.0, abs=1.0)


def test_different_computations_are_not_timed(monkeypatch, tmp_path, capsys):
    right = bench_stage.training_step

    def wrong(name, *arguments):
        step = right(name, *arguments)
        if name != OURS:
            return step

        def loss():
            value = step.loss()
            for parameter in step.module.parameters():
                parameter.grad *= 1.01
            return value

        return dataclasses.replace(step, loss=loss)

    monkeypatch.setattr(bench_stage, "training_step", wrong)
    output = tmp_path / "result.json"
    options = ["--rows", "2,3,4,8,2", "--dtypes", "fp32", "--no-compile", "--no-memory", "--output", str(output)]
    assert bench_stage.main(options) == 1
    assert "gradient of" in capsys.readouterr().err
    assert not output.exists()


def test_only_a_complete_run_writes_the_published_file():
    assert bench_stage.parse([]).output.name == "bench_stage-cpu.json"
    for options in (["--quick"], ["--no-compile"], ["--no-memory"], ["--dtypes", "fp32"], ["--rows", TINY]):
        assert bench_stage.parse(options).output.name == "bench_stage-cpu-partial.json"


LOCAL = ["--batch", "4", "--width", "0.0625", "--dtypes", "fp32", "--no-compile"]


def test_local_training(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_local, "QUICK", harness.Sampling(warmup=0, min_rounds=2, max_rounds=2, seconds=0.0))
    monkeypatch.setattr(bench_local, "peak_in_fresh_process", lambda name, *_: 1 << 20)
    output = tmp_path / "result.json"
    assert bench_local.main(["--quick", *LOCAL, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["benchmark"] == "bench_local" and result["settings"]["complete"] is False
    assert {"machine", "versions", "commit", "date"} <= result.keys()
    (entry,) = result["cases"]
    assert networks.Case(**entry["case"]) == networks.Case(4, 0.0625)
    names = set(networks.STEPS) - {networks.JOINT_COMPILE}
    assert entry["milliseconds"].keys() == names and entry["rounds"] == 2
    assert entry["share_of_time"][networks.JOINT].keys() == names
    assert entry["share_of_time"][networks.JOINT][networks.JOINT]["median"] == 1.0
    assert set(networks.KINDS) < entry["differences"].keys()
    text = capsys.readouterr().out
    assert "(target 0.5: " in text and "of the peak memory of joint training (target 0.5: not met)" in text


@pytest.mark.skipif(_memory.unavailable() is not None, reason=str(_memory.unavailable()))
def test_peak_memory_of_local_training():
    case = networks.Case(64, 0.125)
    peak = bench_local.peak_in_fresh_process(networks.OURS["pred"], case, "fp32", 1)
    largest = 64 * 32 * 32 * 32 * 4  # z of the second convolution, and its y
    assert 2 * largest <= peak <= 6 * largest


def test_different_networks_are_not_timed(monkeypatch, tmp_path, capsys):
    right = bench_local.training_step

    def wrong(name, *arguments):
        step = right(name, *arguments)
        if name == networks.OURS["predsim"]:
            step.module[3].head.beta = 0.98
        return step

    monkeypatch.setattr(bench_local, "training_step", wrong)
    output = tmp_path / "result.json"
    assert bench_local.main(["--quick", *LOCAL, "--no-memory", "--output", str(output)]) == 1
    assert "the loss of local predsim differs" in capsys.readouterr().err
    assert not output.exists()


def test_only_a_complete_run_of_local_training_writes_the_published_file():
    assert bench_local.parse([]).output.name == "bench_local-cpu.json"
    for options in (["--quick"], ["--no-compile"], ["--no-memory"], ["--dtypes", "fp32"], ["--width", "0.5"]):
        assert bench_local.parse(options).output.name == "bench_local-cpu-partial.json"
    for wrong in (["--batch", "0"], ["--width", "-1"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            bench_local.parse(wrong)


def test_decoupled_training(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_decoupled, "QUICK", bench_decoupled.Sampling(1, 1, 2))
    output = tmp_path / "result.json"
    options = ["--quick", "--batch", "4", "--width", "0.0625", "--dtypes", "fp32", "--head", "pred"]
    assert bench_decoupled.main([*options, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert {"machine", "versions", "commit", "date", "settings"} <= result.keys()
    (entry,) = result["cases"]
    for partition in (entry["partition"], entry["partition_by_times"]):
        assert len(partition) == 2 and sum(partition) == len(entry["stage_milliseconds"]) == 7
    assert 1 < entry["speed_at_best"] <= entry["speed_at_best_by_times"] <= 2
    assert entry["equal_steps"] == 1 * 2 * 2
    assert len(entry["speed"]) == 4 and entry["speed"][bench_decoupled.ONE]["median"] == 1.0
    assert entry["speed"].keys() == entry["steps_per_second"].keys()


def test_stages_are_cut_where_the_slowest_worker_has_least_to_do():
    assert bench_decoupled.best_partition([5, 1, 1, 1, 1], 2) == (1, 4)
    assert bench_decoupled.best_partition([1, 1, 1, 3], 2) == (3, 1)
    assert bench_decoupled.best_partition([2, 2, 1, 1, 2], 3) == (1, 2, 2)
    assert bench_decoupled.speed_at_best([2, 2, 1, 1, 2], (1, 2, 2)) == 8 / 3
    assert bench_decoupled.parse([]).output.name == "bench_decoupled-cpu.json"
    for option in (["--workers", "3"], ["--partition", "4", "3"]):
        assert bench_decoupled.parse(option).output.name == "bench_decoupled-cpu-partial.json"
    with pytest.raises(SystemExit):
        bench_decoupled.parse(["--partition", "7"])


def test_decoupled_training_must_equal_that_of_one_process():
    def trained(name=None):
        trainer = LocalTrainer(networks.Case(2, 0.0625).fused("pred"), progress=False, seed=0)
        trainer.fit(bench_decoupled.Repeated(networks.Case(2, 0.0625), 1), 1)
        if name == "losses":
            trainer.history[0]["train_loss"][3] *= 1 + 1e-15
        elif name == "stages":
            trainer.stages[3].body.bn.running_var[1] *= 1.0001
        elif name == "optimizers":
            next(iter(trainer.optimizers[3].state.values()))["step"] += 1
        return trainer

    one = trained()
    bench_decoupled.check_equal(one, trained(), "fp32")
    for name in ("losses", "stages", "optimizers"):
        with pytest.raises(bench_decoupled.DisagreementError, match=name):
            bench_decoupled.check_equal(one, trained(name), "fp32")


@pytest.mark.parametrize("text", ["", "1,2,3", "8,4,16,64,2,1,1,1", "8,4,16,64,0", "8,4,x,64,2", "8,4,16,4,5"])
def test_bad_row(text):
    with pytest.raises(ValueError, match="row"):
        Row.parse(text)


def test_interleaving():
    log = []

    @dataclasses.dataclass
    class Step:
        name: str

        def prepare(self):
            log.append(f"prepare {self.name}")

        def run(self):
            log.append(self.name)

    steps = {name: Step(name) for name in "abc"}
    times = harness.interleave(steps, harness.Sampling(warmup=1, min_rounds=4, max_rounds=9, seconds=0.0))
    assert {len(seconds) for seconds in times.values()} == {4}
    assert log[::2] == [f"prepare {name}" for name in log[1::2]]
    rounds = ["".join(log[1::2][i : i + 3]) for i in range(3, 15, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1


def test_statistics():
    assert harness.Quartiles.of([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert harness.Quartiles.of([7.0]) == (7.0, 7.0, 7.0)
    assert harness.ratios([2.0, 6.0, 12.0], [1.0, 2.0, 3.0]).median == 3.0
    assert harness.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "results" / "x.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        harness.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture
def complete(result):
    """A result as of a complete run: with torch.compile, which is too slow for a test, and memory of its own."""
    result = copy.deepcopy(result)
    result["settings"]["complete"] = True
    for entry in result["rows"]:
        for part in ("milliseconds", "ratio", "over_convolution"):
            entry[part][COMPILE] = entry[part][EAGER]
        entry["peak_bytes"] = {OURS: 3 << 20, EAGER: 4 << 20, CONTIGUOUS: 4 << 20, COMPILE: 4 << 20}
    result["summary"] = bench_stage.summarise(result["rows"])
    return result


def markers(text: str) -> str:
    return "\n".join(f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->" for name in readme_table.BLOCKS)


def test_readme_table(complete, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{markers('old')}\nafter\n")
    options = ["--readme", str(readme), "--results", str(tmp_path)]
    partial = copy.deepcopy(complete)
    partial["settings"]["complete"] = False
    harness.write_json(tmp_path / "bench_stage-cpu-partial.json", partial)
    assert readme_table.tables(tmp_path) == readme_table.NOTHING_YET

    harness.write_json(tmp_path / "bench_stage-cpu.json", complete)
    assert readme_table.main([*options, "--check"]) == 1
    assert "readme_table.py" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert readme_table.main(options) == 0
    assert readme_table.main([*options, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("after\n") and "old" not in text
    assert "| 8 | 4 → 16 | 64x64 | 2x2 |" in text
    assert "0.75" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_readme_table_of_networks(complete, tmp_path):
    head = {key: complete[key] for key in ("machine", "versions", "commit", "date", "settings")}
    assert readme_table.networks(tmp_path) == readme_table.NOTHING_YET
    times = dict.fromkeys((*networks.STEPS, *chain_peers.STEPS, "fuse_", "eager channels_last", "compile"), 3.0)
    times |= {networks.OURS["predsim"]: 2.0, OURS: 1.5, "fuse_": 1.0}
    entry = {
        "dtype": "fp32",
        "milliseconds": {name: {"median": time} for name, time in times.items()},
        "peak_bytes": dict.fromkeys(networks.STEPS, 4) | {networks.OURS["predsim"]: 1},
        "activation_bytes": dict.fromkeys(chain_peers.STEPS, 2) | {OURS: 1},
    }
    model = {"network": "resnet18", "mode": "infer", "batch": 2, "size": 32, "width": 1.0}
    for name, part, case in (
        ("local", "cases", {"batch": 8, "width": 1.0}),
        ("chain", "rows", Case("vgg16", 8)._asdict()),
        ("model", "cases", model),
    ):
        harness.write_json(tmp_path / f"bench_{name}-cpu.json", head | {part: [entry | {"case": case}]})
    lines = readme_table.networks(tmp_path).splitlines()
    assert (
        "| VGG8b, batch 8: all stages with local predsim; peers: joint | fp32 | 2.0 | 1.50x | 1.50x | 0.25 |" in lines
    )
    assert "| vgg16 8: joint, `FusedChain` | fp32 | 1.5 | 2.00x | 2.00x | 0.50 |" in lines
    assert "| resnet18, 2 x 32x32: inference, `fuse_` | fp32 | 1.0 | 3.00x | 3.00x |  |" in lines


def test_table_of_library_models(complete, tmp_path):
    assert "No results" in readme_table.library_models(tmp_path)
    head = {key: complete[key] for key in ("machine", "versions", "commit", "date", "settings")}
    head["versions"]["torchvision"] = "0.1"
    entry = {"same_state": {"loss": [1e-14, 3e-14, 2e-14], "outputs": [0.0, 0.0, 0.0]}, "evaluation": 4e-15}
    models = [entry | {"model": name, "parting": {"fused": 0.05, "control": 0.02}} for name in ("b", "a")]
    harness.write_json(tmp_path / "library_models-cpu.json", head | {"models": models})
    lines = readme_table.library_models(tmp_path).splitlines()
    assert lines[0] == "| model | loss | outputs | evaluation | curve | control's curve |"
    assert [line[:4] for line in lines[2:4]] == ["| a ", "| b "]
    assert lines[2] == "| a | 3.0e-14 | 0.0e+00 | 4.0e-15 | 5.0e-02 | 2.0e-02 |"
    assert lines[-1].startswith("torchvision 0.1; ")


def test_table_of_decoupled_training(complete, tmp_path):
    assert "No results" in readme_table.decoupled(tmp_path)
    head = {key: complete[key] for key in ("machine", "versions", "commit", "date")}
    names = {bench_decoupled.ONE: (2.0, 1.0), bench_decoupled.SYNCHRONOUS: (3.0, 1.5)}
    cases = [
        {
            "dtype": dtype,
            "steps_per_second": {name: {"median": rate * factor} for name, (rate, _) in names.items()},
            "speed": {name: {"median": speed} for name, (_, speed) in names.items()},
            "rounds": 5, "partition": [3, 4], "speed_at_best": 1.75 * factor, "equal_steps": 40,
        }
        for dtype, factor in (("fp32", 1), ("bf16", 2))
    ]  # fmt: skip
    for complete_run, expected in ((False, "No results"), (True, "| DecoupledTrainer | 3.00 | 1.50x | 6.00 | 1.50x |")):
        result = head | {"settings": {"complete": complete_run}, "cases": cases}
        harness.write_json(tmp_path / "bench_decoupled-cpu.json", result)
        assert expected in readme_table.decoupled(tmp_path)
    text = readme_table.decoupled(tmp_path)
    assert "| trainer | fp32 steps/s | fp32 speed | bf16 steps/s | bf16 speed |" in text
    assert "fp32 1.75x, bf16 3.50x" in text and "medians of 5" in text and "40 steps (fp32), 40 steps (bf16)" in text


def test_results_of_studies(tmp_path):
    assert "No results" in readme_table.studies(tmp_path)
    setup = {"data": "toys: 3 images", "epochs": "4", "seeds": "0, 1", "wall time": "5 s"}
    machine = {"machine": "a box", "threads": "1", "versions": "layerwise_ext 1", "date": "today"}
    machines = [machine | {"commit": commit} for commit in ("abc", "def")]
    figures = [{"name": name, "title": name, "alt": f"of {name}"} for name in ("one", "two")]
    for name in "ba":
        (tmp_path / name).mkdir()
        text = report.render(
            "report.md", title=f"Study {name}", question="Why?", found=["This.", "That."], not_found=[],
            table=f"| {name} |\n| --- |\n\nA caption.\n", figures=figures, setup=setup, machines=machines, command="x",
        )  # fmt: skip
        (tmp_path / name / "report.md").write_text(text)
    studies = readme_table.studies(tmp_path)
    assert studies.index("### Study a (toys, 3 images)\n") < studies.index("### Study b (toys, 3 images)\n")
    one = studies.partition("### Study b")[0]
    assert "toys: 3 images. Epochs: 4. Seeds: 0, 1. Wall time: 5 s. a box, threads: 1; layerwise_ext 1" in one
    assert "; commit abc, def; today. [The report](studies/a/report.md)" in one
    assert "\n\n| a |\n| --- |\n\nA caption.\n\nFound:\n\n- This.\n- That.\n\nNot found:\n\nEvery comparison" in one
    assert one.rstrip().endswith("**two**\n\n![of two](studies/a/plots/two.svg)")
    assert "![of one](studies/a/plots/one.svg)" in one and "Why?" not in one


def test_readme_without_markers(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    assert readme_table.main(["--readme", str(readme), "--results", str(tmp_path)]) == 1
    assert "<!-- bench_stage:begin -->" in capsys.readouterr().err


def test_readme_says_what_the_results_say():
    assert readme_table.main(["--check"]) == 0


# -- Chains ------------------------------------------------------------------------------------------------------------


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


# -- Models of libraries -----------------------------------------------------------------------------------------------


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
