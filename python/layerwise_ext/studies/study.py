"""What a study is made of: a task, cells that are compared, runs of them, and what is read from the results.

To write one, derive from :class:`Study` and add it to ``studies.NAMES``; everything else (the order of runs, resuming,
files, the report) is done by the runner.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from layerwise_ext import data

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

    from layerwise_ext.studies.measure import Step

# Training images with --quick.
QUICK_IMAGES = 256
# Of layerwise_ext._memory: the kernel's counter is exact to some hundred KiB.
PEAK_RESOLUTION_MIB = 0.5
# Of all images in a step that is measured; 64 images of 32x32.
STEP_PIXELS = 64 * 32 * 32


@dataclass(frozen=True)
class Task:
    """What every run of a study trains on.

    Attributes:
        name: of the data set.
        train, test: images uint8 ``[N, C, H, W]`` and labels int64 ``[N]``, on ``device``.
        normalization: of the training images, those that ``limit_train`` leaves out not among them.
        num_classes: labels are 0 to ``num_classes - 1``.
        limit_train: how many training images there were to be at most; None: all.
        threads: of torch, on the CPU.
        device: of the networks and the images.
        quick: whether the study only has to show that it runs: few cells, small networks.
    """

    name: str
    train: data.Split
    test: data.Split
    normalization: data.Normalization
    num_classes: int
    limit_train: int | None = None
    threads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quick: bool = False

    @staticmethod
    def load(
        name: str = "digits",
        data_dir: str | Path | None = None,
        *,
        limit_train: int | None = None,
        threads: int | None = None,
        device: torch.device | str = "cpu",
        quick: bool = False,
    ) -> Task:
        """Read a data set (:func:`layerwise_ext.data.load`). ``threads`` None: those that torch has now.

        A limit takes the same number of images of each class, the same ones in every study.

        Raises:
            ValueError: an unknown ``name``; a limit below one image of each class, or of more than a class has.
            DataError: files missing or damaged.
        """
        device = torch.device(device)
        num_classes = data.info(name, data_dir).num_classes
        train, test = data.load(name, data_dir), data.load(name, data_dir, "test")
        limit = QUICK_IMAGES if quick and limit_train is None else limit_train
        if limit is not None and limit < len(train.labels):
            if limit < num_classes:
                raise ValueError(f"limit_train is {limit}; allowed: {num_classes} or more, one image of each class")
            smallest = int(torch.bincount(train.labels, minlength=num_classes).min())
            if limit // num_classes > smallest:
                raise ValueError(
                    f"limit_train is {limit}, {limit // num_classes} images of each class, and a class of {name} has "
                    f"{smallest}; allowed: {num_classes} to {num_classes * smallest + num_classes - 1}, or all of them"
                )
            train = data.subset(train, per_class=limit // num_classes)
        normalization = data.Normalization.of(train.images)
        train, test = (data.Split(*(part.to(device) for part in split)) for split in (train, test))
        threads = torch.get_num_threads() if threads is None else threads
        return Task(name, train, test, normalization, num_classes, limit_train, threads, device, quick)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / self.num_classes

    def loader(self, batch_size: int, seed: int, split: data.Split | None = None) -> data.MemoryLoader:
        """Shuffled batches of the training images, or of others; a last smaller batch is left out."""
        split = self.train if split is None else split
        size = min(batch_size, len(split.labels))
        return data.MemoryLoader(split, size, self.normalization, shuffle=True, drop_last=True, seed=seed)

    def test_loader(self, batch_size: int = 512) -> data.MemoryLoader:
        return data.MemoryLoader(self.test, min(batch_size, len(self.test.labels)), self.normalization)

    def part(self, images: int) -> Task:
        """The same task with so many training and test images at most, for a short timing."""
        train, test = (data.Split(*(part[:images] for part in split)) for split in (self.train, self.test))
        return replace(self, train=train, test=test)


@dataclass(frozen=True)
class Cell:
    """One thing that is compared: its runs differ in the seed alone.

    Attributes:
        name: unique in the study, of letters, digits, ``-``, ``_`` and ``.``, as it names files.
        options: JSON values that :meth:`Study.run` and the plots read, such as ``{"method": "joint", "depth": 8}``.
        trained: False where only a step is measured (:meth:`Study.step`), of a method whose accuracy is another's.
        has_processes: its runs start processes, which takes time that does not grow with the images.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = True
    has_processes: bool = False


