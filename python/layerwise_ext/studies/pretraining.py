"""Question 3: what autoencoders are still worth, against the number of labels."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from layerwise_ext import data, init, models, train
from layerwise_ext.studies import plots
from layerwise_ext.studies.study import Cell, Figure, Finding, Results, Study, Summary, Table, Task
from layerwise_ext.studies.words import augmentation, listed, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

# Labelled images of each class; then all of them.
PER_CLASS = (1, 5, 10, 50)
NETWORKS = {"now": "BN + ReLU + LSUV", "before": "sigmoid, small weights"}
WIDTH_MULTIPLIER = 0.25  # on the CPU; half of it for images below SMALL_IMAGE
SMALL_IMAGE = 16
SMALL = 0.01  # standard deviation of the weights of before
NOISE = 0.25
LR = 1e-3
LSUV_IMAGES = 256


class Pretraining(Study):
    """Paired: with and without pretraining, a seed has the same labelled images, initial weights and batches."""

    name = "pretraining"
    title = "Autoencoders before training"
    question = "With BN + ReLU + LSUV, is pretraining with autoencoders still worth it?"
    default_epochs = 12
    max_epochs = 100

    def cells(self, task: Task) -> list[Cell]:
        return [
            Cell(_name(network, pretrained), {"network": network, "pretrained": pretrained})
            for network in NETWORKS
            for pretrained in (False, True)
        ]

    def run(self, task: Task, cell: Cell, seed: int, epochs: int) -> dict[str, Any]:
        model = initial_network(task, cell.options["network"], seed)
        values: dict[str, Any] = {}
        if cell.options["pretrained"]:
            start = time.perf_counter()
            values["reconstruction_error"] = pretrain(task, model, seed, epochs, self.batch_size)
            values["pretraining_seconds"] = time.perf_counter() - start
        subsets = label_subsets(task, seed)
        start = time.perf_counter()
        values["accuracy"] = [fine_tune(task, copy.deepcopy(model), s, seed, epochs, self.batch_size) for s in subsets]
        values["tuning_seconds"] = (time.perf_counter() - start) / len(subsets)
        values["labels"] = [len(subset.labels) for subset in subsets]
        return values

    def setup(self, task: Task) -> dict[str, str]:
        network = initial_network(task, "now", 0)
        return {
            "network": f"vgg8b (arXiv 1901.06656) at {_width(task):g} of its width, with as many of its pools as the "
            f"image has room for: {len(network)} stages, "
            f"{sum(p.numel() for p in network.backbone().parameters()):,} parameters",
            NETWORKS["now"]: "batch norm and ReLU behind each convolution; LSUV (arXiv 1511.06422) on "
            f"{LSUV_IMAGES} training images",
            NETWORKS["before"]: f"sigmoids, no batch norm, weights from N(0, {SMALL:g}²): a network of the time when "
            "pretraining was held to be necessary",
            "pretraining": f"stacked denoising autoencoders (Vincent et al. 2008), one for each layer: {NOISE:.0%} of "
            f"its input set to zero, a linear decoder, mean squared error, Adam at {LR:g}, on all training images "
            "without their labels; the data set is encoded once for each layer where the codes fit into memory",
            "labels": "balanced and nested: the images of a small subset are among those of a larger one; the seed "
            "draws subset, initial weights and batches, the same with and without pretraining, and differences are "
            "taken seed by seed",
            "fine-tuning": f"all layers jointly, Adam at {LR:g} falling to 0 as a cosine; as many updates as the "
            "epochs of all training images have, whatever the number of labels; batches of all labelled images where "
            f"they are fewer than the batch size; {augmentation(task.name)}, with and without "
            "pretraining",
            "accuracy": "of the test images after the last update: nothing is chosen on them",
        }

    def table(self, results: Results) -> Table:
        networks = _networks(results)
        header = ["labels"]
        columns: list[list[str]] = []
        for network in networks:
            header += [NETWORKS[network], "pretrained", "difference"]
            for pretrained in (False, True):
                columns.append([s.text(100) for s in results.per_layer(_name(network, pretrained), "accuracy")])
            columns.append([gain.text(100) for gain in _gains(results, network)])
        rows = list(zip(map(str, _labels(results)), *columns, strict=True))
        caption = "Test accuracy in per cent, means over seeds ± half of the spread; the difference in points."
        return Table(header, rows, caption)

    def figures(self, results: Results) -> list[Figure]:
        labels = _labels(results)
        accuracy, gain = [], []
        for network in _networks(results):
            ends = [results.per_layer(_name(network, p), "accuracy")[0].text(100) for p in (False, True)]
            accuracy.append(f"{NETWORKS[network]}: {ends[0]} % without, {ends[1]} % with pretraining at {labels[0]}")
            gains = _gains(results, network)
            gain.append(f"{NETWORKS[network]}: {points(gains[0])} at {labels[0]}, {points(gains[-1])} at {labels[-1]}")
        return [
            Figure(
                "pretraining-accuracy",
                "Accuracy against the number of labels",
                f"Lines of test accuracy over the number of labels. {'; '.join(accuracy)} labels.",
                lambda figure: _draw_accuracy(results, figure),
            ),
            Figure(
                "pretraining-difference",
                "What pretraining adds, seed by seed",
                f"Accuracy with pretraining minus without, over the number of labels. {'; '.join(gain)} labels.",
                lambda figure: _draw_gains(results, figure),
            ),
        ]

    def findings(self, results: Results) -> list[Finding]:
        networks = _networks(results)
        found = [_effect(results, network) for network in networks]
        if len(results.seeds) > 1:
            found += [_claim(results), _contrast(results), _successor(results)]
        failures = [finding for network in networks for finding in _failures(results, network)]
        return [*found, *failures, *(_cost(results, network) for network in networks)]


# -- Runs --------------------------------------------------------------------------------------------------------------


def initial_network(task: Task, network: str, seed: int) -> models.StagedModel:
    """The network of NETWORKS with this name, on the task's device; the labels have no part in it."""
    model = models.vgg(
        _config(task.image_shape[1:]),
        in_channels=task.image_shape[0],
        num_classes=task.num_classes,
        image_size=task.image_shape[1:],
        width_multiplier=_width(task),
        fused=network == "now",
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    if network == "now":
        model.to(task.device)
        init.lsuv_(model, _spread_images(task, LSUV_IMAGES), generator=generator)
        return model
    for stage in model:
        stage.body.bn = nn.Identity()
        stage.body.act = nn.Sigmoid()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=SMALL, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model.to(task.device)


def label_subsets(task: Task, seed: int) -> list[data.Split]:
    """Balanced and nested, the smallest first; all training images last.

    A class that does not have enough images for a size makes it smaller.
    """
    counts = torch.bincount(task.train.labels.cpu())
    present = counts[counts > 0]
    sizes = [min(size, int(present.min())) for size in (PER_CLASS[:2] if task.quick else PER_CLASS)]
    sizes = [size for size in dict.fromkeys(sizes) if size * len(present) < len(task.train.labels)]
    return [*(data.subset(task.train, per_class=size, seed=seed) for size in sizes), task.train]


def pretrain(task: Task, model: models.StagedModel, seed: int, epochs: int, batch_size: int) -> list[float]:
    """In place, on all images; the last reconstruction error of each layer."""
    trainer = train.AutoencoderPretrainer(model, _adam, noise=NOISE, device=task.device, seed=seed, progress=False)
    trainer.fit(task.loader(batch_size, seed), epochs)
    return [record["train_loss"][0] for record in trainer.history[epochs - 1 :: epochs]]


def fine_tune(
    task: Task, model: models.StagedModel, labelled: data.Split, seed: int, epochs: int, batch_size: int
) -> float:
    """Test accuracy after ``epochs`` times the updates of an epoch of all training images, in place."""
    loader = task.loader(batch_size, seed, labelled)
    loader.augment = data.standard_augment(data.info(task.name))
    updates = len(task.loader(batch_size, seed))
    trainer = train.JointTrainer(
        model,
        _adam,
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, epochs),
        device=task.device,
        seed=seed,
        progress=False,
    )
    trainer.fit(_Updates(loader, updates), epochs)
    return float(trainer.evaluate(task.test_loader())["final"])


