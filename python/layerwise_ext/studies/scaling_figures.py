"""The figures of the study of depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerwise_ext.studies import plots
from layerwise_ext.studies.scaling_results import (
    CHECKPOINTED,
    MEASURED,
    NAMES,
    at_depth,
    depths_of,
    intensities,
    joint_of,
    of_arm,
)
from layerwise_ext.studies.study import Figure, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure


def figures(results: Results) -> list[Figure]:
    depths, deepest = depths_of(results), depths_of(results)[-1]
    ends = [f"{NAMES[arm]} {results.summary(cell, 'accuracy').text(100)} %" for arm, cell in at_depth(results, deepest)]
    figures = [
        Figure(
            "scaling-accuracy",
            "Accuracy against depth",
            f"Lines of test accuracy over the number of layers; at {deepest} layers: {', '.join(ends)}.",
            lambda figure: _draw_accuracy(results, figure),
        ),
        Figure(
            "scaling-separability",
            "How well each layer separates the classes",
            "Accuracy of a linear probe behind each stage, a panel for each depth. First third and last stage at "
            f"{deepest} layers: {_probe_ends(results, deepest)}.",
            lambda figure: _draw_probes(results, figure),
            (5.0, 2.1 * math.ceil(len(depths) / 2) + 0.5),
        ),
        Figure(
            "scaling-scatter",
            "Fisher ratio and cosine gap of each layer",
            f"Both over the stages of the deepest network, {deepest} layers, a line for each way of training.",
            lambda figure: _draw_scatter(results, figure),
        ),
    ]
    if any(results.measured.get(cell.name) for cell in results.cells):
        ends = _cost_ends(results, deepest)
        figures.append(
            Figure(
                "scaling-cost",
                "Time and memory of a step",
                f"Time and peak memory of a training step over the number of layers; at {deepest}: {'; '.join(ends)}.",
                lambda figure: _draw_cost(results, figure),
            )
        )
    if len(intensities(results)) > 1:
        cells = [f"{c.options['convolutions']}: {results.summary(c, 'accuracy').text(100)} %"
                 for c in intensities(results)]  # fmt: skip
        figures.append(
            Figure(
                "scaling-intensity",
                "Convolutions per local loss",
                f"Test accuracy over the number of convolutions that a local loss trains: {', '.join(cells)}.",
                lambda figure: _draw_intensity(results, figure),
            )
        )
    return figures


def _probe_ends(results: Results, depth: int) -> str:
    return "; ".join(
        f"{NAMES[arm]} {results.summary(cell, 'shallow_probe').text(100)} and "
        f"{results.summary(cell, 'last_probe').text(100)} %"
        for arm, cell in at_depth(results, depth)
    )


def _cost_ends(results: Results, depth: int) -> list[str]:
    ends = []
    for cell in results.select(depth=depth, convolutions=2):
        arm, measured = cell.options["arm"], results.measured.get(cell.name, {})
        if "step_ms" in measured:
            peak = f", {measured['peak_mib']:.0f} MiB" if "peak_mib" in measured else ""
            ends.append(f"{NAMES[arm]} {measured['step_ms']:.3g} ms{peak}")
    return ends


def _number(arm: str) -> int:
    """Of the style of its lines: dashed where downsampling is accelerated."""
    number = {"joint": 0, "local": 1, "local-pred": 2, CHECKPOINTED: 3}[arm.removesuffix("-accelerated")]
    return number + len(plots.COLOURS) * arm.endswith("-accelerated")


def _draw_accuracy(results: Results, figure: MatplotlibFigure) -> None:
    axis = figure.subplots()
    for arm in dict.fromkeys(cell.options["arm"] for cell in results.cells if cell.trained):
        cells = of_arm(results, arm)
        depths = [cell.options["depth"] for cell in cells]
        summaries = [results.summary(cell, "accuracy") for cell in cells]
        plots.line(axis, depths, summaries, NAMES[arm], _number(arm), scale=100)
    _label_depth(axis, depths_of(results))
    axis.set_ylabel("test accuracy, %")
    plots.legend_above(figure)


def _draw_probes(results: Results, figure: MatplotlibFigure) -> None:
    depths = depths_of(results)
    axes = figure.subplots(math.ceil(len(depths) / 2), min(2, len(depths)), sharey=True, squeeze=False)
    for axis in axes.flat[len(depths) :]:
        axis.remove()
    for axis, depth in zip(axes.flat, depths, strict=False):
        _draw_stages(axis, results, depth, "probe", 100)
        axis.set_title(f"{depth} layers")
    figure.supxlabel("stage (0: stem)")
    figure.supylabel("accuracy of a linear probe, %")
    plots.legend_above(figure)


def _draw_scatter(results: Results, figure: MatplotlibFigure) -> None:
    axes = figure.subplots(1, 2)
    for axis, key, name in zip(axes, ("fisher", "cosine"), ("Fisher ratio", "cosine gap"), strict=True):
        _draw_stages(axis, results, depths_of(results)[-1], key, 1)
        axis.set_title(name)
        axis.set_xlabel("stage (0: stem)")
    plots.legend_above(figure)


def _draw_stages(axis: Axes, results: Results, depth: int, key: str, scale: float) -> None:
    """Means as lines, spreads as bands: error bars of neighbouring stages would cover each other."""
    for arm, cell in at_depth(results, depth):
        means, halves = plots.centres(results.per_layer(cell, key), scale)
        stages = range(len(means))
        style = plots.style(_number(arm))
        axis.plot(stages, means, label=NAMES[arm], **(style | {"markersize": 3}))
        low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
        axis.fill_between(stages, low, high, color=style["color"], alpha=0.15, linewidth=0)
    plots.whole_numbers(axis)


def _draw_cost(results: Results, figure: MatplotlibFigure) -> None:
    axes = figure.subplots(1, 2)
    for axis, key, name in zip(axes, ("step_ms", "peak_mib"), ("time, ms", "peak memory, MiB"), strict=True):
        for arm in MEASURED:
            cells = [cell for cell in of_arm(results, arm) if key in results.measured.get(cell.name, {})]
            values = [results.measured[cell.name][key] for cell in cells]
            depths = [cell.options["depth"] for cell in cells]
            if cells:
                axis.plot(depths, values, label=NAMES[arm], **plots.style(_number(arm)))
        _label_depth(axis, depths_of(results))
        axis.set_title(name)
        axis.set_ylim(bottom=0)
    plots.legend_above(figure)


def _draw_intensity(results: Results, figure: MatplotlibFigure) -> None:
    axis = figure.subplots()
    cells = intensities(results)
    counts = [cell.options["convolutions"] for cell in cells]
    summaries = [results.summary(cell, "accuracy") for cell in cells]
    plots.line(axis, counts, summaries, NAMES["local"], _number("local"), scale=100)
    joint = results.summary(joint_of(results, cells[0]), "accuracy")
    axis.axhline(100 * joint.mean, color=plots.COLOURS[_number("joint")], linestyle="--", label=NAMES["joint"])
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xlabel(f"convolutions per local loss ({cells[0].options['depth']} layers)")
    axis.set_ylabel("test accuracy, %")
    plots.legend_above(figure)


def _label_depth(axis: Axes, depths: Sequence[int]) -> None:
    axis.set_xticks(depths, [str(depth) for depth in depths])
    axis.set_xlabel("layers")
