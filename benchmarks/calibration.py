"""Does ``tolerance`` mean what it says? ``python -m benchmarks.calibration``.

Samples the embedded model sequentially and in parallel and compares the true relative error of every sample with the
tolerance asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from parasolver_adapters.embedded import SCHEDULE, EmbeddedDenoiser
from parasolver_core import DDIM, DDPM, DPMSolver, StepRule, solve, solve_sequential

CASES: dict[str, tuple[StepRule, int, int]] = {  # name: step rule, steps, window
    "DDIM-50": (DDIM(SCHEDULE), 50, 16),
    "DDIM-50, all at once": (DDIM(SCHEDULE), 50, 50),
    "DPM-Solver++(2M)-25": (DPMSolver(SCHEDULE), 25, 8),
    "DDPM-100": (DDPM(SCHEDULE), 100, 32),
    "DDIM-400, spread": (DDIM(SCHEDULE), 400, 32),
}
TOLERANCES = (3e-2, 1e-2, 3e-3)


def measure(name: str, tolerances: tuple[float, ...], count: int, seed: int) -> list[dict[str, Any]]:
    """One record a tolerance: rounds, evaluations and errors of ``count`` samples, 16 at a time."""
    rule, steps, window = CASES[name]
    denoiser, timesteps = EmbeddedDenoiser(), SCHEDULE.timesteps(steps)
    starts = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed)).split(16)
    seeds = [list(range(first, first + len(x))) for first, x in zip(range(0, count, 16), starts, strict=True)]
    truths = [
        solve_sequential(denoiser, x, timesteps, rule, seed=own).sample for x, own in zip(starts, seeds, strict=True)
    ]
    records = []
    for tolerance in tolerances:
        errors, rounds, evaluations = [], [], 0
        for x, own, truth in zip(starts, seeds, truths, strict=True):
            solution = solve(denoiser, x, timesteps, rule, window, tolerance=tolerance, seed=own, max_rows=64)
            distance = (solution.sample - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
            errors += distance.tolist()
            taken = [record.sample for part in solution.stats.history for record in part.samples]
            rounds += np.bincount(taken, minlength=len(x)).tolist()
            evaluations += solution.stats.evaluations
        ratio = np.array(errors) / tolerance
        records.append(
            {
                "case": name,
                "window": window,
                "tolerance": tolerance,
                "rounds": float(np.mean(rounds)),
                "evaluations": evaluations / count,
                "median": float(np.median(ratio)),
                "worst": float(ratio.max()),
                "within": float(np.mean(ratio <= 1)),
            }
        )
    return records


def main(
    count: Annotated[int, typer.Option(help="Samples a line.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 1000,
    file: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Print the share of samples within the tolerance."""
    table = Table("case", "window", "tolerance", "rounds", "evaluations", "error / tolerance", "worst", "within")
    records = []
    for name in CASES:
        for one in measure(name, TOLERANCES, count, seed):
            records.append(one)
            figures = (
                f"{one['rounds']:.1f}",
                f"{one['evaluations']:.0f}",
                f"{one['median']:.2f}",
                f"{one['worst']:.2f}",
            )
            table.add_row(name, str(one["window"]), f"{one['tolerance']:g}", *figures, f"{one['within']:.0%}")
    Console().print(table)
    if file is not None:
        file.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    typer.run(main)
