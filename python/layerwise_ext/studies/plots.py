"""One style for all figures: colours that colour-blind people tell apart, legible on a phone, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerwise_ext import checkpoint
from layerwise_ext.studies.study import Figure, Summary

# Okabe & Ito 2008, but for black and yellow, which vanish on a dark or a white ground.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#888888")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
INK = "#1b1f24"  # of texts and axes; SVG files change it for a light one where the reader prefers dark
DARK_INK = "#e6e6e6"


def centres(summaries: Sequence[Summary], scale: float = 1.0) -> tuple[list[float], list[float]]:
    """Means, and half of each spread (0 with one seed), for ``axis.errorbar``."""
    means = [scale * s.mean for s in summaries]
    return means, [0.0 if s.spread != s.spread else scale * s.spread / 2 for s in summaries]


def style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line with this number."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
    }


def line(
    axis: Any, x: Sequence[float], summaries: Sequence[Summary], label: str, number: int, *, scale: float = 1.0
) -> None:
    """A line of means with half of the spread as error bars; ``number`` picks its :func:`style`."""
    means, halves = centres(summaries, scale)
    axis.errorbar(x, means, halves, label=label, capsize=3, **style(number))


def legend_above(figure: Any, columns: int = 2) -> None:
    """One legend for all axes of the figure, in room of its own."""
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= zip(labels, handles, strict=True)
    figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns)


def whole_numbers(axis: Any) -> None:
    """Ticks of the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def bars(
    axis: Any, labels: Sequence[str], summaries: Sequence[Summary], *, scale: float = 1.0, digits: int = 1
) -> None:
    """A horizontal bar from 0 per label, the first one on top, with its value; error bars are half of the spread."""
    means, halves = centres(summaries, scale)
    for row, mean in enumerate(means):
        axis.barh(row, mean, 0.7, color=COLOURS[row % len(COLOURS)])
    _named_rows(axis, labels, means, halves, digits)


def points(
    axis: Any, labels: Sequence[str], summaries: Sequence[Summary], *, scale: float = 1.0, digits: int = 1
) -> None:
    """As :func:`bars`, with markers on an axis that need not begin at 0."""
    means, halves = centres(summaries, scale)
    for row, mean in enumerate(means):
        axis.plot(mean, row, **(style(row) | {"markersize": 8}))
    _named_rows(axis, labels, means, halves, digits)


def _named_rows(axis: Any, labels: Sequence[str], means: Sequence[float], halves: Sequence[float], digits: int) -> None:
    for row, (mean, half) in enumerate(zip(means, halves, strict=True)):
        if half > 0:
            axis.errorbar(mean, row, xerr=half, color=INK, capsize=4, linewidth=1.2)
        offset = {"xytext": (6, 0), "textcoords": "offset points"}
        axis.annotate(f"{mean:.{digits}f}", (mean + half, row), va="center", **offset)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.margins(x=0.15)
    axis.grid(visible=False, axis="y")


def save(figure: Figure, folder: Path) -> None:
    """Write NAME.png and NAME.svg, the latter with a transparent ground."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings: Any = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.color": "#808080",
        "lines.markersize": 5,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": figure.name,  # the same file for the same numbers
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with plt.rc_context(settings):
        drawn = plt.figure(figsize=figure.size, layout="constrained")
        try:
            figure.draw(drawn)
            with checkpoint.replacing(folder / f"{figure.name}.png") as temporary:
                drawn.savefig(temporary, dpi=150, format="png")
            with checkpoint.replacing(folder / f"{figure.name}.svg") as temporary:
                drawn.savefig(temporary, format="svg", transparent=True, metadata={"Date": None, "Title": figure.title})
                temporary.write_text(_with_dark_ink(temporary.read_text(encoding="utf-8")), encoding="utf-8")
        finally:
            plt.close(drawn)


def _with_dark_ink(svg: str) -> str:
    rules = "".join(f'[style*="{kind}: {INK}"]{{{kind}:{DARK_INK} !important}}' for kind in ("fill", "stroke"))
    head, tag, rest = svg.partition("<defs>")
    return f"{head}<style>@media (prefers-color-scheme: dark){{{rules}}}</style>{tag}{rest}"
