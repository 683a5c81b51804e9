"""Question 4: depth, and downsampling earlier, in layer-wise learning."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from layerwise_ext import data, models, probe, train
from layerwise_ext.models.build import _largest_grid
from layerwise_ext.nn import PredSimHead
from layerwise_ext.studies import scaling_figures, scaling_results
from layerwise_ext.studies.convolution_losses import on_every_convolution
from layerwise_ext.studies.measure import Step, TrainerStep
from layerwise_ext.studies.scaling_results import ARMS, CHECKPOINTED, MEASURED
from layerwise_ext.studies.study import Cell, Figure, Finding, Results, Study, Table, Task
from layerwise_ext.studies.words import augmentation

# Blocks in each group: 2 * blocks * groups + 2 layers.
BLOCKS = (1, 2, 3, 5)
SMALL_IMAGE = 16  # below it three groups of blocks, whose last map would otherwise be a pixel
WIDTH = 16  # channels of the first group, on the CPU
LR = 2e-3
MILESTONES = (0.5, 0.75, 0.89, 0.94)  # of Nokland & Eidnes 2019, as shares of the epochs
BETA = 0.99
DIM = 1024  # features of a local classifier
PROBE_DIM = 256  # features of a linear probe
PROBE_IMAGES = 5000  # that it is fitted to
# Convolutions to a local loss, in networks of the depth of INTENSITY_DEPTH; those of ARMS have 2, a block.
INTENSITIES = (1, 4, 8)
INTENSITY_DEPTH = 2  # index in BLOCKS


class Scaling(Study):
    """Joint, local, and local with accelerated downsampling, on the same epochs; a seed has the same batches in all."""

    name = "scaling"
    title = "Depth and accelerated downsampling"
    question = "Why is layer-wise learning hard to scale up, and does accelerated downsampling fix it?"
    default_epochs = 3
    max_epochs = 160

    def cells(self, task: Task) -> list[Cell]:
        if task.quick:
            return [_cell(task, arm, blocks) for blocks in BLOCKS[:2] for arm in MEASURED]
        cells = [_cell(task, arm, blocks) for blocks in BLOCKS for arm in (*ARMS, CHECKPOINTED)]
        cells += [_cell(task, "local-pred", blocks) for blocks in (BLOCKS[0], BLOCKS[-1])]
        return cells + [_cell(task, "local", BLOCKS[INTENSITY_DEPTH], count) for count in INTENSITIES]

    def run(self, task: Task, cell: Cell, seed: int, epochs: int) -> dict[str, Any]:
        model = network(task, cell, seed)
        trainer = _trainer(task, cell, model, seed, epochs)
        loader = task.loader(self.batch_size, seed)
        loader.augment = data.standard_augment(data.info(task.name))
        trainer.fit(loader, epochs)
        scores = trainer.evaluate(task.test_loader())
        layers = _separability(task, model)
        third = max(1, len(layers) // 3)
        cost = models.summary(model, task.image_shape)
        kept = cost.memory_bytes(self.step_batch(task))
        return {
            "accuracy": scores["final"],
            "train_accuracy": trainer.history[-1]["train_accuracy"][-1],
            "probe": [layer.accuracy for layer in layers],
            "fisher": [layer.fisher_ratio for layer in layers],
            "cosine": [layer.cosine_gap for layer in layers],
            "shallow_probe": statistics.fmean(layer.accuracy for layer in layers[:third]),
            "last_probe": layers[-1].accuracy,
            "kept_mib": (sum(kept) if cell.options["method"] == "joint" else _largest_block(kept, cell)) / 2**20,
            "multiply_adds": sum(stage.multiply_adds for stage in cost.stages),
            "training_seconds": sum(record["seconds"] for record in trainer.history),
        }

    def step(self, task: Task, cell: Cell) -> Step | None:
        if cell.options["convolutions"] != 2 or cell.options["arm"] not in MEASURED:
            return None
        images, target = next(iter(task.loader(self.step_batch(task), 0)))
        return TrainerStep(_trainer(task, cell, network(task, cell, 0), 0, 1), images, target)

    def setup(self, task: Task) -> dict[str, str]:
        depths = dict.fromkeys(cell.options["depth"] for cell in self.cells(task))
        groups = _groups(task)
        halved = [network(task, _cell(task, arm, BLOCKS[0]), 0).downsampling for arm in ("local", "local-accelerated")]
        schedules = " and ".join(str(list(units or ())) for units in halved)
        return {
            "network": f"ResNets of {', '.join(map(str, depths))} layers: a 3x3 stem and {groups} groups of equally "
            f"many basic blocks, {_width(task)} to {_width(task) * 2 ** (groups - 1)} channels, strides of 2 from the "
            "second group on (arXiv 2010.08038 had four groups of 64 to 512 channels; here three for images below "
            f"{SMALL_IMAGE} pixels)",
            "joint": "backpropagation from the output; ReLU; checkpointed: only the inputs of stages are kept, and "
            "what is inside is computed again",
            "local": "a loss for the stem and for each block, no gradient across (arXiv 1901.06656): predsim here from "
            f"the moments of the map, with beta {BETA} and leaky ReLU; where it says pred, its classifier alone with "
            "ReLU",
            "accelerated": "each halving of the resolution one group of blocks earlier, the first one in the stem, "
            "with the same layers, widths and final resolution; the shallowest network halves it in units "
            f"{schedules}, standard and accelerated. Which layers arXiv 2010.08038 chose is not public: this schedule "
            "is this package's",
            "convolutions per loss": "2, a block, where nothing is said; 1: a block's first convolution has a loss, "
            "too, as in the code of arXiv 1901.06656; 4 and 8: two and four blocks are trained jointly, on the last "
            "one's loss",
            "optimiser": f"Adam at {LR:g}, a quarter of it behind 50, 75, 89 and 94 % of the epochs; local: one for "
            f"each loss; {augmentation(task.name)}; the same epochs for all",
            "separability": f"of each stage's output, pooled to at most {PROBE_DIM} features: accuracy of a detached "
            "linear probe on the test images, Fisher ratio and cosine gap (docs/probes.md), fitted to "
            f"{min(PROBE_IMAGES, len(task.train.labels))} training images",
            "memory": "kept: outputs of convolutions that training keeps in a step, of all stages (joint) or of the "
            "largest (local), from the shapes; peak: what a step adds, measured",
        }

    def table(self, results: Results) -> Table:
        return scaling_results.table(results)

    def figures(self, results: Results) -> list[Figure]:
        return scaling_figures.figures(results)

    def findings(self, results: Results) -> list[Finding]:
        return scaling_results.findings(results)


# -- Runs --------------------------------------------------------------------------------------------------------------


def _groups(task: Task) -> int:
    return 3 if min(task.image_shape[1:]) < SMALL_IMAGE else 4


def _width(task: Task) -> int:
    return 4 * WIDTH if task.device.type == "cuda" else WIDTH


def _cell(task: Task, arm: str, blocks: int, convolutions: int = 2) -> Cell:
    depth = 2 * blocks * _groups(task) + 2
    method, downsampling = ARMS["joint"] if arm == CHECKPOINTED else ARMS.get(arm, ("local", "standard"))
    head = "pooled_linear" if arm == "local-pred" or method == "joint" else "predsim"
    name = f"{arm}-{depth}" if convolutions == 2 else f"{arm}-{depth}-every{convolutions}"
    options = {"arm": arm, "depth": depth, "blocks": blocks, "method": method, "downsampling": downsampling,
               "head": head, "convolutions": convolutions}  # fmt: skip
    return Cell(name, options, trained=arm != CHECKPOINTED)


def network(task: Task, cell: Cell, seed: int) -> models.StagedModel:
    """A cell's network, on the task's device."""
    channels, *size = task.image_shape
    options = cell.options
    model = models.resnet(
        [options["blocks"]] * _groups(task),
        width=_width(task),
        in_channels=channels,
        num_classes=task.num_classes,
        image_size=(size[0], size[1]),
        downsampling=options["downsampling"],
        dim=DIM,
        head=options["head"],
        beta=BETA,
        activation="leaky_relu" if options["head"] == "predsim" else "relu",
        seed=seed,
    )
    if options["convolutions"] == 1:

        def head(channels: int, size: tuple[int, int]) -> PredSimHead:
            grid = _largest_grid(channels, size, DIM)
            return PredSimHead(channels, task.num_classes, grid, BETA, zero_init=True)

        model = on_every_convolution(model, task.image_shape, head)
    return model.to(task.device)


def _trainer(task: Task, cell: Cell, model: models.StagedModel, seed: int, epochs: int) -> train.Trainer:
    milestones = [max(1, round(share * epochs)) for share in MILESTONES]
    settings: dict[str, Any] = {
        "scheduler": lambda optimizer: MultiStepLR(optimizer, milestones, 0.25),
        "device": task.device,
        "seed": seed,
        "progress": False,
    }
    if cell.options["method"] == "joint":
        return train.JointTrainer(model, _adam, checkpointing=cell.options["arm"] == CHECKPOINTED, **settings)
    return train.LocalTrainer(model, _adam, blocks=_sizes(cell, len(model)), **settings)


def _sizes(cell: Cell, stages: int) -> list[int]:
    """Stages that share a loss: the stem is alone."""
    size = max(1, cell.options["convolutions"] // 2)
    whole, rest = divmod(stages - 1, size)
    return [1, *[size] * whole, *([rest] if rest else [])]


def _largest_block(kept: Sequence[int], cell: Cell) -> int:
    starts = [0, *itertools.accumulate(_sizes(cell, len(kept)))]
    return max(sum(kept[start:end]) for start, end in itertools.pairwise(starts))


def _adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LR)


def _separability(task: Task, model: models.StagedModel) -> list[probe.LayerSeparability]:
    """Of each stage; NaN of a network that training broke."""
    images = task.train
    if len(images.labels) > PROBE_IMAGES:
        fewest = int(torch.bincount(images.labels.cpu(), minlength=task.num_classes).min())
        images = data.subset(images, per_class=min(fewest, PROBE_IMAGES // task.num_classes))
    loader = data.MemoryLoader(images, min(512, len(images.labels)), task.normalization)
    try:
        return probe.separability(model, loader, task.test_loader(), dim=PROBE_DIM).layers
    except ValueError:  # an output that is not finite
        return [probe.LayerSeparability(f"stages.{i}", 0, math.nan, math.nan, math.nan) for i in range(len(model))]
