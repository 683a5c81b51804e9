"""Writes the measured tables of README.md, docs/decoupled.md and docs/fuse.md from benchmarks/results, and the results
in docs/studies.md from the reports in docs/studies: no number there is typed by hand.

`python benchmarks/readme_table.py` rewrites them between their markers; with `--check` it changes nothing and fails if
one of them does not say what the results say.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_stage import memory_ratio
from chain_peers import Case
from harness import REPOSITORY, RESULTS
from networks import JOINT, JOINT_COMPILE
from networks import OURS as OURS_LOCAL
from peers import COMPILE, CONTIGUOUS, EAGER, OURS, Row

NOTHING_YET = "No results are recorded; `bash benchmarks/run_all.sh` makes them."


def tables(results: Path) -> str:
    """Markdown for all complete results of bench_stage.py in the folder, in the order of their names."""
    parts = []
    for path in sorted(results.glob("bench_stage-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["settings"]["complete"]:
            parts.append(_table(result))
    return "\n\n".join(parts) if parts else NOTHING_YET


# What the README calls the forms of a stage.
FORM_NAMES = {
    "plain": "",
    "max": ", max pool",
    "avg": ", average pool",
    "depth": ", space to depth",
    "residual": ", residual",
}


def _table(result: dict[str, Any]) -> str:
    entries = {(Row(**entry["row"]), entry["dtype"]): entry for entry in result["rows"]}
    dtypes = list(result["summary"])
    columns = ["ms", "vs eager", "vs compile", "memory"]
    header = ["N", "channels", "map", "cells", *(f"{dtype} {column}" for dtype in dtypes for column in columns)]
    lines = [_line(header), _line(["---:"] * len(header))]
    for row in dict.fromkeys(row for row, _ in entries):
        size = f"{row.size}x{row.size}" + (f", stride {row.stride}" if row.stride > 1 else "")
        size += FORM_NAMES[row.form]
        cells = [str(row.batch), f"{row.in_channels} → {row.out_channels}", size, f"{row.cells}x{row.cells}"]
        for dtype in dtypes:
            entry = entries[row, dtype]
            ratio, memory = entry["ratio"], memory_ratio(entry, EAGER)
            cells.append(f"{entry['milliseconds'][OURS]['median']:.1f}")
            cells += [f"{ratio[EAGER]['median']:.2f}x", f"{ratio[COMPILE]['median']:.2f}x"]
            cells.append("" if memory is None else f"{memory:.2f}")
        lines.append(_line(cells))
    means = ["", "**geometric mean**", "", ""]
    for dtype in dtypes:
        summary = result["summary"][dtype]
        means.append("")
        means += [f"**{summary['ratio'][name]['geometric_mean']:.2f}x**" for name in (EAGER, COMPILE)]
        means.append(f"**{summary['memory'][EAGER]['geometric_mean']:.2f}**" if EAGER in summary["memory"] else "")
    lines.append(_line(means))
    return "\n".join(lines) + "\n\n" + _caption(result)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _caption(result: dict[str, Any]) -> str:
    spread = max(
        (time["q3"] - time["q1"]) / 2 / time["median"]
        for entry in result["rows"]
        for time in (entry["milliseconds"][name] for name in (OURS, EAGER, COMPILE))
    )
    over = {dtype: summary["over_convolution"] for dtype, summary in result["summary"].items()}
    floor = ", ".join(f"{o[OURS]:.2f} here and {o[EAGER]:.2f} in eager ({dtype})" for dtype, o in over.items())
    nchw = ", ".join(
        f"{summary['ratio'][CONTIGUOUS]['geometric_mean']:.2f}x ({dtype})"
        for dtype, summary in result["summary"].items()
    )
    return (
        f"{_origin(result)}\n\n"
        "*ms*: one training step of the stage with this package. *vs eager*, *vs compile*: how many times as long the "
        "same step takes in plain PyTorch, channels_last, and in `torch.compile` of it. *memory*: peak of a step "
        "beyond input and parameters, as a share of eager's. Against eager with contiguous maps the geometric mean is "
        f"{nchw}. Time of a step over that of its convolution alone in PyTorch (forward and weight gradient), which "
        f"no fusion around it can save, in the geometric mean: {floor}. Medians over interleaved rounds; half "
        f"the interquartile range of a time is at most {spread:.0%}. One machine, and these shapes only: elsewhere the "
        "ratio follows the share of the convolution in the step."
    )


def _origin(result: dict[str, Any]) -> str:
    machine, versions, commit = result["machine"], result["versions"], result["commit"]
    revision = "no commit" if commit["hash"] is None else f"commit {commit['hash'][:12]}"
    if commit["dirty"]:
        revision += " with changes"
    return (
        f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores, {machine['memory_gib']} GiB "
        f"({machine['layerwise_cpu_capability']} kernels); torch {versions['torch']} "
        f"({machine['torch_cpu_capability']}), Python {versions['python']}, {versions['compiler']}; "
        f"{revision}, {result['date'][:10]}."
    )


# -- Whole networks ----------------------------------------------------------------------------------------------------


# The contestants of bench_chain.py that are shown.
CHAINS_SHOWN = {OURS: "", "again:2": "(segments=(2,))", "again:3,5": "(segments=(3, 5))"}


def networks(results: Path) -> str:
    """Markdown for the complete results of bench_local.py, bench_chain.py and bench_model.py on the CPU."""
    header = ["step", "dtype", "ms", "vs eager", "vs compile", "memory"]
    lines, origins = [], []
    for name, rows in (("bench_local", _local_rows), ("bench_chain", _chain_rows), ("bench_model", _model_rows)):
        path = results / f"{name}-cpu.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if result is not None and result["settings"]["complete"]:
            lines += [_line(row) for row in rows(result)]
            origins.append(f"`{name}.py`: {_origin(result)}")
    if not lines:
        return NOTHING_YET
    return "\n".join([_line(header), _line(["---"] + ["---:"] * 5), *lines, "", *dict.fromkeys(origins)])


def _numbers(ours: float, eager: float | None, compiled: float | None, memory: float | None) -> list[str]:
    ratios = ["" if peer is None else f"{peer / ours:.2f}x" for peer in (eager, compiled)]
    return [f"{ours:.1f}", *ratios, "" if memory is None else f"{memory:.2f}"]


def _local_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for kind, entry in itertools.product(("pred", "predsim", "predsim projected"), result["cases"]):
        ms = {name: time["median"] for name, time in entry["milliseconds"].items()}
        name = OURS_LOCAL[kind]
        memory = entry["peak_bytes"][name] / entry["peak_bytes"][JOINT]
        what = f"VGG8b, batch {entry['case']['batch']}: all stages with local {kind}; peers: joint"
        yield [what, entry["dtype"], *_numbers(ms[name], ms[JOINT], ms[JOINT_COMPILE], memory)]


def _chain_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for entry, name in itertools.product(result["rows"], CHAINS_SHOWN):
        ms = {contestant: time["median"] for contestant, time in entry["milliseconds"].items()}
        memory = entry["activation_bytes"][name] / entry["activation_bytes"][EAGER]
        segments = CHAINS_SHOWN[name]
        what = f"{Case(**entry['case'])}: joint, `FusedChain{segments}`"
        yield [what, entry["dtype"], *_numbers(ms[name], ms[EAGER], ms[COMPILE], memory)]


def _model_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    for entry in result["cases"]:
        ms = {name: time["median"] for name, time in entry["milliseconds"].items()}
        case = entry["case"]
        mode = "inference" if case["mode"] == "infer" else "training"
        what = f"{case['network']}, {case['batch']} x {case['size']}x{case['size']}: {mode}, `fuse_`"
        yield [what, entry["dtype"], *_numbers(ms["fuse_"], ms["eager channels_last"], ms["compile"], None)]


# -- Models of libraries -----------------------------------------------------------------------------------------------

LIBRARIES = ("torchvision", "timm")


def library_models(results: Path) -> str:
    """Markdown for the complete result of library_models.py."""
    path = results / "library_models-cpu.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if result is None or not result["settings"]["complete"]:
        return "No results are recorded; `python benchmarks/library_models.py` makes them."
    quantities = list(result["models"][0]["same_state"])
    header = ["model", *(key.replace("_", " ") for key in quantities), "evaluation", "curve", "control's curve"]
    lines = [_line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for entry in sorted(result["models"], key=lambda entry: entry["model"]):
        largest = [max(entry["same_state"][key]) for key in quantities]
        values = [*largest, entry["evaluation"], entry["parting"]["fused"], entry["parting"]["control"]]
        lines.append(_line([entry["model"], *(f"{value:.1e}" for value in values)]))
    libraries = " and ".join(f"{key} {result['versions'][key]}" for key in LIBRARIES if key in result["versions"])
    return "\n".join([*lines, "", f"{libraries}; {_origin(result)}"])


# -- Decoupled training ------------------------------------------------------------------------------------------------


def decoupled(results: Path) -> str:
    """Markdown for the complete result of bench_decoupled.py."""
    path = results / "bench_decoupled-cpu.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if result is None or not result["settings"]["complete"]:
        return "No results are recorded; `python benchmarks/bench_decoupled.py` makes them."
    cases = result["cases"]
    columns = [f"{case['dtype']} {column}" for case in cases for column in ("steps/s", "speed")]
    lines = [_line(["trainer", *columns]), _line(["---", *["---:"] * len(columns)])]
    for name in cases[0]["speed"]:
        cells = []
        for case in cases:
            cells += [f"{case['steps_per_second'][name]['median']:.2f}", f"{case['speed'][name]['median']:.2f}x"]
        lines.append(_line([name, *cells]))
    best = ", ".join(f"{case['dtype']} {case['speed_at_best']:.2f}x" for case in cases)
    steps = ", ".join(f"{case['equal_steps']} steps ({case['dtype']})" for case in cases)
    text = (
        "*speed*: steps per second over those of one process with one thread in the same dtype, medians of "
        f"{cases[0]['rounds']} interleaved rounds. Stages of each worker: {cases[0]['partition']}; if nothing took "
        f"time but the slower worker's stages, timed alone: {best}. The synchronous run and one process have the "
        f"same losses, parameters, running statistics and states of the optimisers, bit for bit, after {steps}."
    )
    return "\n".join([*lines, "", text, "", _origin(result)])


# -- Studies -----------------------------------------------------------------------------------------------------------

STUDIES = REPOSITORY / "docs" / "studies"


def studies(folder: Path) -> str:
    """Markdown for the reports of all studies in the folder, in the order of their names."""
    parts = [_study(path) for path in sorted(folder.glob("*/report.md"))]
    return "\n\n".join(parts) if parts else "No results are recorded; `layerwise-ext study` makes them."


def _study(report: Path) -> str:
    """The table, what was found, and the figures; the setup is a link away."""
    text, folder = report.read_text(encoding="utf-8"), f"{STUDIES.name}/{report.parent.name}"
    sections = {name: body.strip() for name, body in re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", text, re.MULTILINE)}

    def fact(name: str) -> str:
        """Of the setup; of all machines if there are several."""
        values = re.findall(rf"^- \*\*{name}\*\*: (.+)$", sections["Setup"], re.MULTILINE)
        return ", ".join(dict.fromkeys(values))

    title = text.partition("\n")[0].removeprefix("# ")
    data, _, images = fact("data").partition(": ")
    origin = [
        f"{fact('machine')}, threads: {fact('threads')}",
        fact("versions"),
        f"commit {fact('commit')}",
        fact("date"),
    ]
    return "\n\n".join(
        [
            f"### {title} ({data}, {images.split()[0]} images)",
            f"{fact('data')}. Epochs: {fact('epochs')}. Seeds: {fact('seeds')}. Wall time: {fact('wall time')}. "
            f"{'; '.join(origin)}. [The report]({folder}/report.md) has the setup.",
            sections["Results"],
            f"Found:\n\n{sections['What was found']}",
            f"Not found:\n\n{sections['What was not found']}",
            sections["Figures"].replace("](plots/", f"]({folder}/plots/"),
        ]
    )


# -- The pages ---------------------------------------------------------------------------------------------------------

BLOCKS = {"bench_stage": tables, "networks": networks}
PAGES = {
    REPOSITORY / "README.md": BLOCKS,
    REPOSITORY / "docs" / "decoupled.md": {"bench_decoupled": decoupled},
    REPOSITORY / "docs" / "fuse.md": {"library_models": library_models},
    REPOSITORY / "docs" / "studies.md": {"studies": lambda _: studies(STUDIES)},
}


def updated(page: str, blocks: dict[str, str]) -> str:
    """The page's text with everything between the markers of each block replaced."""
    for name, table in blocks.items():
        begin, end = (f"<!-- {name}:{place} -->" for place in ("begin", "end"))
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(f"the page must have the lines {begin} and {end} once each, in this order")
        before, _, rest = page.partition(begin)
        after = rest.partition(end)[2]
        page = f"{before}{begin}\n{table}\n{end}{after}"
    return page


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the measured tables of the README and the docs.")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a page is out of date")
    parser.add_argument("--readme", type=Path, help="write this README alone")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    pages = PAGES if arguments.readme is None else {arguments.readme: BLOCKS}
    failed = False
    for page, blocks in pages.items():
        old = page.read_text(encoding="utf-8")
        try:
            new = updated(old, {name: text(arguments.results) for name, text in blocks.items()})
        except ValueError as error:
            print(f"error: {page.name}: {error}", file=sys.stderr)
            failed = True
            continue
        if new != old and arguments.check:
            print(f"error: {page.name} is not what the results say; run benchmarks/readme_table.py", file=sys.stderr)
            failed = True
        elif new != old:
            page.write_text(new, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
