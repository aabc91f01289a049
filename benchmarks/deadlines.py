"""How good is the guess of the error when time is up? ``python -m benchmarks.deadlines``.

A run is halted after its first round, its second, and so on, and the error that
:class:`parasolver_core.deadline.Deadline` tells is held against the true one, sample by sample.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import typer

from benchmarks.problems import PROBLEMS, Problem
from parasolver_core import DDIM, DDPM, DPMSolver, ParallelIntegralSolver, Solution, StepRule, solve_sequential

SAMPLES = {"policy": 8, "mixture": 8, "mixture, guided": 8, "clothes": 2, "emoji": 2}
LARGE = {"clothes", "emoji"}  # networks, with which short runs are enough


def runs(problem: Problem) -> Iterator[tuple[str, StepRule, int, int]]:
    """``(name, step rule, steps, window)``."""
    own: dict[str, Any] = {"prediction_type": problem.prediction_type}
    yield "DDIM-50", DDIM(problem.schedule, **own), 50, 16
    yield "2M-25", DPMSolver(problem.schedule, order=2, **own), 25, 8
    if problem.name not in LARGE:
        yield "DDIM-50", DDIM(problem.schedule, **own), 50, 50
        yield "DDPM-100", DDPM(problem.schedule, **own), 100, 32
        yield "DDIM-1000", DDIM(problem.schedule, **own), 1000, 32


def halted(solver: ParallelIntegralSolver, denoiser: Any, x_T: Any, timesteps: Any, rounds: int) -> Solution:
    """The run with a deadline after so many rounds; a clock that ticks once a round stands for time."""
    now = [0.0]

    def ticking(*args: Any) -> Any:
        now[0] += 1.0
        return denoiser(*args)

    with patch.object(time, "perf_counter", lambda: now[0]):
        return solver.solve(ticking, x_T, timesteps, seed=0, max_seconds=rounds + 0.5, throw=False)


def ratios(problem: Problem, rule: StepRule, steps: int, window: int) -> Iterator[tuple[int, float]]:
    """The round in which a run was halted, and the true error over the guess, of each sample that was not final."""
    denoiser, timesteps = problem.make(), problem.schedule.timesteps(steps)
    x_T = problem.starts(SAMPLES[problem.name], seed=100)
    exact = solve_sequential(denoiser, x_T, timesteps, rule, seed=0).sample.flatten(1)
    solver = ParallelIntegralSolver(rule, window, check=False)
    for rounds in range(1, steps):
        solution = halted(solver, denoiser, x_T, timesteps, rounds)
        if solution.success:
            return
        error = (solution.sample.flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)
        live = np.array(solution.steps) < steps
        yield from ((rounds, ratio) for ratio in (error.numpy() / solution.error_estimate)[live])


def row(name: str, found: list[tuple[int, float]]) -> str:
    later = np.array([ratio for rounds, ratio in found if rounds > 1])
    quantiles = " | ".join(f"{value:.1g}" for value in np.quantile(later, [0.05, 0.5, 0.95, 1.0]))
    first = np.mean([ratio > 1 for rounds, ratio in found if rounds == 1])
    return f"| {name} | {len(later)} | {quantiles} | {np.mean(later > 1):.1%} | {first:.0%} |"


def main(only: Annotated[str, typer.Option(help="a part of the names of the networks")] = "") -> None:
    """Print the table: first what was told from the second round on, and then after the first."""
    print("| network | halts | 5 % | half | 95 % | largest | above 1 | after one round |")
    print("|---|---|---|---|---|---|---|---|")
    for name in SAMPLES:
        if only in name:
            problem = PROBLEMS[name]
            print(row(name, [one for _, *run in runs(problem) for one in ratios(problem, *run)]), flush=True)


if __name__ == "__main__":
    typer.run(main)
