"""Trainers from the options of ``train``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from layerwise_ext.cli.common import UsageError
from layerwise_ext.cli.options import flag
from layerwise_ext.cli.processes import own_device

if TYPE_CHECKING:
    import torch.distributed as dist

    from layerwise_ext.models import StagedModel
    from layerwise_ext.train import AutoencoderPretrainer, Trainer
    from layerwise_ext.train.optimizers import OptimizerFactory, SchedulerFactory

# Share of a layer's inputs that denoising sets to zero, and epochs of each layer.
NOISE, PRETRAIN_EPOCHS = 0.2, 10
# arXiv 1901.06656
LR_DECAY = 0.25


def check(arguments: argparse.Namespace) -> None:
    """What can be told before any image is read.

    Raises:
        UsageError: a device that is not there, lists that are none.
    """
    own_device(arguments)
    _scheduler(arguments)
    _cuts(arguments)


def trainer_of(arguments: argparse.Namespace, model: StagedModel, group: dist.ProcessGroup | None) -> Trainer:
    """Of this process, one of ``group``.

    Raises:
        UsageError: options that the trainer does not allow.
    """
    from layerwise_ext import train

    kinds = {
        "joint": train.JointTrainer,
        "local": train.LocalTrainer,
        "greedy": train.GreedyTrainer,
        "decoupled": train.DecoupledTrainer,
    }
    names = ("deep_supervision", "checkpointing", "workers", "asynchronous", "buffer", "cache_dir")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    if not arguments.detach:
        options["detach"] = False
        for stage in model:
            stage.detach = False
    options |= _cuts(arguments)
    if arguments.mode != "decoupled":
        options["process_group"] = group
    elif arguments.partition is None:
        options.setdefault("workers", 2)
    if arguments.mode == "greedy":
        options["cache"] = arguments.cache
        if arguments.cache_limit is not None:
            options["cache_limit_bytes"] = arguments.cache_limit << 20
    if arguments.patience is not None:
        options["early_stopping"] = train.EarlyStopping(arguments.patience)
    try:
        return kinds[arguments.mode](
            model,
            _optimizer(arguments),
            scheduler=_scheduler(arguments),
            ema_decay=arguments.ema_decay,
            **_common(arguments),
            **options,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def pretrainer_of(
    arguments: argparse.Namespace, model: StagedModel, group: dist.ProcessGroup | None
) -> AutoencoderPretrainer | None:
    """None without --pretrain.

    Raises:
        UsageError: a network whose layers cannot be pretrained.
    """
    from layerwise_ext import train

    if arguments.pretrain is None:
        return None
    try:
        return train.AutoencoderPretrainer(
            model,
            _optimizer(arguments),
            tied=arguments.pretrain_tied,
            noise=(arguments.pretrain_noise or NOISE) if arguments.pretrain == "denoising" else 0.0,
            process_group=group,
            **_common(arguments),
        )
    except ValueError as error:
        raise UsageError(f"--pretrain: {error}") from error


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    """What training and pretraining are told alike."""
    import torch

    return {
        "device": own_device(arguments),
        "autocast_dtype": None if arguments.dtype == "float32" else getattr(torch, arguments.dtype),
        "seed": arguments.seed,
        "cuda_graph": arguments.cuda_graph,
        "accumulate": arguments.accumulate,
        "clip_norm": arguments.clip_norm,
    }


def _cuts(arguments: argparse.Namespace) -> dict[str, list[int]]:
    """Where the stages are cut into blocks or among processes, as far as that is given."""
    allowed = {"blocks": "numbers of stages such as 2,2,1", "partition": "numbers of stages such as 3,4"}
    return {name: _numbers(arguments, name, text) for name, text in allowed.items() if getattr(arguments, name)}


def _optimizer(arguments: argparse.Namespace) -> OptimizerFactory:
    import torch

    options = {"lr": arguments.lr, "weight_decay": arguments.weight_decay}
    if arguments.optimizer == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, momentum=0.9, nesterov=arguments.nesterov, **options)
    return lambda parameters: torch.optim.Adam(parameters, **options)


def _scheduler(arguments: argparse.Namespace) -> SchedulerFactory | None:
    from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

    if arguments.lr_schedule == "cosine":
        return lambda optimizer: CosineAnnealingLR(optimizer, arguments.epochs)
    if arguments.lr_milestones is None:
        return None
    milestones = _numbers(arguments, "lr_milestones", "ascending epochs such as 50,75,89")
    if sorted(set(milestones)) != milestones:
        raise UsageError(f"--lr-milestones is {arguments.lr_milestones!r}; allowed: ascending epochs such as 50,75,89")
    decay = LR_DECAY if arguments.lr_decay is None else arguments.lr_decay
    return lambda optimizer: MultiStepLR(optimizer, milestones, decay)


def _numbers(arguments: argparse.Namespace, name: str, allowed: str) -> list[int]:
    text = getattr(arguments, name)
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(f"{flag(name)} is {text!r}; {allowed} are allowed")
    return numbers
