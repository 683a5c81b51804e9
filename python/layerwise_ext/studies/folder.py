"""The folder of a study: one file per run, so that a killed study goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise_ext import checkpoint
from layerwise_ext.studies.study import Run


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a study trains.

    Attributes:
        epochs: of each run.
        seeds: 0 to ``seeds - 1``.
        budget: minutes that it was chosen for; None: it was not.
        fixed_seeds: whether the user asked for this number of seeds.
    """

    epochs: int
    seeds: int
    budget: float | None = None
    fixed_seeds: bool = False


class Folder:
    """Files ``study.json`` (settings, plan, machines), ``measured.json`` and ``runs/CELL-SEED.json``, each of them
    complete or absent.

    Args:
        path: made if need be.
        settings: what decides the numbers; a folder of another study is refused.

    Raises:
        ValueError: a folder with other settings, or with a file that cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._study: dict[str, Any] = {"settings": dict(settings), "plan": None, "machines": []}
        saved = self._read("study.json")
        if saved is not None:
            for name, value in settings.items():
                if saved["settings"].get(name) != value:
                    raise ValueError(
                        f"{name} is {value!r}, but the study in {path} has {saved['settings'].get(name)!r}; "
                        "name another folder with --output"
                    )
            self._study = saved
        (path / "runs").mkdir(parents=True, exist_ok=True)

    @property
    def plan(self) -> Plan | None:
        return None if self._study["plan"] is None else Plan(**self._study["plan"])

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._study["plan"] = dataclasses.asdict(plan)
        self._write("study.json", self._study)

    @property
    def machines(self) -> list[dict[str, str]]:
        """Those that the study ran on, without repetition."""
        return self._study["machines"]

    def add_machine(self, facts: Mapping[str, str]) -> None:
        if dict(facts) not in self.machines:
            self.machines.append(dict(facts))
            self._write("study.json", self._study)

    def runs(self) -> list[Run]:
        """Finished ones, by seed."""
        names = sorted(path.relative_to(self.path) for path in (self.path / "runs").glob("[!.]*.json"))
        return sorted((Run(**self._read(str(name))) for name in names), key=lambda run: run.seed)  # type: ignore[arg-type]

    def add_run(self, run: Run) -> None:
        self._write(f"runs/{run.cell}-{run.seed}.json", dataclasses.asdict(run))

    @property
    def measured(self) -> dict[str, Any] | None:
        """What :func:`measure.steps` gave, or None before."""
        return self._read("measured.json")

    @measured.setter
    def measured(self, measured: Mapping[str, Any]) -> None:
        self._write("measured.json", dict(measured))

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.exists():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and what it held is computed again") from error
        return content

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        checkpoint.write_text(self.path / name, json.dumps(content, indent=1) + "\n")
