"""The random generators that decide the order of the data: capture them, put them back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def capture(loader: Any, device: torch.device) -> dict[str, Any]:
    """State of torch's global generators and of the generators that ``loader`` and its samplers own."""
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: dict[str, Any], loader: Any, device: torch.device) -> None:
    """Undo :func:`capture`.

    Raises:
        ValueError: ``loader`` owns another number of generators than at the capture.
    """
    generators = list(_generators(loader))
    if len(generators) != len(state["loader"]):
        raise ValueError(
            f"the loader has {len(generators)} generators of its own but the saved state has {len(state['loader'])}; "
            "resume with a loader made like the one that was used before"
        )
    for generator, saved in zip(generators, state["loader"], strict=True):
        generator.set_state(saved)
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """``generator`` of the loader, of its sampler, of its batch sampler and of that one's sampler, each once, and those
    of a loader that it is around."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    seen: set[int] = set()
    for owner in (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and id(generator) not in seen:
            seen.add(id(generator))
            yield generator
    if hasattr(loader, "loader"):
        yield from _generators(loader.loader)
