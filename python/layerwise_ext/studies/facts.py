"""What a reader of the report has to know about the machine and the software."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

from layerwise_ext import _info
from layerwise_ext.studies.study import Task


def machine(task: Task) -> dict[str, str]:
    """Names and values, in the order in which they are shown."""
    info = _info.collect()
    gpu = {"GPU": torch.cuda.get_device_name(task.device)} if task.device.type == "cuda" else {}
    commit = _commit()
    return {
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores, {platform.system()}",
        **gpu,
        "threads": str(task.threads),
        "CPU kernels": info["CPU kernels"],
        "versions": f"layerwise_ext {info['layerwise_ext']}, torch {torch.__version__}, Python {info['python']}",
        **({"commit": commit} if commit else {}),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the working tree that the package runs from; None where there is none."""
    head, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return head and head + (", with changes" if changes else "")


def _git(*arguments: str) -> str | None:
    package = Path(__file__).parent
    try:
        # An installed package may lie in some other project's tree, which does not track it.
        command = ["git", "ls-files", "--error-unmatch", __file__]
        subprocess.run(command, cwd=package, capture_output=True, check=True)
        done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