class _Updates:
    """So many batches, from as many passes over a loader as that takes."""

    def __init__(self, loader: data.MemoryLoader, count: int) -> None:
        self.loader = loader
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        passes = itertools.chain.from_iterable(itertools.repeat(self.loader))
        return itertools.islice(passes, self.count)


def _adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LR)


def _width(task: Task) -> float:
    if task.quick:
        return WIDTH_MULTIPLIER / 4
    if min(task.image_shape[1:]) < SMALL_IMAGE:
        return WIDTH_MULTIPLIER / 2
    return 1.0 if task.device.type == "cuda" else WIDTH_MULTIPLIER


def _config(image_size: tuple[int, int]) -> list[int | str]:
    """vgg8b's layers; a pool stays where it leaves a map of 2x2 or more."""
    size = min(image_size)
    config: list[int | str] = []
    for layer in models.VGG_CONFIGS["vgg8b"]:
        if layer == "M":
            if size < 4:
                continue
            size //= 2
        config.append(layer)
    return config


def _spread_images(task: Task, count: int) -> Tensor:
    """Evenly spread over the training images, which files may have sorted by class."""
    total = len(task.train.labels)
    count = min(count, total)
    indices = torch.arange(count, device=task.train.images.device) * total // count
    return task.normalization.apply(task.train.images[indices])


