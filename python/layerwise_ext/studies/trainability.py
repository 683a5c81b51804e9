"""Question 2: why was joint training thought impossible, and what fixed it?"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerwise_ext import init, models, probe, train
from layerwise_ext._modules import layers_of
from layerwise_ext.nn import LocalStage, PooledLinearHead
from layerwise_ext.studies import plots
from layerwise_ext.studies.study import Cell, Figure, Finding, Results, Study, Table, Task, compare

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
INITS = ("gaussian", "xavier", "he", "lsuv", "data_dependent")
DEPTHS = (4, 8, 16)
QUICK: dict[str, Any] = {"activation": ("logistic", "relu"), "init": ("gaussian", "he"), "depth": (2, 6)}
LABELS = {"logistic": "logistic", "tanh": "tanh", "relu": "ReLU", "gaussian": "small Gaussian", "xavier": "Xavier",
          "he": "He", "lsuv": "LSUV", "data_dependent": "data-dependent"}  # fmt: skip

WIDTH = 16
# Convolutions with stride 2 come first, as long as the map is larger than this.
LARGEST_MAP = 8
CELLS = 4
GAUSSIAN_STD = 0.01
MOMENTUM = 0.9
LEARNING_RATES = (0.1, 0.01)
# Images for the gradients at the start, and for initialisation from data.
IMAGES = 128
# A gradient keeps its size where that at the first convolution is within this factor of that at the last one.
FACTOR = 100.0
# By how much the shares of settings that learn have to differ for gradients to tell which ones do.
SHARE = 0.3
# What the plots show for a gradient that is 0 or not finite.
SMALLEST, LARGEST = 1e-30, 1e30


class Trainability(Study):
    """Gradients at the start and accuracy after a short training: activation x batch norm x initialisation x depth."""

    name = "trainability"
    title = "Why joint training was thought impossible, and what fixed it"
    question = (
        "Why was joint training of deep networks thought impossible, and which of activation, batch norm and "
        "initialisation fixed it, at which depth?"
    )
    default_epochs = 1
    max_epochs = 20
    batch_size = 32

    def cells(self, task: Task) -> list[Cell]:
        full = {"activation": tuple(ACTIVATIONS), "init": INITS, "depth": DEPTHS}
        chosen = QUICK if task.quick else full
        cells = []
        for batch_norm, activation, initialisation, depth in itertools.product(
            (False, True), chosen["activation"], chosen["init"], chosen["depth"]
        ):
            options = {"activation": activation, "batch_norm": batch_norm, "init": initialisation, "depth": depth}
            cells.append(Cell(f"{activation}-{'bn' if batch_norm else 'plain'}-{initialisation}-{depth}", options))
        return cells

    def setup(self, task: Task) -> dict[str, str]:
        return {
            "network": f"plain 3x3 convolutions with {WIDTH} channels and biases, without shortcuts, the first ones "
            f"with stride 2 while the map is larger than {LARGEST_MAP}x{LARGEST_MAP}; means over {CELLS}x{CELLS} cells "
            "of the map, linear classifier",
            "activations": "logistic, tanh, ReLU",
            "batch norm": "between convolution and activation (arXiv 1502.03167), or none",
            "initialisation": f"normal with standard deviation {GAUSSIAN_STD:g} (small Gaussian); Xavier (Glorot & "
            "Bengio 2010); He (arXiv 1502.01852); LSUV (arXiv 1511.06422); data-dependent (arXiv 1511.06856); the last "
            "two from "
            f"{min(IMAGES, len(task.train.labels))} training images; biases 0, but for data-dependent ones",
            "gradients": "at the start, of the cross-entropy of that many images with respect to the output of each "
            "convolution (plotted) and to its weight (in results.csv), Euclidean norms",
            "optimiser": f"SGD with momentum {MOMENTUM:g}, trained with each of the learning rates "
            f"{' and '.join(f'{rate:g}' for rate in LEARNING_RATES)}; the one with the lower training loss counts. "
            "A setting that does not learn here may learn with another rate or in more epochs",
            "learned": "a setting has learned whose test accuracy is more than half as far above chance as that of the "
            "best setting",
        }

    def run(self, task: Task, cell: Cell, seed: int, epochs: int) -> dict[str, Any]:
        network = _network(task, cell, seed).to(task.device)
        images, target = _first_images(task)
        network.train()
        rows = probe.gradient_norms(network, images, target).layers[: cell.options["depth"]]
        trained = [self._train(task, network, rate, seed, epochs) for rate in LEARNING_RATES]
        loss, rate, trainer = min(trained, key=lambda each: each[0] if math.isfinite(each[0]) else math.inf)
        first, last = rows[0].activation_gradient, rows[-1].activation_gradient
        return {
            "accuracy": trainer.evaluate(task.test_loader())["final"],
            "train_loss": loss,
            "learning_rate": rate,
            "updates": epochs * len(task.loader(self.batch_size, seed)),
            "first_over_last": first / last if last else math.nan,
            "activation_gradient": [row.activation_gradient for row in rows],
            "weight_gradient": [row.gradient for row in rows],
        }

    def _train(
        self, task: Task, network: models.StagedModel, rate: float, seed: int, epochs: int
    ) -> tuple[float, float, train.Trainer]:
        """The training loss of the last epoch, the learning rate and the trainer, of a copy."""
        optimizer = partial(torch.optim.SGD, lr=rate, momentum=MOMENTUM)
        trainer = train.JointTrainer(copy.deepcopy(network), optimizer, seed=seed, progress=False)
        history = trainer.fit(task.loader(self.batch_size, seed), epochs)
        return history[-1]["train_loss"][-1], rate, trainer

    # -- What came of it -----------------------------------------------------------------------------------------------

    def table(self, results: Results) -> Table:
        columns = [(norm, depth) for norm in (False, True) for depth in _option(results, "depth")]
        header = ["activation, initialisation"]
        header += [f"{depth} layers{', BN' if norm else ''}" for norm, depth in columns]
        rows = []
        for activation, initialisation in itertools.product(_option(results, "activation"), _option(results, "init")):
            row = [f"{LABELS[activation]}, {LABELS[initialisation]}"]
            for norm, depth in columns:
                row.append(results.summary(_name(activation, norm, initialisation, depth), "accuracy").text(100))
            rows.append(row)
        updates = results.values(results.cells[0], "updates")[0]
        return Table(
            header, rows, f"Test accuracy in % after {updates} updates: means over seeds ± half of the spread."
        )

    def figures(self, results: Results) -> list[Figure]:
        deepest = max(_option(results, "depth"))
        found = []
        for norm, title in ((False, "without batch norm"), (True, "with batch norm")):
            learned = [cell for cell in results.select(batch_norm=norm) if _learned(results, cell)]
            found.append(
                Figure(
                    f"accuracy-{'bn' if norm else 'plain'}",
                    f"Test accuracy in %, {title}",
                    f"A chart of the test accuracy for each activation and initialisation against depth; "
                    f"{len(learned)} of {len(results.select(batch_norm=norm))} settings learned.",
                    partial(_draw_accuracy, results=results, batch_norm=norm),
                    (5.0, 1.1 + 0.3 * len(_option(results, "init")) * len(_option(results, "activation"))),
                )
            )
        for norm, title in ((False, "without batch norm"), (True, "with batch norm")):
            found.append(
                Figure(
                    f"gradients-{'bn' if norm else 'plain'}",
                    f"Gradient norm of each layer at the start, {deepest} layers, {title}",
                    "Lines of the norm of the gradient with respect to the output of each convolution, on a "
                    "logarithmic axis, one for each initialisation; a panel for each activation. "
                    f"{_range_of_ratios(results, norm, deepest)}",
                    partial(_draw_gradients, results=results, batch_norm=norm, depth=deepest),
                    (5.0, 1.0 + 2.0 * len(_option(results, "activation"))),
                )
            )
        found.append(
            Figure(
                "ratio",
                "Accuracy against the gradient at the first layer over that at the last one",
                "A point for each setting: the test accuracy against the ratio of the gradient norms at the first and "
                "at the last convolution at the start, on a logarithmic axis.",
                partial(_draw_ratio, results=results),
                (5.0, 3.8),
            )
        )
        return found

    def findings(self, results: Results) -> list[Finding]:
        if not any(_learned(results, cell) for cell in results.cells):
            return [Finding("No setting learned anything in so many epochs; more of them are needed.", False)]
        deepest = max(_option(results, "depth"))
        return [
            *_counts(results),
            *_remedies(results, deepest),
            *_by_factor(results, deepest),
            _gradients_tell(results),
        ]


# -- Networks ----------------------------------------------------------------------------------------------------------


def _network(task: Task, cell: Cell, seed: int) -> models.StagedModel:
    """On the CPU, where it is initialised."""
    channels, size = task.image_shape[0], max(task.image_shape[1:])
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(cell.options["depth"]):
        stride = 2 if size > LARGEST_MAP else 1
        size = -(-size // stride)
        layers.append(nn.Conv2d(channels, WIDTH, 3, stride, 1))
        channels = WIDTH
        if cell.options["batch_norm"]:
            layers.append(nn.BatchNorm2d(WIDTH))
        layers.append(ACTIVATIONS[cell.options["activation"]]())
    head = PooledLinearHead(WIDTH, task.num_classes, bins=min(CELLS, size))
    network = models.StagedModel([LocalStage(nn.Sequential(*layers), head)])
    _initialize(network, cell.options["init"], _first_images(task)[0].cpu(), generator)
    return network


def _first_images(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Evenly spread, as files may be sorted by class."""
    count = len(task.train.labels)
    chosen = torch.arange(min(IMAGES, count), device=task.device) * count // min(IMAGES, count)
    return task.normalization.apply(task.train.images[chosen]), task.train.labels[chosen]


