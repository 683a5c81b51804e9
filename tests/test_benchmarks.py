"""The benchmark programs run, refuse to time different computations, and write what the README's table is made from."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys

import bench_decoupled
import bench_local
import bench_stage
import chain_peers
import harness
import networks
import pytest
import readme_table
from chain_peers import Case
from layerwise_ext import _memory
from layerwise_ext.studies import report
from layerwise_ext.train import LocalTrainer
from peers import COMPILE, CONTIGUOUS, CONVOLUTION, EAGER, OURS, Row

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
