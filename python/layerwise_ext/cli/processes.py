"""The processes that torchrun starts, each with the same command: they train together."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from layerwise_ext.cli.common import UsageError, device_of

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


def is_first() -> bool:
    """Whether this process writes and prints: the only one, or rank 0."""
    return int(os.environ.get("RANK", 0)) == 0


def shares_batches(arguments: argparse.Namespace) -> bool:
    """Whether each process trains on its part of each batch: under torchrun, where they have not different stages."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and arguments.mode != "decoupled"


def check(arguments: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: options that several processes do not have.
    """
    if not shares_batches(arguments):
        if arguments.pretrain is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UsageError("--pretrain with --mode decoupled is for one command, which starts the workers; torchrun "
                             "would pretrain in each of them")  # fmt: skip
        return
    size = int(os.environ["WORLD_SIZE"])
    if arguments.batch_size < size:
        raise UsageError(f"--batch-size is {arguments.batch_size}; the {size} processes need {size} or more")
    if arguments.cuda_graph and size > 1:
        raise UsageError(f"--cuda-graph captures one process, torchrun has started {size}; leave it out")
    own_device(arguments)


def own_device(arguments: argparse.Namespace) -> torch.device:
    """Of this process, a GPU for each.

    Raises:
        UsageError: there are not as many, or it is the same one for all.
    """
    import torch

    device = device_of(arguments.device)
    if device.type == "cpu" or not shares_batches(arguments):
        return device
    if device.index is not None:
        raise UsageError(f"--device is {arguments.device!r}; allowed with torchrun: cpu, and cuda for a GPU each")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= gpus:
        raise UsageError(
            f"torchrun has started more processes than there are GPUs ({gpus}); use --device cpu, or fewer"
        )
    return torch.device("cuda", local_rank)


def group_of(arguments: argparse.Namespace) -> dist.ProcessGroup | None:
    """All processes that share batches; None for one by itself."""
    if not shares_batches(arguments):
        return None
    import torch
    import torch.distributed as dist

    device = own_device(arguments)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return dist.group.WORLD