def _name(network: str, pretrained: bool) -> str:
    return f"{network}-{'pretrained' if pretrained else 'random'}"


# -- What the results say ----------------------------------------------------------------------------------------------


def _networks(results: Results) -> list[str]:
    return list(dict.fromkeys(cell.options["network"] for cell in results.cells))


def _labels(results: Results) -> list[int]:
    labels: list[int] = results.values(results.cells[0], "labels")[0]
    return labels


def _gains(results: Results, network: str) -> list[Summary]:
    """Accuracy with pretraining minus without, seed by seed, for each number of labels."""
    pairs = results.paired(_name(network, True), _name(network, False), "accuracy")
    return [Summary.of(gains) for gains in zip(*pairs, strict=True)]


def _sorted_out(
    results: Results, labels: Sequence[int], differences: Sequence[Summary]
) -> tuple[list[str], list[str], list[str]]:
    """Numbers of labels with a difference above 0, with one below, and with none that can be told."""
    above: list[str] = []
    below: list[str] = []
    none: list[str] = []
    for count, difference in zip(labels, differences, strict=True):
        side = (above if difference.mean > 0 else below) if difference.differs(1 / results.test_images) else none
        side.append(_at(count, difference))
    return above, below, none


def _at(count: int, difference: Summary) -> str:
    return f"{count} labels ({points(difference)})"


def _effect(results: Results, network: str) -> Finding:
    gains = _gains(results, network)
    above, below, none = _sorted_out(results, _labels(results), gains)
    name = NETWORKS[network]
    if gains[0].seeds == 1:
        return Finding(f"{name}: pretraining changed the accuracy with {listed(none)}; with one seed there is no "
                       "spread, so this may be chance.", False)  # fmt: skip
    parts = []
    if above:
        parts.append(f"pretraining helped by more than the spread over seeds with {listed(above)}")
    if below:
        parts.append(f"{'it' if above else 'pretraining'} lowered the accuracy with {listed(below)}")
    if none:
        parts.append(f"no difference was found with {listed(none)}")
    return Finding(f"{name}: {'; '.join(parts)}.", bool(above or below))


def _failures(results: Results, network: str) -> list[Finding]:
    """Numbers of labels with which it did not learn, where a gain of nothing says nothing."""
    failed = {}
    for pretrained in (False, True):
        accuracies = results.per_layer(_name(network, pretrained), "accuracy")
        failed[pretrained] = [
            f"{count} labels ({accuracy.text(100)} %)"
            for count, accuracy in zip(_labels(results), accuracies, strict=True)
            if accuracy.mean < 2 / results.num_classes
        ]
    return [
        Finding(f"{NETWORKS[network]} {'with' if pretrained else 'without'} pretraining was below twice chance with "
                f"{listed(counts)}.", True)
        for pretrained, counts in failed.items() if counts
    ]  # fmt: skip


def _claim(results: Results) -> Finding:
    """That it pays where labels are scarce, and not otherwise."""
    labels, gains = _labels(results), _gains(results, "now")
    name, resolution = NETWORKS["now"], 1 / results.test_images
    few, many = f"{labels[0]} labels", f"{labels[-1]} labels"
    scarce = gains[0].mean > 0 and gains[0].differs(resolution)
    plenty = gains[-1].mean > 0 and gains[-1].differs(resolution)
    claim = "that autoencoders pay where labels are scarce, and not otherwise"
    if scarce and not plenty:
        text = f"Given {name}, the claim {claim}, held here: they helped with {few} and not with {many}."
    elif scarce:
        text = f"Given {name}, the claim {claim}, did not hold here: they helped with {few}, and with {many}, too."
    elif plenty:
        text = f"Given {name}, the claim {claim}, did not hold here: they helped with {many} and not with {few}."
    else:
        text = (
            f"Given {name}, the claim {claim}, was not confirmed here: with neither {few} nor {many} a gain was found."
        )
    return Finding(text, scarce and not plenty)


