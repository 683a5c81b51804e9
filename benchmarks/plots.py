"""Draws docs/plots/*.svg from the committed results of the CPU benchmarks.

python benchmarks/plots.py
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import RESULTS
from peers import COMPILE, EAGER, Row

PLOTS = Path(__file__).resolve().parent.parent / "docs" / "plots"
COLORS = {"fp32": "#20639b", "bf16": "#ed553b"}


def stage(result: dict[str, Any]) -> Any:
    """How many times as long a stage's step takes in eager PyTorch and in torch.compile."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.32 * len(result["rows"]) / 2 + 1.6), sharey=True)
    rows = list(dict.fromkeys(str(Row(**entry["row"])) for entry in result["rows"]))
    for axis, peer, title in zip(axes, (EAGER, COMPILE), ("eager channels_last", "torch.compile"), strict=True):
        for i, dtype in enumerate(COLORS):
            entries = {str(Row(**e["row"])): e for e in result["rows"] if e["dtype"] == dtype}
            values = [entries[row]["ratio"][peer]["median"] for row in rows]
            places = [k + 0.4 * i - 0.2 for k in range(len(rows))]
            axis.barh(places, values, height=0.38, color=COLORS[dtype], label=dtype)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(yticks=range(len(rows)), yticklabels=rows, xlabel=f"time of {title} / ours")
    axes[0].invert_yaxis()
    axes[1].legend(loc="lower right")
    return figure


def local(result: dict[str, Any]) -> Any:
    """Time and peak memory of a whole training step of VGG8b."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharey=True)
    names = list(result["cases"][0]["milliseconds"])
    for i, dtype in enumerate(COLORS):
        entry = next(e for e in result["cases"] if e["dtype"] == dtype)
        places = [k + 0.4 * i - 0.2 for k in range(len(names))]
        times = [entry["milliseconds"][name]["median"] for name in names]
        axes[0].barh(places, times, height=0.38, color=COLORS[dtype], label=dtype)
        if entry["peak_bytes"]:
            peaks = [entry["peak_bytes"].get(name, 0) / 2**20 for name in names]
            axes[1].barh(places, peaks, height=0.38, color=COLORS[dtype], label=dtype)
    axes[0].set(yticks=range(len(names)), yticklabels=names, xlabel="ms per step")
    axes[1].set(xlabel="peak memory of a step, MiB")
    axes[0].invert_yaxis()
    axes[1].legend(loc="lower right")
    return figure


DRAWINGS = {"bench_stage-cpu": stage, "bench_local-cpu": local}


def main() -> int:
    PLOTS.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        source = RESULTS / f"{name}.json"
        if not source.exists():
            print(f"no {source.name}: nothing is drawn of it")
            continue
        with plt.rc_context({"svg.hashsalt": name, "font.size": 9}):  # the same file from the same numbers
            figure = draw(json.loads(source.read_text()))
            figure.tight_layout()
            target = PLOTS / f"{name}.svg"
            partial = target.with_suffix(".partial")
            figure.savefig(partial, format="svg", metadata={"Date": None})
            os.replace(partial, target)
        print(f"written: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
