"""Peak memory of one training step, each in a fresh process; the procedure is that of layerwise_ext/_memory.py.

The kernel's counter is exact to some hundred KiB on small machines, so steps with maps below 1 MiB are not judged
by it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from layerwise_ext._memory import peak_of_step, return_freed_memory
from peers import DTYPES, STEPS, Row, inputs, training_step

MEASURABLE_BYTES = 1 << 20  # maps of a step should have at least this size


def in_fresh_process(name: str, row: Row, dtype: str, threads: int) -> int:
    """Peak bytes of one step of ``name``, see the top of this file."""
    spec = ",".join(map(str, row))
    options = ["--name", name, "--row", spec, "--dtype", dtype, "--threads", str(threads)]
    return int(json_of(__file__, options)["peak_bytes"])


def json_of(program: str, options: Sequence[str]) -> dict[str, Any]:
    """The last line that a program prints, run in a process of its own."""
    done = subprocess.run([sys.executable, program, *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{program} {' '.join(options)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one training step, as JSON; called by bench_stage.py.")
    parser.add_argument("--name", choices=STEPS, required=True)
    parser.add_argument("--row", type=Row.parse, required=True, help="N,C_in,C_out,size,cells[,stride]")
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    return_freed_memory()
    torch.set_num_threads(arguments.threads)
    dtype = DTYPES[arguments.dtype]
    step = training_step(arguments.name, arguments.row, dtype, *inputs(arguments.row, dtype))
    print(json.dumps({"peak_bytes": peak_of_step(step.run, step.prepare)}))


if __name__ == "__main__":
    main()
