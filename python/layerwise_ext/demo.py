"""``layerwise-ext demo``: one small VGG on real digits, trained jointly, locally and greedily, fused and plain.

Fused and plain networks start from the same parameters and see the same batches, so their accuracies differ by rounding
only. Time and memory of a step are measured on the digits and, since 8x8 images hide what happens to maps, on batches
of 32x32 images through a wider network.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from layerwise_ext import _memory, checkpoint, data, models, report, train
from layerwise_ext.studies.measure import TrainerStep, interleaved_times, peak_in_fresh_process

MODES = {"joint": train.JointTrainer, "local": train.LocalTrainer, "greedy": train.GreedyTrainer}
LAYERS = ("fused", "plain")


@dataclass(frozen=True)
class Shape:
    """A network and the batches that its steps are measured on."""

    name: str
    config: tuple[int | str, ...]
    image: tuple[int, int, int]  # C, H, W
    batch: int

    def model(self, layers: str, seed: int) -> models.StagedModel:
        return models.vgg(
            list(self.config),
            in_channels=self.image[0],
            image_size=self.image[1:],
            hidden=None,
            fused=layers == "fused",
            seed=seed,
        )

    def batch_of_noise(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, *self.image, generator=generator)
        target = torch.randint(0, 10, (self.batch,), generator=generator)
        return images.contiguous(memory_format=torch.channels_last), target


DIGITS = Shape("digits 8x8", (32, 64, "M", 64, 128), (1, 8, 8), 64)
IMAGES = Shape("images 32x32", (64, 128, "M", 128, 256), (3, 32, 32), 64)


@dataclass
class Result:
    """What was measured for one way of training with one kind of layers."""

    mode: str
    layers: str
    accuracy: list[list[float]] = field(default_factory=list)  # [seed][stage], test accuracy; joint has the last only
    milliseconds: dict[str, float] = field(default_factory=dict)  # by shape, median of a step
    speed: dict[str, float] = field(default_factory=dict)  # by shape, plain time / this time
    peak_mib: dict[str, float] = field(default_factory=dict)  # by shape


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def run(output: Path, *, quick: bool = False) -> list[Result]:
    """Train, measure, print the table and write ``demo.png`` and ``demo.json`` to the folder ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    seeds, epochs = (1, 1) if quick else (3, 12)
    results = [Result(mode, layers) for mode in MODES for layers in LAYERS]
    _train_all(results, seeds, epochs)
    shapes = [DIGITS] if quick else [DIGITS, IMAGES]
    for shape in tqdm(shapes, desc="timing", unit="shape", leave=False):
        _time_all(results, shape, rounds=3 if quick else 15)
    reason = _memory.unavailable()
    if reason is None:
        # Of the larger shape: maps of 8x8 images are smaller than what the system's counter resolves.
        measured = [result for result in results if result.mode == "local" or not quick]
        for result in tqdm(measured, desc="memory", unit="process", leave=False):
            result.peak_mib[shapes[-1].name] = _peak_in_fresh_process(result, shapes[-1])
    settings = {"seeds": seeds, "epochs": epochs, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(report.table(results, [shape.name for shape in shapes]))
    print(
        f"\n{seeds} seed(s), {epochs} epoch(s) (greedy: per stage), {torch.get_num_threads()} thread(s). "
        "ms: median of a step of all stages,\nfused and plain in turn; speed: plain / this; "
        "peak: what a step adds to the resident memory of a fresh process."
    )
    if reason is not None:
        print(f"Peak memory was not measured: {reason}.")
    content = {"settings": settings, "results": [vars(result) for result in results]}
    checkpoint.write_text(output / "demo.json", json.dumps(content, indent=2) + "\n")
    with checkpoint.replacing(output / "demo.png") as temporary:
        report.picture(results, [shape.name for shape in shapes], temporary)
    print(f"\nPicture: {output / 'demo.png'}")
    return results


def _train_all(results: list[Result], seeds: int, epochs: int) -> None:
    train_split, test_split = data.load("digits"), data.load("digits", split="test")
    normalization = data.Normalization.of(train_split.images)
    test_loader = data.MemoryLoader(test_split, len(test_split.labels), normalization)
    runs = [(result, seed) for seed in range(seeds) for result in results]
    for result, seed in tqdm(runs, desc="training", unit="run", leave=False):
        loader = data.MemoryLoader(train_split, DIGITS.batch, normalization, shuffle=True, drop_last=True, seed=seed)
        trainer = MODES[result.mode](DIGITS.model(result.layers, seed), sgd, seed=seed, progress=False)
        trainer.fit(loader, epochs)
        result.accuracy.append(trainer.evaluate(test_loader)["accuracy"])


# -- Time and memory of a step -----------------------------------------------------------------------------------------


def _step(mode: str, layers: str, shape: Shape) -> TrainerStep:
    images, target = shape.batch_of_noise()
    trainer = MODES[mode](shape.model(layers, 0), sgd, seed=0, progress=False)
    return TrainerStep(trainer, images, target)


def _time_all(results: list[Result], shape: Shape, rounds: int) -> None:
    """Fused and plain steps alternate, so that a machine that is slower for a while slows both."""
    for mode in MODES:
        pair = [result for result in results if result.mode == mode]
        steps = {result.layers: _step(mode, result.layers, shape) for result in pair}
        times = interleaved_times(steps, rounds)
        for result in pair:
            own = times[result.layers]
            result.milliseconds[shape.name] = statistics.median(own)
            result.speed[shape.name] = statistics.median(p / t for p, t in zip(times["plain"], own, strict=True))


def _peak_in_fresh_process(result: Result, shape: Shape) -> float:
    return peak_in_fresh_process(__name__, result.mode, result.layers, shape.name, str(torch.get_num_threads()))


def _print_peak() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a step in MiB; called by the demo.")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("layers", choices=LAYERS)
    parser.add_argument("shape", choices=[DIGITS.name, IMAGES.name])
    parser.add_argument("threads", type=int)
    arguments: Any = parser.parse_args()
    _memory.return_freed_memory()
    torch.set_num_threads(arguments.threads)
    shape = DIGITS if arguments.shape == DIGITS.name else IMAGES
    step = _step(arguments.mode, arguments.layers, shape)
    print(_memory.peak_of_step(step, step.clear) / 2**20)


if __name__ == "__main__":
    _print_peak()
