"""The options of ``train``: a table, from which come the flags, their checks and those of a configuration file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise_ext.cli.common import fraction, not_negative, positive

MODES = ("joint", "local", "greedy", "decoupled")
INITS = ("default", "lsuv", "data_dependent")
PRETRAININGS = ("autoencoder", "denoising")
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
# Digits have 8x8 pixels, too few for the pools of vgg8b.
MODEL, SMALL_MODEL = "vgg8b", "32,64,M,64,128"
# Of models.resnet and models.vgg, which are not imported for --help.
STEMS = ("cifar", "imagenet")
POOLS = ("max", "avg", "stride", "space_to_depth")
# Of ConvBNReLU2d, which is not imported for --help.
ACTIVATIONS = (
    "relu", "leaky_relu", "prelu", "rrelu", "relu6", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "hardswish"
)  # fmt: skip
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


@dataclass(frozen=True)
class Option:
    """
    Attributes:
        help: for ``--help``, without the default.
        default: where it is not given.
        kind: makes a value of a text; bool for a switch, which has a form ``--no-...``, too.
        choices: the values that are allowed.
        metavar: what stands for the value in ``--help``.
        modes: the modes that have it.
        defines: whether it decides what is computed, so that a resumed run must have the same.
    """

    help: str
    default: Any = None
    kind: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    modes: tuple[str, ...] = MODES
    defines: bool = True


_positive_int, _positive_float = positive(int), positive(float)

GROUPS = {
    "data": {
        "data": Option("the data set", "digits", choices=DATA),
        "data_dir": Option("folder of the data files; default: $LAYERWISE_DATA", kind=Path, defines=False),
        "image_size": Option("of image-folder: its images are cut and resized to NxN", kind=_positive_int, metavar="N"),
        "limit_train": Option("use the first N training images", kind=_positive_int, metavar="N"),
        "validation": Option(
            "hold out this share of each class's training images: metrics of each epoch, the best epoch and --patience "
            "look at them, and the test images are used once, at the end. Without it they look at the test images, "
            "and what is best was chosen on those", kind=fraction, metavar="FRACTION"),
        "augment": Option("standard: random crops and flips as usual for the data set", "none",
                          choices=("none", "standard")),
        "cutout": Option("cover a random square of NxN pixels", kind=_positive_int, metavar="N"),
        "classes_per_batch": Option("images of exactly K classes in each batch", kind=_positive_int, metavar="K"),
    },
    "network": {
        "model": Option(
            "vgg8b, vgg11b, vgg11 to vgg19, resnet18 to resnet152, resnet20 to resnet110, cnn, or widths and pools "
            f"such as 32,M,64,M; default: vgg8b, of digits {SMALL_MODEL}"),
        "width_multiplier": Option("scales the widths", 1.0, _positive_float),
        "kernel_size": Option("of the convolutions, odd; not of resnet", 3, _positive_int, metavar="N"),
        "stem": Option("of resnet: cifar, one 3x3 convolution, or imagenet, a quarter of the resolution", "cifar",
                       choices=STEMS),
        "downsampling": Option("where the resolution halves: standard, accelerated, or units such as 1,3,4,5",
                               "standard"),
        "pool": Option("how it halves, but in resnet; default: max, of cnn space_to_depth", choices=POOLS),
        "activation": Option("leaky_relu is usual for similarity matching", "relu", choices=ACTIVATIONS),
        "dropout": Option("share of the channels between stages that are zero in a step", 0.0, float, metavar="SHARE"),
        "init": Option("initial weights: as usual, or from BATCH_SIZE images", "default", choices=INITS),
        "plain": Option("plain PyTorch layers instead of the fused ones", False, bool),
    },
    "method": {
        "mode": Option("all layers on one loss, all stages at once on their own, one after another, or in processes",
                       "local", choices=MODES),
        "head": Option("the local loss of the stages", "pooled_linear", choices=HEADS),
        "head_depth": Option("layers of the head conv, the linear one included", 2, _positive_int),
        "beta": Option("share of similarity matching in predsim", 0.99, float, metavar="SHARE"),
        "dim": Option("most pooled features of a local classifier; default: 2048 for images in colour, 1024 for others",
                      kind=_positive_int),
        "label_smoothing": Option("of cross-entropies", 0.0, float, metavar="SHARE"),
        "deep_supervision": Option("of the hidden heads' losses, in joint training or within --blocks",
                                   kind=_positive_float, metavar="WEIGHT", modes=("joint", "local")),
        "blocks": Option("stages that are trained jointly, such as 2,2,1", modes=("local",)),
        "detach": Option("stop gradients between stages, each of which is trained on its own loss alone", True, bool,
                         modes=("local",)),
        "checkpointing": Option("run stages again in the backward pass", False, bool, modes=("joint",), defines=False),
        "ensemble": Option("test all heads together, too, with weights 2^n", False, bool,
                           modes=("local", "greedy", "decoupled"), defines=False),
        "workers": Option("processes; default: 2", kind=_positive_int, metavar="K", modes=("decoupled",)),
        "partition": Option("in place of --workers the stages of each, such as 3,4; default: cut where the slowest "
                            "worker has least to compute", modes=("decoupled",)),
        "asynchronous": Option("train from replay buffers", False, bool, modes=("decoupled",)),
        "buffer": Option("batches in a replay buffer; default: 16", kind=_positive_int, metavar="N",
                         modes=("decoupled",)),
        "cache": Option("keep what frozen stages give, instead of running them in each step", True, bool,
                        modes=("greedy",)),
        "cache_dir": Option("a folder for it, in place of memory", kind=Path, modes=("greedy",), defines=False),
        "cache_limit": Option("MiB that may be kept, default: 2048; otherwise the frozen stages run in each step",
                              kind=_positive_int, metavar="MIB", modes=("greedy",)),
        "pretrain": Option("before training, without labels: each layer as an autoencoder of the one before; denoising "
                           "with a part of its inputs set to zero", choices=PRETRAININGS),
        "pretrain_on": Option(
            "images for it: those of training, all training images of the data set, whatever --limit-train and "
            "--validation leave out, or another split, unlabeled of stl10 or extra of svhn", "train",
            choices=("train", "all", "unlabeled", "extra")),
        "pretrain_noise": Option("share that is set to zero; default: 0.2", kind=_positive_float, metavar="SHARE"),
        "pretrain_tied": Option("decode with the layer's own weights", False, bool),
        "pretrain_epochs": Option("of each layer; default: 10", kind=_positive_int, metavar="N"),
    },
    "optimisation": {
        "epochs": Option("in all; for greedy, per stage", 10, _positive_int, defines=False),
        "batch_size": Option("images, of all processes together", 128, _positive_int),
        "optimizer": Option("sgd: momentum 0.9", "adam", choices=("adam", "sgd")),
        "nesterov": Option("Nesterov's momentum, of sgd", False, bool),
        "lr": Option("learning rate", 5e-4, _positive_float),
        "lr_schedule": Option("cosine: half a cosine from LR to 0 over EPOCHS", "constant",
                              choices=("constant", "cosine")),
        "lr_milestones": Option("epochs behind which the learning rate is multiplied by LR_DECAY, such as 50,75,89"),
        "lr_decay": Option("default: 0.25", kind=_positive_float, metavar="FACTOR"),
        "weight_decay": Option("of all parameters, as a part of the gradient", 0.0, not_negative(float)),
        "accumulate": Option("batches to an update", 1, _positive_int, metavar="N"),
        "clip_norm": Option("largest norm of the gradients of an optimiser", kind=_positive_float),
        "ema_decay": Option("test and keep averaged weights, with this decay", kind=_positive_float),
        "patience": Option(
            "end a stage after N epochs without a smaller loss on the held-out images, and go back to its best epoch; "
            "without --validation the test images choose", kind=_positive_int, metavar="N"),
        "sync_batch_norm": Option("with torchrun: batch norm over the whole batch, not each process' part", True, bool),
        "seed": Option("of initial weights, order, augmentation and held-out images", 0, int),
    },
    "machine": {
        "dtype": Option(
            "bfloat16, float16: autocast, the latter with scaled losses", "float32",
            choices=("float32", "bfloat16", "float16")),
        "device": Option("cpu, cuda or cuda:N; default: cuda where there is one", defines=False),
        "threads": Option("default: all cores", kind=_positive_int, defines=False),
        "cuda_graph": Option("run each step as a CUDA graph (see Trainer)", False, bool, defines=False),
    },
    "run": {
        "output": Option("run folder; default: runs/DATA-MODEL-MODE", kind=Path, defines=False),
        "resume": Option("go on from the checkpoint in the run folder", False, bool, defines=False),
        "tensorboard": Option("log for TensorBoard into the run folder, too", False, bool, defines=False),
    },
}  # fmt: skip
OPTIONS: dict[str, Option] = {name: each for group in GROUPS.values() for name, each in group.items()}
DEFINING = tuple(name for name, each in OPTIONS.items() if each.defines)


def flag(name: str) -> str:
    """As it is written on the command line."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is not given leaves no trace in what the parser gives: see :func:`layerwise_ext.cli.config.complete`."""
    for title, group in GROUPS.items():
        add = parser.add_argument_group(title).add_argument
        for name, each in group.items():
            text = each.help
            if each.modes != MODES:
                text = f"{', '.join(each.modes)}: {text}"
            if each.default is not None and each.default is not False:
                text += f" (default: {each.default})"
            settings: dict[str, Any] = {"type": each.kind, "choices": each.choices, "metavar": each.metavar}
            if each.kind is bool:
                settings = {"action": argparse.BooleanOptionalAction}
            add(flag(name), default=argparse.SUPPRESS, **settings).help = text