def _contrast(results: Results) -> Finding:
    """Whether the network of before gained more; where it gained nothing, that of now can only have lost."""
    pairs = [results.paired(_name(n, True), _name(n, False), "accuracy") for n in ("before", "now")]
    by_seed = [[a - b for a, b in zip(*seed, strict=True)] for seed in zip(*pairs, strict=True)]
    differences = [Summary.of(values) for values in zip(*by_seed, strict=True)]
    _, below, _ = _sorted_out(results, _labels(results), differences)
    resolution = 1 / results.test_images
    more: list[str] = []
    lost_less: list[str] = []
    for count, difference, gain in zip(_labels(results), differences, _gains(results, "before"), strict=True):
        if difference.mean > 0 and difference.differs(resolution):
            (more if gain.mean > resolution else lost_less).append(_at(count, difference))
    before, now = NETWORKS["before"], NETWORKS["now"]
    parts = []
    if more:
        parts.append(f"gained more from pretraining than that of now ({now}) with {listed(more)}")
    if lost_less:
        parts.append(f"did not gain, but lost less by it than that of now ({now}) with {listed(lost_less)}")
    if below:
        parts.append(f"gained less than that of now ({now}) with {listed(below)}")
    if parts:
        return Finding(f"The network of before ({before}) {'; it '.join(parts)}.", True)
    return Finding(f"That the network of before ({before}) gains more from pretraining than that of now ({now}) was "
                   "not found with any number of labels.", False)  # fmt: skip


def _successor(results: Results) -> Finding:
    """Whether the network of now does without what the network of before needed."""
    pairs = results.paired("now-random", "before-pretrained", "accuracy")
    differences = [Summary.of(values) for values in zip(*pairs, strict=True)]
    above, _, _ = _sorted_out(results, _labels(results), differences)
    now, before = NETWORKS["now"], NETWORKS["before"]
    if above:
        text = f"{now} without pretraining is more accurate than {before} with it with {listed(above)}."
        return Finding(text, True)
    return Finding(f"That {now} without pretraining is more accurate than {before} with it was not found.", False)


def _cost(results: Results, network: str) -> Finding:
    seconds = results.summary(_name(network, True), "pretraining_seconds").mean
    tuning = results.summary(_name(network, True), "tuning_seconds").mean
    return Finding(
        f"{NETWORKS[network]}: pretraining took {seconds:.3g} s, {seconds / tuning:.2g} times a fine-tuning "
        f"({tuning:.3g} s), and serves every number of labels. The network without it was not given that time.",
        True,
    )


# -- Figures -----------------------------------------------------------------------------------------------------------


def _draw_accuracy(results: Results, figure: MatplotlibFigure) -> None:
    axis = figure.subplots()
    labels = _labels(results)
    for number, network in enumerate(_networks(results)):
        for pretrained in (False, True):
            accuracy = results.per_layer(_name(network, pretrained), "accuracy")
            name = f"{NETWORKS[network]}{', pretrained' if pretrained else ''}"
            dashes = 0 if pretrained else len(plots.COLOURS)
            plots.line(axis, labels, accuracy, name, number + dashes, scale=100)
    axis.axhline(100 / results.num_classes, color="#888888", linewidth=1, linestyle=":", label="chance")
    _label_axis(axis, labels)
    axis.set_ylabel("test accuracy, %")
    plots.legend_above(figure, 1)


def _draw_gains(results: Results, figure: MatplotlibFigure) -> None:
    axis = figure.subplots()
    labels = _labels(results)
    axis.axhline(0, color="#888888", linewidth=1)
    for number, network in enumerate(_networks(results)):
        plots.line(axis, labels, _gains(results, network), NETWORKS[network], number, scale=100)
        for seed in results.paired(_name(network, True), _name(network, False), "accuracy"):
            axis.plot(labels, [100 * gain for gain in seed], ".", color=plots.COLOURS[number], alpha=0.5)
    _label_axis(axis, labels)
    axis.set_ylabel("accuracy gained, points")
    plots.legend_above(figure, 1)


def _label_axis(axis: Any, labels: Sequence[int]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(labels, [f"{count:,}" for count in labels])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("labelled training images")
