"""Choice between convolutions on CUDA, by measuring them.

On NVIDIA's Hopper GPUs a build with CUTLASS (``layerwise-ext info``) has convolutions for bfloat16 and float16 that sum
the batch statistics of their result on the way, which saves one reading of it. Whether that beats cuDNN and a pass over
the result depends on the shape. With the autotuner on, the first training step with a shape measures all of them and
the fastest is used from then on. It is off by default: cuDNN then does every convolution.

    lw.autotune.enable()
    train(...)
    lw.autotune.save("choices.json")     # another time: lw.autotune.load("choices.json")

A shape that is first met while a CUDA graph is captured is not measured: cuDNN convolves it.
"""

from __future__ import annotations

import json
from pathlib import Path

from layerwise_ext import checkpoint
from layerwise_ext._ops import _C

__all__ = ["choices", "clear", "disable", "enable", "enabled", "load", "save"]


def enable() -> None:
    """Use what was measured, and measure what was not."""
    _C.set_autotune_enabled(True)


def disable() -> None:
    """cuDNN for every convolution; choices are kept."""
    _C.set_autotune_enabled(False)


def enabled() -> bool:
    return bool(_C.autotune_enabled())


def choices() -> dict[str, str]:
    """What was measured (device, dtype and shape in words) and the name of the fastest: ``'library'`` or a kernel's."""
    return dict(_C.autotune_choices())


def clear() -> None:
    """Forget all choices; they are measured anew."""
    _C.set_autotune_choices({})


def save(path: str | Path) -> None:
    """Write the choices as JSON; the file is replaced whole or not at all."""
    checkpoint.write_text(Path(path), json.dumps(choices(), indent=2, sort_keys=True) + "\n")


def load(path: str | Path) -> None:
    """Add choices from a file of :func:`save`; a kernel that this build does not have is measured anew.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a file of :func:`save`; no choice has changed then.
    """
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); a file written by autotune.save is needed") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, str) for value in loaded.values()):
        raise ValueError(f"{path} must hold an object of strings, as autotune.save writes it")
    _C.set_autotune_choices({**choices(), **loaded})
