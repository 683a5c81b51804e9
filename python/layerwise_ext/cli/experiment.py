"""What a run works on: the images, the network and its initial values, from the options of ``train``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

from layerwise_ext.cli.common import UsageError
from layerwise_ext.cli.options import OPTIONS, flag

if TYPE_CHECKING:
    import torch

    from layerwise_ext.data import Augment, Info, Normalization, Split
    from layerwise_ext.models import StagedModel


def check_limit(name: str, limit: int | None) -> None:
    if name == "image-folder" and limit is not None:
        raise UsageError("--limit-train takes the first images, which in an image-folder are all of the first classes")


class Images(NamedTuple):
    """``validation`` are held out of the training images, where --validation says so."""

    train: Split
    validation: Split | None
    test: Split


def load_images(arguments: argparse.Namespace) -> Images:
    """
    Raises:
        DataError, ValueError: files that are missing or damaged, options that they do not allow.
    """
    from layerwise_ext import data

    train, test = (
        data.load(arguments.data, arguments.data_dir, split, image_size=arguments.image_size)
        for split in ("train", "test")
    )
    train = first(train, arguments.limit_train)
    if arguments.validation is None:
        return Images(train, None, test)
    return Images(*data.hold_out(train, arguments.validation, seed=arguments.seed), test)


def pretraining_images(arguments: argparse.Namespace, info: Info) -> Split:
    """Of --pretrain-on, where it is not 'train'.

    Raises:
        DataError, ValueError: files that are missing or damaged, a split that the data set does not have.
    """
    from layerwise_ext import data

    split = "train" if arguments.pretrain_on == "all" else arguments.pretrain_on
    if split not in info.splits:
        allowed = ", ".join(["train", "all", *(name for name in info.splits if name not in ("train", "test"))])
        raise ValueError(f"--pretrain-on is {split}; of {arguments.data} allowed: {allowed}")
    return data.load(arguments.data, arguments.data_dir, split, image_size=arguments.image_size)


def first(split: Split, count: int | None) -> Split:
    return split if count is None else type(split)(*(part[:count] for part in split))


def augmentation(arguments: argparse.Namespace, info: Info, normalization: Normalization) -> Augment | None:
    from layerwise_ext import data

    if arguments.augment == "none" and arguments.cutout is None:
        return None
    options = {"cutout": arguments.cutout, "cutout_fill": tuple((255 * normalization.mean).tolist())}
    if arguments.augment == "none":
        return data.Augment(0, False, **options)
    return data.standard_augment(info, **options)


def network(arguments: argparse.Namespace, info: Info, normalization: Normalization) -> dict[str, Any]:
    """The function of :mod:`layerwise_ext.models` that makes it, under ``"function"``, and its arguments; JSON values.

    Raises:
        ValueError: a network or a schedule that there is not.
    """
    from layerwise_ext import models

    options: dict[str, Any] = {
        "in_channels": info.channels,
        "num_classes": info.num_classes,
        "image_size": list(info.image_size),
        "width_multiplier": arguments.width_multiplier,
        "downsampling": _schedule(arguments.downsampling),
        "fused": not arguments.plain,
        "head": arguments.head,
        "head_depth": arguments.head_depth,
        "beta": arguments.beta,
        "dim": arguments.dim or (2048 if info.channels == 3 else 1024),
        "label_smoothing": arguments.label_smoothing,
        "image_mean": normalization.mean.tolist(),
        "image_std": normalization.std.tolist(),
        "activation": arguments.activation,
        "dropout": arguments.dropout,
        "seed": arguments.seed,
    }
    name: str = arguments.model
    is_resnet = name in models.RESNET_CONFIGS
    for option in ("kernel_size", "pool") if is_resnet else ("stem",):
        value = getattr(arguments, option)
        if value != OPTIONS[option].default:
            raise ValueError(f"{flag(option)} is {value}, but --model {name} has none; leave it out")
    if is_resnet:
        return {"function": "resnet", "config": name, "stem": arguments.stem, **options}
    options["kernel_size"] = arguments.kernel_size
    if arguments.pool is not None:
        options["pool"] = arguments.pool
    if name == "cnn":
        return {"function": "cnn", **options}
    if "," in name or name.isdigit():
        try:
            widths = [item if item == "M" else int(item) for item in name.split(",")]
        except ValueError as error:
            raise ValueError(f"model is {name!r}; widths and M, such as 32,M,64, are allowed") from error
        return {"function": "vgg", "config": widths, **options}
    if name not in models.VGG_CONFIGS:
        names = ", ".join([*models.VGG_CONFIGS, *models.RESNET_CONFIGS])
        raise ValueError(f"model is {name!r}; allowed: {names}, cnn, or widths and pools such as 32,M,64")
    return {"function": "vgg", "config": name, **options}


def build_model(network: dict[str, Any]) -> StagedModel:
    from layerwise_ext import models

    options = dict(network)
    model: StagedModel = getattr(models, options.pop("function"))(**options)
    return model


def _schedule(downsampling: str) -> str | list[int]:
    if downsampling in ("standard", "accelerated"):
        return downsampling
    try:
        return [int(unit) for unit in downsampling.split(",")]
    except ValueError as error:
        raise ValueError(
            f"downsampling is {downsampling!r}; allowed: standard, accelerated, or units such as 1,3,4,5"
        ) from error


def initialize_model(arguments: argparse.Namespace, model: StagedModel, images: torch.Tensor) -> None:
    import torch

    from layerwise_ext import init

    if arguments.init != "default":
        initialize = init.lsuv_ if arguments.init == "lsuv" else init.data_dependent_
        initialize(model, images, generator=torch.Generator().manual_seed(arguments.seed))
