"""``python -m layerwise_ext.studies.peak FACTS``: peak memory of a cell's step in MiB; called by :mod:`.measure`."""

from __future__ import annotations

import json
import sys

import torch

from layerwise_ext import _memory, data, studies


def main() -> None:
    facts = json.loads(sys.argv[1])
    _memory.return_freed_memory()
    torch.set_num_threads(facts["threads"])
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, facts["shape"], generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, facts["num_classes"], facts["shape"][:1], generator=generator)
    split = data.Split(images, labels)
    task = studies.Task(facts["data"], split, split, data.Normalization.of(images), facts["num_classes"],
                        threads=facts["threads"], quick=facts["quick"])  # fmt: skip
    study = studies.NAMES[facts["study"]]()
    (cell,) = (cell for cell in study.cells(task) if cell.name == facts["cell"])
    step = study.step(task, cell)
    if step is None:
        raise RuntimeError(f"{cell.name} has no step")
    print(_memory.peak_of_step(step, step.clear) / 2**20)


if __name__ == "__main__":
    main()