def _initialize(network: models.StagedModel, name: str, images: torch.Tensor, generator: torch.Generator) -> None:
    if name == "lsuv":
        init.lsuv_(network, images, generator=generator)
        return
    if name == "data_dependent":
        init.data_dependent_(network, images, generator=generator)
        return
    fills: dict[str, Callable[..., Any]] = {
        "gaussian": partial(nn.init.normal_, std=GAUSSIAN_STD),
        "xavier": nn.init.xavier_normal_,
        "he": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    }
    for layer in layers_of(network):
        weight, bias = layer.parameters()
        fills[name](weight, generator=generator)
        if bias is not None:
            nn.init.zeros_(bias)


# -- Findings ----------------------------------------------------------------------------------------------------------


def _name(activation: str, batch_norm: bool, initialisation: str, depth: int) -> str:
    return f"{activation}-{'bn' if batch_norm else 'plain'}-{initialisation}-{depth}"


def _option(results: Results, name: str) -> list[Any]:
    return list(dict.fromkeys(cell.options[name] for cell in results.cells))


def _gain(results: Results, cell: Cell | str) -> float:
    return results.summary(cell, "accuracy").mean - 1 / results.num_classes


def _learned(results: Results, cell: Cell | str) -> bool:
    best = max(_gain(results, each) for each in results.cells)
    # Less than a tenth above chance is nothing that half of could be told from it.
    return best > 0.1 and _gain(results, cell) > best / 2


