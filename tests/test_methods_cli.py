"""Every method from the command line ends no less accurate than its twin in plain PyTorch, twins.py, but for chance.

    LAYERWISE_SEEDS=10 pytest -rP tests/test_methods_cli.py

trains each ten times and prints the means; without it, once and shortly.
"""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import twins
from layerwise_ext import checkpoint, cli, models

SEEDS = int(os.environ.get("LAYERWISE_SEEDS", "1"))
EPOCHS = 4 if SEEDS == 1 else 10
# About two standard deviations of the difference between two runs of one method that differ in their seeds alone: 0.008
# to 0.015 over ten seeds of seven methods. Ours and the twin share the seed.
MARGIN = 0.02


class Recipe(NamedTuple):
    """A network and its training, the same for both sides."""

    config: tuple[int | str, ...] = (8, "M", 16)
    epochs: int = EPOCHS
    lr: float = 2e-3


# Forward-forward learns slower, and pooling behind the first layer costs it what that makes of the label in the image's
# corner. With the recipe of the others it ends between 0.54 and 0.75 after ten epochs.
RECIPES = {"goodness": Recipe((8, 16), 2 * EPOCHS, 5e-3)}
# METHODS of twins.py; others are the head of that name.
OPTIONS = {
    "joint": ["--mode", "joint"],
    "deep supervision": ["--mode", "joint", "--deep-supervision", "0.3"],
    "no detach": ["--no-detach"],
    "blocks": ["--blocks", "2,1"],
    "greedy": ["--mode", "greedy"],
    "decoupled": ["--mode", "decoupled", "--workers", "2"],
    "autoencoder": ["--mode", "joint", "--pretrain", "autoencoder", "--pretrain-epochs", str(EPOCHS)],
    "denoising": ["--mode", "joint", "--pretrain", "denoising", "--pretrain-epochs", str(EPOCHS)],
    "label smoothing": ["--label-smoothing", "0.1"],
}
# The heads that a hidden stage cannot predict with.
SILENT = ("similarity", "similarity_projected", "contrastive", "reconstruction", "infopro_contrastive")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_every_method_is_here() -> None:
    assert {*OPTIONS, *cli.HEADS} == twins.METHODS.keys()


@pytest.mark.parametrize("name", [*OPTIONS, *cli.HEADS])
def test_accuracy_is_that_of_the_twin(name: str, tmp_path: Path) -> None:
    recipe = RECIPES.get(name, Recipe())
    ours, twin = [], []
    for seed in range(SEEDS):
        output = tmp_path / str(seed)
        ours.append(train(name, recipe, output, seed))
        accuracy, _ = twins.run(name, recipe.config, 1024, epochs=recipe.epochs, batch_size=64, lr=recipe.lr, seed=seed)
        twin.append(accuracy)
    difference = sum(ours) / SEEDS - sum(twin) / SEEDS
    print(f"\n{name}: {sum(ours) / SEEDS:.4f}, twin {sum(twin) / SEEDS:.4f}; {difference:+.4f} over {SEEDS} seeds")
    assert difference >= -MARGIN / math.sqrt(SEEDS)
    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    if name in cli.HEADS:
        assert all((row["test_accuracy"] == "nan") == (name in SILENT) for row in rows if row["stage"] == "0")
    weights = checkpoint.load_weights(output / "last.safetensors")[0]
    head = twins.METHODS[name].head
    plain = models.vgg(list(recipe.config), in_channels=1, image_size=(8, 8), fused=False, head=head)
    plain.backbone().load_state_dict(weights, strict=True)


def train(name: str, recipe: Recipe, output: Path, seed: int) -> float:
    """Accuracy on the test images."""
    method = twins.METHODS[name]
    command = ["train", "--model", ",".join(map(str, recipe.config)), "--epochs", str(recipe.epochs)]
    command += ["--batch-size", "64", "--lr", str(recipe.lr)]
    command += ["--threads", "1", "--seed", str(seed), "--output", str(output)]
    command += OPTIONS.get(name, ["--head", name])
    if twins.activation_of(method) is twins.leaky_relu:
        command += ["--activation", "leaky_relu"]
    assert cli.main(command) == 0
    return json.loads((output / "result.json").read_text())["final"]
