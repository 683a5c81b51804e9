"""The options of ``train``: their names, and which of them a run folder holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from layerwise_ext.cli.common import positive

MODES = ("joint", "local", "greedy", "decoupled")
INITS = ("default", "lsuv", "data_dependent")
# Those that decide what is computed: a resumed run must have the same ones.
DEFINING = ("data", "model", "width_multiplier", "downsampling", "head", "activation", "init", "mode", "batch_size",
            "lr", "optimizer", "dtype", "seed", "limit_train", "plain", "image_size", "augment", "cutout",
            "classes_per_batch", "accumulate", "clip_norm", "ema_decay", "patience", "blocks", "deep_supervision",
            "workers", "asynchronous", "buffer")  # fmt: skip
# Those that only some modes have.
OF_MODES = {"blocks": ("local",), "deep_supervision": ("joint", "local"), "checkpointing": ("joint",),
            "workers": ("decoupled",), "asynchronous": ("decoupled",), "buffer": ("decoupled",)}  # fmt: skip
# Of data.NAMES, which is not imported for --help.
DATA = (
    "digits",
    "mnist",
    "fashion-mnist",
    "kmnist",
    "cifar10",
    "cifar10-jpeg",
    "cifar100",
    "cifar100-coarse",
    "svhn",
    "stl10",
    "image-folder",
)
# Of models.HEADS, which is not imported for --help.
HEADS = (
    "pooled_linear",
    "similarity",
    "similarity_projected",
    "predsim",
    "predsim_projected",
    "contrastive",
    "conv",
    "mlp_sr",
    "auglocal",
    "goodness",
    "reconstruction",
    "infopro",
    "infopro_contrastive",
)


def option(name: str) -> str:
    """As it is written on the command line."""
    return "--" + name.replace("_", "-")


def add_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("--data", choices=DATA, default="digits")
    train.add_argument("--data-dir", type=Path, help="folder of the data files; default: $LAYERWISE_DATA")
    train.add_argument("--image-size", type=positive(int), metavar="N",
                       help="of image-folder: its images are cut and resized to NxN")  # fmt: skip
    train.add_argument("--model", default="vgg8b",
                       help="vgg8b, vgg11b, vgg11 to vgg19, resnet18 to resnet152, resnet20 to resnet110, cnn, or "
                       "widths and pools such as 32,M,64,M")  # fmt: skip
    train.add_argument("--width-multiplier", type=positive(float), default=1.0)
    train.add_argument("--downsampling", default="standard",
                       help="where the resolution halves: standard, accelerated, or units such as 1,3,4,5")  # fmt: skip
    train.add_argument("--mode", choices=MODES, default="local")
    train.add_argument("--head", choices=HEADS, default="pooled_linear", help="the local loss of the stages")
    train.add_argument("--activation", choices=("relu", "leaky_relu"), default="relu")
    train.add_argument("--init", choices=INITS, default="default",
                       help="initial weights: as usual, or from BATCH_SIZE images")  # fmt: skip
    train.add_argument("--epochs", type=positive(int), default=10, help="in all; for greedy, per stage")
    train.add_argument("--batch-size", type=positive(int), default=128)
    train.add_argument("--lr", type=positive(float), default=5e-4)
    train.add_argument("--optimizer", choices=("adam", "sgd"), default="adam")
    train.add_argument("--accumulate", type=positive(int), default=1, metavar="N", help="batches to an update")
    train.add_argument("--clip-norm", type=positive(float), help="largest norm of the gradients of an optimiser")
    train.add_argument("--ema-decay", type=positive(float), help="test and keep averaged weights, with this decay")
    train.add_argument("--patience", type=positive(int), metavar="N",
                       help="end a stage after N epochs without a smaller test loss, and go back to the best one; "
                       "accuracies are then those of weights that were chosen on the test images")  # fmt: skip
    train.add_argument("--blocks", help="local: stages that are trained jointly, such as 2,2,1")
    train.add_argument("--deep-supervision", type=positive(float), metavar="WEIGHT",
                       help="joint, or local with --blocks: of the hidden heads' losses")  # fmt: skip
    train.add_argument("--checkpointing", action="store_true", help="joint: run stages again in the backward pass")
    train.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    train.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    train.add_argument("--cuda-graph", action="store_true", help="run each step as a CUDA graph (see Trainer)")
    train.add_argument("--threads", type=positive(int), help="default: all cores")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--limit-train", type=positive(int), metavar="N", help="use the first N training images")
    train.add_argument("--augment", choices=("none", "standard"), default="none",
                       help="standard: random crops and flips as usual for the data set")  # fmt: skip
    train.add_argument("--cutout", type=positive(int), metavar="N", help="cover a random square of NxN pixels")
    train.add_argument("--classes-per-batch", type=positive(int), metavar="K",
                       help="images of exactly K classes in each batch")  # fmt: skip
    train.add_argument("--workers", type=positive(int), metavar="K", help="processes of --mode decoupled; default: 2")
    train.add_argument("--asynchronous", action="store_true", default=None, help="for decoupled: from replay buffers")
    train.add_argument("--buffer", type=positive(int), metavar="N", help="batches in such a buffer; default: 16")
    train.add_argument("--plain", action="store_true", help="plain PyTorch layers instead of the fused ones")
    train.add_argument("--output", type=Path, help="run folder; default: runs/DATA-MODEL-MODE")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in the run folder")