def _counts(results: Results) -> list[Finding]:
    findings = []
    for norm in (False, True):
        parts = []
        for depth in _option(results, "depth"):
            cells = results.select(batch_norm=norm, depth=depth)
            parts.append(f"{sum(_learned(results, c) for c in cells)} of {len(cells)} with {depth} layers")
        findings.append(Finding(f"{'With' if norm else 'Without'} batch norm learned: {', '.join(parts)}.", True))
    return findings


def _remedies(results: Results, depth: int) -> list[Finding]:
    """What each change does to the network that was thought impossible: logistic, small Gaussian, no batch norm."""
    start = _name("logistic", False, "gaussian", depth)
    described = f"The network of old ({depth} layers, logistic, small Gaussian weights, no batch norm)"
    accuracy, ratio = results.summary(start, "accuracy"), results.summary(start, "first_over_last")
    verb = "learned" if _learned(results, start) else "did not learn"
    findings = [
        Finding(
            f"{described} {verb}: test accuracy {accuracy.text(100)} %, chance is {100 / results.num_classes:.1f} %. "
            f"At the start the gradient at its first convolution is {ratio.mean:.1e} of that at its last one.",
            True,
        )
    ]
    changes = {
        "ReLU alone": _name("relu", False, "gaussian", depth),
        "He's initialisation alone": _name("logistic", False, "he", depth),
        "LSUV alone": _name("logistic", False, "lsuv", depth),
        "data-dependent initialisation alone": _name("logistic", False, "data_dependent", depth),
        "batch norm alone": _name("logistic", True, "gaussian", depth),
        "ReLU with He's initialisation": _name("relu", False, "he", depth),
        "ReLU with LSUV": _name("relu", False, "lsuv", depth),
        "ReLU with batch norm": _name("relu", True, "gaussian", depth),
        "ReLU with batch norm and LSUV": _name("relu", True, "lsuv", depth),
    }
    names = {cell.name for cell in results.cells}
    for change, name in changes.items():
        if name in names:
            outcome = "It learned." if _learned(results, name) else "It did not learn."
            found = compare(results, name, start, names=(f"the network with {change}", "the network of old"))
            findings.append(Finding(f"{found.text} {outcome}", found.found))
    return findings


def _by_factor(results: Results, depth: int) -> list[Finding]:
    """How many settings of each kind learned at this depth."""
    findings = []
    for option, label in (("activation", "activation"), ("init", "initialisation")):
        parts = []
        for value in _option(results, option):
            cells = results.select(depth=depth, **{option: value})
            parts.append(f"{LABELS[value]} {sum(_learned(results, c) for c in cells)} of {len(cells)}")
        findings.append(Finding(f"Settings with {depth} layers that learned, by {label}: {', '.join(parts)}.", True))
    return findings


