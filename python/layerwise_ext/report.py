"""The demo's table and picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise_ext.demo import Result

COLOURS = {"fused": "#1f77b4", "plain": "#b0b0b0"}


def stage_accuracy(result: Result) -> list[tuple[float, float]]:
    """Mean and half the range over seeds, per stage that was evaluated."""
    return [(statistics.mean(v), (max(v) - min(v)) / 2) for v in zip(*result.accuracy, strict=True)]


def table(results: Sequence[Result], shapes: Sequence[str]) -> str:
    """One row per way of training and kind of layers."""
    header = ["method", "layers", "test accuracy by stage, %", "final, %"]
    for name in shapes:
        header += [f"{name}: ms", "speed"]
    header.append("peak MiB")
    rows = [header]
    for result in results:
        accuracy = stage_accuracy(result)
        mean, spread = accuracy[-1]
        row = [
            result.mode,
            result.layers,
            " ".join(f"{100 * m:.1f}" for m, _ in accuracy),
            f"{100 * mean:.1f} ± {100 * spread:.1f}",
        ]
        for name in shapes:
            row += [f"{result.milliseconds[name]:.1f}", f"{result.speed[name]:.2f}x"]
        peak = result.peak_mib.get(shapes[-1])
        row.append("-" if peak is None else f"{peak:.1f}")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def picture(results: Sequence[Result], shapes: Sequence[str], path: Path) -> None:
    """Accuracy per stage; time and peak memory of a step at the last of the shapes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    name = shapes[-1]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    _plot_accuracy(axes[0], results)
    _plot_bars(axes[1], results, [r.milliseconds[name] for r in results], f"Time of a training step, ms ({name})")
    _plot_bars(axes[2], results, [r.peak_mib.get(name, 0.0) for r in results], f"Peak memory of a step, MiB ({name})")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def _plot_accuracy(axis: Any, results: Sequence[Result]) -> None:
    stages = max(len(result.accuracy[0]) for result in results)
    markers = {"joint": "s", "local": "o", "greedy": "^"}
    colours = {"joint": "#444444", "local": "#1f77b4", "greedy": "#d62728"}
    for result in results:
        accuracy = stage_accuracy(result)
        numbers = range(stages - len(accuracy) + 1, stages + 1)
        fused = result.layers == "fused"
        axis.errorbar(
            [n + (0.05 if fused else -0.05) for n in numbers],
            [100 * mean for mean, _ in accuracy],
            [100 * spread for _, spread in accuracy],
            marker=markers[result.mode], color=colours[result.mode], linestyle="-" if fused else "--", capsize=3,
            markerfacecolor=colours[result.mode] if fused else "white", label=f"{result.mode}, {result.layers}",
        )  # fmt: skip
    axis.set_title("Test accuracy of each stage's head, % (digits)")
    axis.set_xlabel("stage")
    axis.set_xticks(range(1, stages + 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _plot_bars(axis: Any, results: Sequence[Result], values: Sequence[float], title: str) -> None:
    modes = list(dict.fromkeys(result.mode for result in results))
    for result, value in zip(results, values, strict=True):
        x = modes.index(result.mode) + (-0.2 if result.layers == "fused" else 0.2)
        first = result.mode == modes[0]
        bar = axis.bar(x, value, 0.38, color=COLOURS[result.layers], label=result.layers if first else None)
        axis.bar_label(bar, fmt="%.0f" if value >= 10 else "%.1f", fontsize=9)
    axis.set_xticks(range(len(modes)), modes)
    axis.set_ylim(0, 1.15 * max(max(values), 1e-9))
    axis.set_title(title)
    axis.legend(fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
