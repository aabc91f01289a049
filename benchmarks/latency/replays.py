"""Recorded: the rows of every round of real runs."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.latency.timings import geometric_mean, relative
from benchmarks.pareto.settings import MAX_ROWS, Setting, step_rule
from benchmarks.problems import Denoiser, Problem
from parasolver_core import solve, solve_sequential


@dataclass(frozen=True)
class Replay:
    """The rows of each round of real runs, a list for each sample, and how far the samples were off."""

    problem: str
    sampler: str
    steps: int
    window: int
    rounds: list[list[int]]
    error: float

    @property
    def name(self) -> str:
        return f"{self.sampler}-{self.steps}, window {self.window}"


def replay(
    problem: Problem, denoiser: Denoiser, sampler: str, steps: int, window: int, seeds: int, tolerance: float
) -> Replay:
    """Run once for all samples together; each sample's own rounds count."""
    rule, timesteps = step_rule(problem, Setting("", sampler, steps, window))
    x_T, seed = problem.starts(seeds), list(range(seeds))
    truth = solve_sequential(denoiser, x_T, timesteps, rule, seed=seed).sample
    solution = solve(
        denoiser, x_T, timesteps, rule, window, tolerance=tolerance, seed=seed, check=False, max_rows=MAX_ROWS
    )
    records = [one for part in solution.stats.history for one in part.samples]
    rounds = [[len(one.nodes) for one in records if one.sample == sample] for sample in seed]
    errors = [relative(a, b) for a, b in zip(solution.sample, truth, strict=True)]
    return Replay(problem.name, sampler, steps, window, rounds, geometric_mean(errors))
