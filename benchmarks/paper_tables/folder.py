"""The folder of the results, and drawing what is missing in it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track

from benchmarks.paper_tables.models import Drawn, Model
from benchmarks.paper_tables.samplers import METHODS, Sampler, options


@dataclass(frozen=True)
class Record:
    """What is kept of a picture; ``error`` is the relative RMS distance to the sequential one, before decoding."""

    rounds: int
    evaluations: int
    seconds: float
    error: float


@dataclass(frozen=True)
class Folder:
    """The results: a folder for each sampler and method, with pictures, records and, if sequential, final states."""

    root: Path

    def begin(self, plan: dict[str, Any]) -> None:
        """Refuse to go on with another model, or otherwise drawn pictures, than before."""
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / "plan.json"
        if file.exists() and (before := json.loads(file.read_text())) != plan:
            differs = ", ".join(name for name in plan if before.get(name) != plan[name])
            raise typer.BadParameter(f"{self.root} holds results with another {differs}; choose another folder")
        file.write_text(json.dumps(plan, indent=2) + "\n")

    def cell(self, sampler: str, method: str) -> Path:
        return self.root / sampler / method

    def records(self, sampler: str, method: str) -> list[Record]:
        """Those of the complete pictures."""
        file = self.cell(sampler, method) / "records.json"
        return [Record(**one) for one in json.loads(file.read_text())] if file.exists() else []

    def add(self, sampler: str, method: str, number: int, drawn: Drawn) -> None:
        """Keep a picture; its record last and at once, so that an interruption leaves no half of one."""
        cell = self.cell(sampler, method)
        cell.mkdir(parents=True, exist_ok=True)
        drawn.picture.save(cell / f"{number:05d}.png")
        if method == "sequential":
            np.save(cell / f"{number:05d}.npy", drawn.state)
        truth = np.load(self.cell(sampler, "sequential") / f"{number:05d}.npy")
        error = float(np.linalg.norm(drawn.state - truth) / np.linalg.norm(truth))
        records = [*self.records(sampler, method), Record(drawn.rounds, drawn.evaluations, drawn.seconds, error)]
        new = cell / "records.json.new"
        new.write_text(json.dumps([asdict(one) for one in records]) + "\n")
        new.replace(cell / "records.json")

    def pictures(self, sampler: str, method: str) -> list[Path]:
        """Of the complete ones."""
        cell = self.cell(sampler, method)
        return [cell / f"{number:05d}.png" for number in range(len(self.records(sampler, method)))]


def draw_all(
    model: Model, folder: Folder, samplers: Iterable[Sampler], methods: Iterable[str], samples: int, window: int | None
) -> None:
    """Draw what is missing; the sequential pictures have to come first."""
    for sampler in samplers:
        model.use(sampler)
        for method in methods:
            done = len(folder.records(sampler.name, method))
            if done >= samples:
                continue
            given = options(sampler, method, model.table)
            if method != "sequential":
                given["window"] = window or sampler.window
            model.draw(0, 3, {**given, "subintervals": None})  # what a first call of a process costs is nobody's
            for number in track(range(done, samples), f"{sampler.name}, {METHODS[method]}"):
                folder.add(sampler.name, method, number, model.draw(number, sampler.steps, given))
