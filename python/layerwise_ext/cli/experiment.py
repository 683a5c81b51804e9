"""What a run works on: the images, the network and its initial values, from the options of ``train``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from layerwise_ext.cli.common import UsageError

if TYPE_CHECKING:
    import torch

    from layerwise_ext.data import Augment, Info, Normalization, Split
    from layerwise_ext.models import StagedModel


def check_limit(name: str, limit: int | None) -> None:
    if name == "image-folder" and limit is not None:
        raise UsageError("--limit-train takes the first images, which in an image-folder are all of the first classes")


def splits(arguments: argparse.Namespace) -> tuple[Split, Split]:
    from layerwise_ext import data

    train_split, test_split = (
        data.load(arguments.data, arguments.data_dir, split, image_size=arguments.image_size)
        for split in ("train", "test")
    )
    return first(train_split, arguments.limit_train), test_split


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


def build_model(
    arguments: argparse.Namespace, shape: tuple[int, ...], num_classes: int, normalization: Normalization
) -> StagedModel:
    from layerwise_ext import models

    downsampling: str | list[int] = arguments.downsampling
    if arguments.downsampling not in ("standard", "accelerated"):
        try:
            downsampling = [int(unit) for unit in arguments.downsampling.split(",")]
        except ValueError as error:
            raise ValueError(
                f"downsampling is {arguments.downsampling!r}; allowed: standard, accelerated, or units such as 1,3,4,5"
            ) from error
    config: str | list[int | str] = arguments.model
    if "," in arguments.model or arguments.model.isdigit():
        try:
            config = [item if item == "M" else int(item) for item in arguments.model.split(",")]
        except ValueError as error:
            raise ValueError(f"model is {arguments.model!r}; widths and M, such as 32,M,64, are allowed") from error
    channels, *size = shape
    options: dict[str, Any] = {
        "in_channels": channels,
        "num_classes": num_classes,
        "image_size": (size[0], size[1]),
        "width_multiplier": arguments.width_multiplier,
        "downsampling": downsampling,
        "fused": not arguments.plain,
        "head": arguments.head,
        "image_mean": normalization.mean.tolist(),
        "image_std": normalization.std.tolist(),
        "activation": arguments.activation,
        "seed": arguments.seed,
    }
    if arguments.model == "cnn":
        return models.cnn(**options)
    if arguments.model in models.RESNET_CONFIGS:
        return models.resnet(arguments.model, **options)
    if isinstance(config, str) and config not in models.VGG_CONFIGS:
        names = ", ".join([*models.VGG_CONFIGS, *models.RESNET_CONFIGS])
        raise ValueError(f"model is {config!r}; allowed: {names}, cnn, or widths and pools such as 32,M,64")
    return models.vgg(config, **options)


def initialize_model(arguments: argparse.Namespace, model: StagedModel, images: torch.Tensor) -> None:
    import torch

    from layerwise_ext import init

    if arguments.init != "default":
        initialize = init.lsuv_ if arguments.init == "lsuv" else init.data_dependent_
        initialize(model, images, generator=torch.Generator().manual_seed(arguments.seed))
