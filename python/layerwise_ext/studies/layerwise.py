"""Question 1: what does training all layers at once buy over training the lower layers first?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from layerwise_ext import models, train
from layerwise_ext.studies import plots
from layerwise_ext.studies.measure import Step, TrainerStep
from layerwise_ext.studies.study import (
    Cell,
    Figure,
    Finding,
    Results,
    Study,
    Summary,
    Table,
    Task,
    compare,
    compare_steps,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

LEARNING_RATE = 5e-4
# Of Nokland & Eidnes 2019: the learning rate falls to a quarter behind these shares of the epochs.
MILESTONES = (0.5, 0.75, 0.89, 0.94)
# Share of a layer's input that its autoencoder does not see: a convolution that has more channels than its input could
# copy it otherwise.
NOISE = 0.25
# vgg8b halves the resolution four times; smaller images get a smaller network.
SMALL_IMAGE = 16
SMALL: tuple[int | str, ...] = (32, 64, "M", 64, 128, "M", 128)
SMALL_HIDDEN = 256
QUICK: tuple[int | str, ...] = (8, "M", 16)
# Of vgg8b on the CPU.
WIDTH_MULTIPLIER = 0.25

LABELS = {
    "joint": "joint",
    "checkpointed": "joint, checkpointed",
    "pred": "local, pred",
    "predsim": "local, predsim",
    "predsim-projected": "local, projected predsim",
    "decoupled": "decoupled",
    "asynchronous": "asynchronous",
    "greedy": "greedy",
    "greedy-split": "greedy, split",
    "autoencoder": "autoencoder first",
    "autoencoder-split": "autoencoder, split",
}
# Of Nokland & Eidnes 2019, for vgg8b: epochs; test error in per cent of joint, pred and projected predsim.
PUBLISHED = {
    "mnist": (100, 0.26, 0.40, 0.31),
    "fashion-mnist": (200, 4.53, 5.66, 4.65),
    "kmnist": (100, 1.53, 2.22, 1.36),
    "cifar10": (400, 5.99, 8.40, 5.58),
    "cifar100": (400, 26.24, 29.32, 24.07),
    "svhn": (100, 2.29, 2.12, 1.74),
    "stl10": (400, 33.08, 26.83, 20.51),
}
LOCAL = ("pred", "predsim", "predsim-projected")
DECOUPLED = ("decoupled", "asynchronous")
WORKERS = 2
# Those that quick runs have.
QUICK_METHODS = ("joint", "pred", "greedy", "autoencoder")


class Layerwise(Study):
    """Joint, local and greedy training, and autoencoders before joint training, of one network."""

    name = "layerwise"
    title = "All layers at once, or the lower layers first"
    question = (
        "What does training all layers at once buy over training the lower layers first: in accuracy, in time, in peak "
        "memory?"
    )
    default_epochs = 8
    max_epochs = 100

    def cells(self, task: Task) -> list[Cell]:
        methods = [name for name in LABELS if not task.quick or name in QUICK_METHODS]
        return [
            Cell(name, {"method": name}, trained=name != "checkpointed", has_processes=name in DECOUPLED)
            for name in methods
        ]

    def setup(self, task: Task) -> dict[str, str]:
        network = _network(task, "joint", 0)
        parameters = sum(p.numel() for p in network.backbone().parameters())
        if task.quick:
            name = "a small VGG for quick runs"
        elif min(task.image_shape[1:]) < SMALL_IMAGE:
            name = f"a VGG for small images ({_config_text(SMALL)}, then a hidden layer of {SMALL_HIDDEN})"
        else:
            name = f"vgg8b at {_width(task):g} of its width"
        return {
            "network": f"{name}: {len(network)} stages, {parameters:,} parameters without local heads; convolution, "
            "batch norm, ReLU (leaky ReLU for both forms of predsim); no dropout, no augmentation",
            "optimiser": f"Adam, learning rate {LEARNING_RATE:g}, a quarter of it behind 50, 75, 89 and 94 % of the "
            "epochs of each stage; local and greedy: one optimiser for each stage",
            "joint": "backpropagation from the output; checkpointed: only the inputs of stages are kept, and what is "
            "between is computed again in the backward pass (arXiv 1604.06174): the same numbers, so only its step is "
            "measured",
            "local": "every stage in each step on its own loss (arXiv 1901.06656): pred is pooling and a classifier, "
            "predsim adds similarity matching, here from the moments of the map; projected: the paper's form, with "
            "a convolution of its own for the similarities",
            "decoupled": f"local training on pred in {WORKERS} processes, a part of the stages in each: the numbers "
            "of one process but for rounding; asynchronous: no process waits for the one before it, batches come "
            "from a replay buffer (arXiv 1901.08164). The time has that of starting the processes in it",
            "greedy": "one stage after another (arXiv 1812.11446), the outputs of earlier ones kept in memory; two "
            "accounts: all epochs for each stage, which is as many updates of each layer as in joint training, or "
            "(split) the epochs shared among the stages, in whole ones and at least one for each, which comes as near "
            "as that allows to as many passes over the images",
            "autoencoder": f"stacked convolutional autoencoders with {NOISE:.0%} masking noise, half of the epochs for "
            "each layer, then joint training; two accounts: all epochs on top (more work than any other method here), "
            "or (split) the other half of them",
            "step": "time: a step of everything that a method trains (greedy: each stage in turn, without the cache; "
            "autoencoder: a step of pretraining for each layer in turn), median of rounds in which all methods take "
            "their turn; memory: what a step adds in a fresh process, the cache of greedy training not included",
            **_published(task),
        }

    def run(self, task: Task, cell: Cell, seed: int, epochs: int) -> dict[str, Any]:
        method = cell.options["method"]
        network = _network(task, method, seed)
        loader = task.loader(self.batch_size, seed)
        first, epochs = schedule(method, epochs, len(network))
        seconds = 0.0
        if first:
            pretrainer = _pretrainer(task, network, seed)
            pretrainer.fit(loader, first)
            seconds = sum(record["seconds"] for record in pretrainer.history)
        trainer = _trainer(task, method, network, epochs, seed)
        history = trainer.fit(loader, epochs, task.test_loader())
        elapsed = list(itertools.accumulate((record["seconds"] for record in history), initial=seconds))[1:]
        return {
            "accuracy": history[-1]["val_accuracy"][-1],
            "accuracy_by_stage": history[-1]["val_accuracy"],
            "train_loss": history[-1]["train_loss"][-1],
            "training_seconds": elapsed[-1],
            "stages": len(network),
            "curve_seconds": elapsed,
            "curve_accuracy": [record["val_accuracy"][-1] for record in history],
        }

    def step(self, task: Task, cell: Cell) -> Step | None:
        method = cell.options["method"]
        if method.endswith("-split") or method in DECOUPLED:
            return None
        network = _network(task, method, 0)
        images, target = next(iter(task.loader(self.step_batch(task), 0)))
        if method == "autoencoder":
            return TrainerStep(_pretrainer(task, network, 0), images, target)
        return TrainerStep(_trainer(task, method, network, 1, 0), images, target)

    # -- What came of it -----------------------------------------------------------------------------------------------

    def table(self, results: Results) -> Table:
        header = ["method", "epochs", "test accuracy, %", "training, s", "step, ms", "peak of a step, MiB"]
        rows = []
        for cell in results.cells:
            measured = results.measured.get(cell.name, {})
            trained = [epochs_text(results, cell), *_texts(results, cell)] if cell.trained else ["", "as joint", ""]
            step, peak = measured.get("step_ms"), measured.get("peak_mib")
            rows.append([LABELS[cell.name], *trained, _number(step), _number(peak)])
        caption = (
            "Means over seeds ± half of the spread. Training: all of it, without evaluation, in the order of the runs; "
            "the steps were timed in turn and compare better. A step of autoencoders is one of pretraining."
        )
        return Table(header, rows, caption)

    def figures(self, results: Results) -> list[Figure]:
        cells = [cell for cell in results.cells if cell.trained]
        accuracies = "; ".join(f"{LABELS[c.name]} {100 * results.summary(c, 'accuracy').mean:.1f}" for c in cells)
        found = [
            Figure(
                "accuracy",
                "Test accuracy, %",
                f"Test accuracy in per cent: {accuracies}.",
                lambda figure: _draw_accuracy(figure, results, cells),
                (5.0, 0.9 + 0.36 * len(cells)),
            ),
            Figure(
                "time",
                "Test accuracy against training time",
                "Lines of the test accuracy after each epoch against the seconds of training up to it, for each "
                "method; seed 0.",
                lambda figure: _draw_curves(figure, results, cells),
                (5.0, 4.4),
            ),
            Figure(
                "stages",
                "Test accuracy of each stage's own head",
                "Lines of the test accuracy against the stage, for methods whose hidden stages have classifiers; joint "
                "training as a level line.",
                lambda figure: _draw_stages(figure, results, cells),
                (5.0, 4.0),
            ),
        ]
        for key, name, title in (("step_ms", "step", "Time of a training step, ms"),
                                 ("peak_mib", "memory", "Peak memory of a training step, MiB")):  # fmt: skip
            values = {n: m[key] for n, m in results.measured.items() if key in m}
            if values:
                found.append(_bars(name, title, values))
        return found

    def findings(self, results: Results) -> list[Finding]:
        names = {cell.name for cell in results.cells}

        def about(first: str, second: str) -> list[Finding]:
            if not {first, second} <= names:
                return []
            return [compare(results, first, second, names=(_phrase(first), _phrase(second)))]

        findings = []
        others = (*LOCAL, "asynchronous", "greedy", "greedy-split", "autoencoder", "autoencoder-split")
        for other in others:
            findings += about("joint", other)
        findings += about("predsim", "pred") + about("predsim-projected", "predsim")
        findings += about("decoupled", "pred") + about("asynchronous", "pred")
        findings += about("greedy", "pred") + about("greedy", "greedy-split")
        for cell in results.cells:
            findings += _failure(results, cell)
        for other in ("checkpointed", *LOCAL, "greedy"):
            findings += compare_steps(results, other, "joint", names=(_phrase(other), _phrase("joint")))
        forms = ("predsim", "predsim-projected")
        findings += compare_steps(results, *forms, names=(_phrase(forms[0]), _phrase(forms[1])))
        return findings


# -- Networks and trainers ---------------------------------------------------------------------------------------------


def schedule(method: str, epochs: int, stages: int) -> tuple[int, int]:
    """Epochs of pretraining for each layer, and of training (greedy: for each stage), where joint training has
    ``epochs``."""
    if method == "greedy-split":
        return 0, max(1, round(epochs / stages))
    if not method.startswith("autoencoder"):
        return 0, epochs
    first = max(1, epochs // 2)
    return first, epochs if method == "autoencoder" else max(1, epochs - first)


def _network(task: Task, method: str, seed: int) -> models.StagedModel:
    height, width = task.image_shape[1:]
    config: str | list[int | str]
    if task.quick:
        config, hidden, multiplier = list(QUICK), 32, 1.0
    elif min(height, width) < SMALL_IMAGE:
        config, hidden, multiplier = list(SMALL), SMALL_HIDDEN, 1.0
    else:
        config, hidden, multiplier = "vgg8b", 1024, _width(task)
    network = models.vgg(
        config,
        in_channels=task.image_shape[0],
        num_classes=task.num_classes,
        image_size=(height, width),
        width_multiplier=multiplier,
        hidden=hidden,
        dim=2048 if task.image_shape[0] == 3 else 1024,
        head={"predsim": "predsim", "predsim-projected": "predsim_projected"}.get(method, "pooled_linear"),
        activation="leaky_relu" if method.startswith("predsim") else "relu",
        seed=seed,
    )
    return network.to(task.device)


def _width(task: Task) -> float:
    return 1.0 if task.device.type == "cuda" else WIDTH_MULTIPLIER


def _published(task: Task) -> dict[str, str]:
    """What the paper has for this data set, where the study has its network."""
    if task.quick or task.name not in PUBLISHED:
        return {}
    epochs, *errors = PUBLISHED[task.name]
    methods = ("joint", "pred", "predsim-projected")
    values = "; ".join(f"{LABELS[name]} {100 - error:.2f}" for name, error in zip(methods, errors, strict=True))
    network = f"vgg8b in full width, dropout, {epochs} epochs of all training images"
    return {"published": f"test accuracy in per cent of {network} (arXiv 1901.06656): {values}"}


def _config_text(config: tuple[int | str, ...]) -> str:
    return " ".join(map(str, config))


def _adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LEARNING_RATE)


def _falling(epochs: int) -> Callable[[torch.optim.Optimizer], MultiStepLR]:
    milestones = [max(1, round(share * epochs)) for share in MILESTONES]
    return lambda optimizer: MultiStepLR(optimizer, milestones, gamma=0.25)


def _trainer(task: Task, method: str, network: models.StagedModel, epochs: int, seed: int) -> train.Trainer:
    options: dict[str, Any] = {"device": task.device, "seed": seed, "progress": False, "scheduler": _falling(epochs)}
    if method in LOCAL:
        return train.LocalTrainer(network, _adam, **options)
    if method in DECOUPLED:
        asynchronous = method == "asynchronous"
        return train.DecoupledTrainer(network, _adam, workers=WORKERS, asynchronous=asynchronous, **options)
    if method.startswith("greedy"):
        return train.GreedyTrainer(network, _adam, **options)
    return train.JointTrainer(network, _adam, checkpointing=method == "checkpointed", **options)


def _pretrainer(task: Task, network: models.StagedModel, seed: int) -> train.AutoencoderPretrainer:
    return train.AutoencoderPretrainer(network, _adam, noise=NOISE, device=task.device, seed=seed, progress=False)


# -- Texts and figures -------------------------------------------------------------------------------------------------


def _phrase(name: str) -> str:
    return {
        "joint": "joint training",
        "checkpointed": "checkpointed joint training",
        "pred": "local training (pred)",
        "predsim": "local training (predsim)",
        "predsim-projected": "local training (projected predsim)",
        "decoupled": "decoupled training",
        "asynchronous": "asynchronous decoupled training",
        "greedy": "greedy training",
        "greedy-split": "greedy training with split epochs",
        "autoencoder": "joint training behind autoencoders",
        "autoencoder-split": "joint training behind autoencoders with split epochs",
    }[name]


def epochs_text(results: Results, cell: Cell) -> str:
    """Such as ``'8'``, ``'8 per stage, 56 passes'``, ``'4 per layer + 8'``."""
    runs = [run for run in results.runs if run.cell == cell.name]
    if not runs:
        return ""
    first, epochs = schedule(cell.options["method"], runs[0].epochs, runs[0].values["stages"])
    if first:
        return f"{first} per layer + {epochs}"
    passes = epochs * runs[0].values["stages"]
    return f"{epochs} per stage, {passes} passes" if cell.name.startswith("greedy") else str(epochs)


def _texts(results: Results, cell: Cell) -> list[str]:
    return [results.summary(cell, "accuracy").text(100), results.summary(cell, "training_seconds").text()]


def _failure(results: Results, cell: Cell) -> list[Finding]:
    """Seeds that ended no better than twice chance."""
    values = results.values(cell, "accuracy")
    failed = sum(value < 2 / results.num_classes for value in values)
    if not failed:
        return []
    phrase = _phrase(cell.name)
    return [Finding(f"{phrase[0].upper()}{phrase[1:]} did not learn with {failed} of {len(values)} seeds.", True)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _draw_accuracy(figure: MatplotlibFigure, results: Results, cells: list[Cell]) -> None:
    summaries = [results.summary(cell, "accuracy") for cell in cells]
    plots.points(figure.subplots(), [LABELS[cell.name] for cell in cells], summaries, scale=100)


def _draw_curves(figure: MatplotlibFigure, results: Results, cells: list[Cell]) -> None:
    axis = figure.subplots()
    for number, cell in enumerate(cells):
        seconds, accuracy = (results.values(cell, key)[0] for key in ("curve_seconds", "curve_accuracy"))
        axis.plot(seconds, [100 * value for value in accuracy], label=LABELS[cell.name], **plots.style(number))
    axis.set_xscale("log")
    axis.set_xlabel("seconds of training (seed 0)")
    axis.set_ylabel("test accuracy, %")
    plots.legend_above(figure)


def _draw_stages(figure: MatplotlibFigure, results: Results, cells: list[Cell]) -> None:
    axis = figure.subplots()
    for number, cell in enumerate(cells):
        layers = results.per_layer(cell, "accuracy_by_stage")
        if len(layers) > 1:
            plots.line(axis, range(1, len(layers) + 1), layers, LABELS[cell.name], number, scale=100)
        elif cell.name == "joint":
            axis.axhline(100 * layers[0].mean, color=plots.COLOURS[number], linestyle="--", label=LABELS[cell.name])
    plots.whole_numbers(axis)
    axis.set_xlabel("stage")
    axis.set_ylabel("test accuracy, %")
    plots.legend_above(figure)


def _bars(name: str, title: str, values: dict[str, float]) -> Figure:
    labels = [LABELS[cell] for cell in values]
    summaries = [Summary.of([value]) for value in values.values()]
    text = "; ".join(f"{label} {value:.1f}" for label, value in zip(labels, values.values(), strict=True))

    def draw(figure: MatplotlibFigure) -> None:
        plots.bars(figure.subplots(), labels, summaries)

    return Figure(name, title, f"Bars: {text}.", draw, (5.0, 0.9 + 0.36 * len(labels)))
