"""Autocast and, for float16, the scaling of losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

DTYPES = (torch.bfloat16, torch.float16, None)


def check(dtype: torch.dtype | None, cuda_graph: bool) -> None:
    """
    Raises:
        ValueError: another dtype; float16 in a CUDA graph.
    """
    if dtype not in DTYPES:
        raise ValueError(f"autocast_dtype is {dtype}; allowed: {', '.join(map(str, DTYPES))}")
    if dtype is torch.float16 and cuda_graph:
        raise ValueError(
            "cuda_graph=True, of the trainer or of a stage, with autocast_dtype=torch.float16: the scaler changes the "
            "loss and waits for the device to see whether gradients are finite; torch.bfloat16 needs none"
        )


def grad_scaler(dtype: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler:
    """Keeps small gradients of float16 from vanishing; does nothing for another dtype."""
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def states(scalers: Sequence[torch.amp.GradScaler]) -> list[dict[str, Any]]:
    """Of those that do something: all of them or none."""
    return [scaler.state_dict() for scaler in scalers if scaler.is_enabled()]


def load_states(scalers: Sequence[torch.amp.GradScaler], saved: Sequence[dict[str, Any]]) -> None:
    for scaler, state in zip([s for s in scalers if s.is_enabled()], saved, strict=True):
        scaler.load_state_dict(state)