def _gradients_tell(results: Results) -> Finding:
    groups: dict[bool, list[bool]] = {True: [], False: []}
    for cell in results.cells:
        ratios = results.values(cell, "first_over_last")
        keeps = all(math.isfinite(r) and 1 / FACTOR <= r <= FACTOR for r in ratios)
        groups[keeps].append(_learned(results, cell))
    kept, lost = groups[True], groups[False]
    if not kept or not lost:
        which = "all" if kept else "no"
        return Finding(
            f"Gradients keep their size at the start (within a factor of {FACTOR:g} from the last to the first "
            f"convolution) in {which} settings, so whether that tells which of them learn cannot be said.",
            False,
        )
    text = (
        f"{sum(kept)} of {len(kept)} settings learned whose gradients keep their size at the start (within a factor of "
        f"{FACTOR:g} from the last to the first convolution), and {sum(lost)} of {len(lost)} others"
    )
    if sum(kept) / len(kept) - sum(lost) / len(lost) > SHARE:
        return Finding(f"{text}.", True)
    return Finding(f"The size of gradients at the start did not tell which settings learn: {text}.", False)


# -- Figures -----------------------------------------------------------------------------------------------------------


def _range_of_ratios(results: Results, batch_norm: bool, depth: int) -> str:
    cells = results.select(batch_norm=batch_norm, depth=depth)
    ratios = [r for cell in cells for r in results.values(cell, "first_over_last") if math.isfinite(r)]
    if not ratios:
        return "None of them is finite."
    return f"The gradient at the first one is between {min(ratios):.0e} and {max(ratios):.0e} of the last one's."


def _clipped(values: Sequence[float]) -> list[float]:
    return [min(max(v, SMALLEST), LARGEST) if math.isfinite(v) else LARGEST for v in values]


def _draw_accuracy(figure: MatplotlibFigure, results: Results, batch_norm: bool) -> None:
    axis = figure.subplots()
    depths = _option(results, "depth")
    kinds = list(itertools.product(_option(results, "activation"), _option(results, "init")))
    values = [
        [100 * results.summary(_name(a, batch_norm, i, depth), "accuracy").mean for depth in depths] for a, i in kinds
    ]
    axis.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for row, column in itertools.product(range(len(kinds)), range(len(depths))):
        value = values[row][column]
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value < 55 else "black")
    axis.set_xticks(range(len(depths)), [f"{depth} layers" for depth in depths])
    axis.set_yticks(range(len(kinds)), [f"{LABELS[a]}, {LABELS[i]}" for a, i in kinds])
    axis.grid(visible=False)
    for row in range(1, len(kinds)):
        if kinds[row][0] != kinds[row - 1][0]:
            axis.axhline(row - 0.5, color="white", linewidth=3)


def _draw_gradients(figure: MatplotlibFigure, results: Results, batch_norm: bool, depth: int) -> None:
    activations = _option(results, "activation")
    axes = figure.subplots(len(activations), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, activation in zip(axes, activations, strict=True):
        for number, initialisation in enumerate(_option(results, "init")):
            layers = results.per_layer(_name(activation, batch_norm, initialisation, depth), "activation_gradient")
            values = _clipped([layer.mean for layer in layers])
            axis.plot(range(1, depth + 1), values, label=LABELS[initialisation], markevery=0.1, **plots.style(number))
        axis.set_yscale("log")
        axis.set_title(LABELS[activation], loc="left", fontsize=11)
    plots.whole_numbers(axes[-1])
    axes[-1].set_xlabel("convolution, from the image to the classifier")
    figure.supylabel("gradient norm", fontsize=11)
    plots.legend_above(figure)


def _draw_ratio(figure: MatplotlibFigure, results: Results) -> None:
    axis = figure.subplots()
    for number, norm in enumerate((False, True)):
        cells = results.select(batch_norm=norm)
        ratios = _clipped([results.summary(cell, "first_over_last").mean for cell in cells])
        accuracies = [100 * results.summary(cell, "accuracy").mean for cell in cells]
        style = plots.style(number) | {"linestyle": "none"}
        axis.plot(ratios, accuracies, label="with batch norm" if norm else "without batch norm", **style)
    axis.axhline(100 / results.num_classes, color=plots.COLOURS[-1], linestyle=":", label="chance")
    axis.set_xscale("log")
    axis.set_xlabel("gradient at the first convolution / at the last one")
    axis.set_ylabel("test accuracy, %")
    plots.legend_above(figure)