@dataclass(frozen=True)
class Run:
    """A finished run of a cell; ``values`` are JSON numbers, and lists of them (one number per layer, say)."""

    cell: str
    seed: int
    epochs: int
    seconds: float
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Summary:
    """Of one number over seeds; ``spread`` is the largest minus the smallest one, NaN with one seed."""

    mean: float
    spread: float
    seeds: int

    @staticmethod
    def of(values: Sequence[float]) -> Summary:
        """
        Raises:
            ValueError: no values.
        """
        if not values:
            raise ValueError("values is empty; a summary needs one or more")
        if not all(map(math.isfinite, values)):
            return Summary(math.nan, math.nan, len(values))
        spread = max(values) - min(values) if len(values) > 1 else math.nan
        return Summary(statistics.fmean(values), spread, len(values))

    def differs(self, resolution: float = 0.0) -> bool:
        """Whether the mean, of differences, is farther from 0 than the spread and ``resolution``; not with one seed."""
        return self.seeds > 1 and abs(self.mean) > max(self.spread, resolution)

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """The mean, with half of the spread where there is one."""
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if self.seeds == 1 else f"{mean} ± {scale * self.spread / 2:.{digits}f}"


@dataclass(frozen=True)
class Results:
    """Everything that was measured, for :meth:`Study.table`, :meth:`Study.figures` and :meth:`Study.findings`.

    Attributes:
        cells: those of the study, in its order; the trained ones have the same seeds once a study is complete.
        runs: finished ones, in the order in which they ran.
        measured: by name of the cell, of a training step (:meth:`Study.step`): ``step_ms`` (median), ``rounds_ms`` (one
            time for each round, in which all cells took their turn) and, where the system tells it, ``peak_mib``.
        test_images, num_classes: of the task: one image is the smallest difference that an accuracy can show.
    """

    cells: Sequence[Cell]
    runs: Sequence[Run]
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    test_images: int = 1
    num_classes: int = 10

    @property
    def seeds(self) -> list[int]:
        """Those that every trained cell has."""
        of_cells = [{run.seed for run in self.runs if run.cell == cell.name} for cell in self.cells if cell.trained]
        return sorted(set.intersection(*of_cells)) if of_cells else []

    def select(self, **options: Any) -> list[Cell]:
        """Cells with these options."""
        return [c for c in self.cells if all(c.options.get(name) == value for name, value in options.items())]

    def values(self, cell: Cell | str, key: str) -> list[Any]:
        """``values[key]`` of the cell's runs, by seed; runs that do not have it are left out."""
        runs = sorted((run for run in self.runs if run.cell == _name(cell)), key=lambda run: run.seed)
        return [run.values[key] for run in runs if key in run.values]

    def summary(self, cell: Cell | str, key: str) -> Summary:
        """Of a number over seeds."""
        return Summary.of(self.values(cell, key))

    def paired(self, first: Cell | str, second: Cell | str, key: str) -> list[Any]:
        """``values[key]`` of the first cell's runs minus that of the second's, of each seed that both have, by seed;
        entry by entry where they are lists."""
        runs = [{run.seed: run for run in self.runs if run.cell == _name(cell)} for cell in (first, second)]
        a, b = ({seed: run.values[key] for seed, run in of.items() if key in run.values} for of in runs)
        return [_minus(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]

    def per_layer(self, cell: Cell | str, key: str) -> list[Summary]:
        """Of a list of numbers over seeds, entry by entry."""
        return [Summary.of(entries) for entries in zip(*self.values(cell, key), strict=True)]


def _name(cell: Cell | str) -> str:
    return cell if isinstance(cell, str) else cell.name


def _minus(a: Any, b: Any) -> Any:
    return [x - y for x, y in zip(a, b, strict=True)] if isinstance(a, Sequence) else a - b


@dataclass(frozen=True)
class Table:
    """Text in rows; the first column names the row, the others are shown right-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
        name: of the files NAME.png and NAME.svg.
        title: shown above the figure in the report, not in the figure itself.
        alt: what it shows, for those who cannot see it; computed from the results where that is possible.
        draw: draws it into an empty matplotlib figure (constrained layout, style of :mod:`.plots`).
        size: inches; with 5 of width the texts, of 11 points, are still legible on a phone.
    """

    name: str
    title: str
    alt: str
    draw: Callable[[MatplotlibFigure], None]
    size: tuple[float, float] = (5.0, 3.6)


@dataclass(frozen=True)
class Finding:
    """A sentence or two computed from the results; ``found`` False: what the results do not show."""

    text: str
    found: bool


class Study(ABC):
    """A question, the cells that answer it, and how the answer is read from their runs.

    A study has no state. Its methods are called in one process, but for :meth:`step`, which fresh processes call, too.
    """

    name: ClassVar[str]  # of the command line
    title: ClassVar[str]
    question: ClassVar[str]
    default_epochs: ClassVar[int]  # 3 seeds of them take less than 4 minutes on digits with two cores
    max_epochs: ClassVar[int]  # more are not worth it: the rest of a budget is left
    batch_size: ClassVar[int] = 64

    @abstractmethod
    def cells(self, task: Task) -> list[Cell]:
        """What is compared; fewer cells where ``task.quick``."""

    @abstractmethod
    def run(self, task: Task, cell: Cell, seed: int, epochs: int) -> dict[str, Any]:
        """One training: numbers, or lists of them, that JSON has (NaN and infinity are allowed).

        A loss that is not finite, or an accuracy no better than chance, is a result like any other. The same arguments
        give the same numbers, but for times. torch's global generator was seeded with ``seed``; it is put back later.
        """

    @abstractmethod
    def setup(self, task: Task) -> dict[str, str]:
        """What a reader has to know to repeat it: network, optimiser, methods, accounting, sources."""

    @abstractmethod
    def table(self, results: Results) -> Table:
        """One row per cell, or as the study sees fit."""

    @abstractmethod
    def figures(self, results: Results) -> list[Figure]: ...

    @abstractmethod
    def findings(self, results: Results) -> list[Finding]:
        """What was found and what was not; :func:`compare` words the comparison of two cells."""

    def step(self, task: Task, cell: Cell) -> Step | None:
        """A training step whose time (all cells in turn) and peak memory (in a fresh process) are measured; None: none.

        ``task`` is the real one, or in a fresh process one that has a batch of images of the same shape.
        """
        return None

    def step_batch(self, task: Task) -> int:
        """Images in a measured step: many of small ones, whose maps the counter of memory would not resolve."""
        pixels = math.prod(task.image_shape[1:])
        return min(len(task.train.labels), max(self.batch_size, STEP_PIXELS // pixels))


def compare(
    results: Results,
    first: Cell | str,
    second: Cell | str,
    key: str = "accuracy",
    *,
    names: tuple[str, str] | None = None,
    what: str = "test accuracy",
    scale: float = 100.0,
    unit: str = " points",
    resolution: float | None = None,
    higher: str = "higher",
    lower: str = "lower",
) -> Finding:
    """Whether a number differs between two cells by more than it varies over seeds.

    Found is a difference of the means that is larger than the spread (largest minus smallest) of either cell, and than
    ``resolution``. With one seed there is no spread, nothing is found, and the text says so. Values that are not finite
    are named and not compared. With several seeds the sentence has the smallest and the largest difference between runs
    of the same seed.

    Args:
        results: of the study.
        first, second: the cells; the sentence is about the first.
        key: of :attr:`Run.values`.
        names: of the cells in the sentence; None: their own.
        what: the number's name in the sentence.
        scale, unit: of the numbers in the sentence, such as 100 and ``' points'`` for an accuracy.
        resolution: the smallest difference that can be told, in the units of the values; None: one test image.
        higher, lower: words for the first one's being so.
    """
    a, b = results.summary(first, key), results.summary(second, key)
    resolution = 1 / results.test_images if resolution is None else resolution
    a_name, b_name = names or (_name(first), _name(second))
    if math.isnan(a.mean) or math.isnan(b.mean):
        bad = " and ".join(name for name, s in ((a_name, a), (b_name, b)) if math.isnan(s.mean))
        return Finding(f"The {what} of {bad} is not finite; {a_name} and {b_name} cannot be compared.", False)
    difference = a.mean - b.mean
    size = _size(difference * scale, unit)
    word = higher if difference > 0 else lower
    by_seed = _by_seed(results, first, second, key, scale)
    sides = f"({a.mean * scale:.4g} against {b.mean * scale:.4g}{by_seed})"
    if difference == 0:
        return Finding(f"The {what} of {a_name} and that of {b_name} are the same ({a.mean * scale:.4g}).", False)
    sentence = f"The {what} of {a_name} is {size} {word} than that of {b_name} {sides}"
    if min(a.seeds, b.seeds) == 1:
        return Finding(f"{sentence}; with one seed there is no spread, so this may be chance.", False)
    spread = max(a.spread, b.spread)
    if abs(difference) > max(spread, resolution):
        return Finding(f"{sentence}, more than the spread over seeds ({_size(spread * scale, unit)}).", True)
    why = f"the spread over seeds ({_size(spread * scale, unit)})"
    if spread < resolution:
        why = f"what can be told ({_size(resolution * scale, unit)})"
    return Finding(
        f"No difference in {what} between {a_name} and {b_name} was found: {size} {sides} is not more than {why}.",
        False,
    )


def _by_seed(results: Results, first: Cell | str, second: Cell | str, key: str, scale: float) -> str:
    """The smallest and the largest difference of two runs with the same seed."""
    pairs = results.paired(first, second, key)
    return f"; seed by seed {scale * min(pairs):+.2g} to {scale * max(pairs):+.2g}" if len(pairs) > 1 else ""


def _size(value: float, unit: str) -> str:
    number = f"{abs(value):.{2 if abs(value) < 10 else 3}g}"
    return number + (unit.removesuffix("s") if number == "1" else unit)


def compare_steps(results: Results, first: Cell | str, second: Cell | str, *, names: tuple[str, str]) -> list[Finding]:
    """Time and peak memory of a step of two cells, as far as they were measured.

    Found is a difference in time where the middle half of the rounds is on one side; in memory, one that is larger than
    what the system's counter resolves.
    """
    a, b = (results.measured.get(_name(cell), {}) for cell in (first, second))
    a_name, b_name = names
    findings = []
    if a.get("rounds_ms") and b.get("rounds_ms"):
        ratios = [x / y for x, y in zip(a["rounds_ms"], b["rounds_ms"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
        rounds = f"middle half of {len(ratios)} rounds: {low:.2f} to {high:.2f}"
        sides = f"{a['step_ms']:.3g} against {b['step_ms']:.3g} ms"
        if low <= 1 <= high:
            text = (
                f"No difference in time between a step of {a_name} and one of {b_name} was found ({sides}; {rounds})."
            )
        else:
            text = f"A step of {a_name} takes {middle:.2f} times as long as one of {b_name} ({sides}; {rounds})."
        findings.append(Finding(text, not low <= 1 <= high))
    if "peak_mib" in a and "peak_mib" in b:
        sides = f"{a['peak_mib']:.1f} against {b['peak_mib']:.1f} MiB"
        is_clear = abs(a["peak_mib"] - b["peak_mib"]) > PEAK_RESOLUTION_MIB
        ratio = a["peak_mib"] / max(b["peak_mib"], PEAK_RESOLUTION_MIB)
        text = f"A step of {a_name} needs {ratio:.2f} times the memory of one of {b_name} ({sides})."
        if not is_clear:
            text = f"No difference in memory between steps of {a_name} and {b_name} could be told ({sides})."
        findings.append(Finding(text, is_clear))
    return findings
