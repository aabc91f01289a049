"""Measured: sequential and parallel samplers in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.latency.devices import BatchCost
from benchmarks.pareto.settings import Setting, step_rule
from benchmarks.problems import Denoiser, Problem
from parasolver_core import Solution, StepRule, solve, solve_sequential

WINDOWS = (16, 32, 100)  # the last holds all steps of these samplers
TOLERANCES = (5e-2, 1e-2, 1e-3)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 100)


@dataclass(frozen=True)
class Timing:
    """One sampler, window and tolerance, measured; all seconds are medians.

    Args:
        sequential: seconds of ``solve_sequential``.
        bare: seconds of the bare loop.
        parallel: seconds of ``solve``.
        network: its share that the network took.
        rounds, evaluations: means over the samples.
        error: geometric mean of the relative errors; ``worst`` the largest.
        predicted: seconds that the measured cost of a batch makes of the rounds' rows, without the solver's own time.
    """

    problem: str
    sampler: str
    steps: int
    window: int
    tolerance: float
    sequential: float
    bare: float
    parallel: float
    network: float
    rounds: float
    evaluations: float
    error: float
    worst: float
    predicted: float

    @property
    def own(self) -> float:
        """What is not the network."""
        return self.parallel - self.network


def bare_loop(
    denoiser: Denoiser, x_T: Tensor, timesteps: NDArray[Any], rule: StepRule, generator: torch.Generator
) -> Tensor:
    """Nothing but the network and the arithmetic of the steps."""
    recurrence = rule.recurrence(timesteps)
    memory, times = recurrence.memory, torch.from_numpy(timesteps)
    xs, ms = [x_T], []
    for i in range(len(recurrence)):
        ms = [denoiser(xs[0], times[i].expand(len(x_T))), *ms[: memory - 1]]
        z = torch.randn(x_T.shape, generator=generator, dtype=x_T.dtype) if recurrence.c[i] != 0 else None
        xs = [recurrence.advance(i, xs, ms, z), *xs[: memory - 1]]
    return xs[0]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what was returned."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def relative(sample: Tensor, truth: Tensor) -> float:
    """Relative RMS distance."""
    return float((sample.double() - truth.double()).norm() / truth.double().norm())


def geometric_mean(errors: Sequence[float]) -> float:
    """Never 0."""
    return float(np.exp(np.mean(np.log(np.maximum(errors, 1e-12)))))


def batch_cost(problem: Problem, denoiser: Denoiser, repeats: int, batches: Sequence[int] = BATCHES) -> BatchCost:
    """Sizes in turns."""
    found: dict[int, list[float]] = {rows: [] for rows in batches}
    for _ in range(repeats + 1):
        for rows in batches:
            x, t = torch.randn(rows, *problem.shape, dtype=problem.dtype), torch.full((rows,), 500)
            found[rows].append(timed(lambda x=x, t=t: denoiser(x, t))[0])
    return BatchCost(problem.name, list(batches), [float(np.median(one[1:])) for one in found.values()])


class Clock:
    """All windows and tolerances of one sampler, and the sequential samplers, in turns."""

    def __init__(self, problem: Problem, denoiser: Denoiser, sampler: str, steps: int, cost: BatchCost) -> None:
        self.problem, self.denoiser, self.sampler, self.steps, self.cost = problem, denoiser, sampler, steps, cost
        self.rule, self.timesteps = step_rule(problem, Setting("", sampler, steps, 1))
        self.windows = sorted({min(window, steps) for window in WINDOWS})
        self.choices = [(window, tolerance) for window in self.windows for tolerance in TOLERANCES]

    def timings(self, repeats: int, seeds: int) -> list[Timing]:
        """A repetition times everything once, with the next sample; the first, a rehearsal, does not count."""
        starts = self.problem.starts(seeds)
        sequential, bare = [], []
        runs: dict[tuple[int, float], list[tuple[float, Solution, float]]] = {choice: [] for choice in self.choices}
        for repeat in range(repeats + 1):
            seed = repeat % seeds
            x_T, generator = starts[seed : seed + 1], torch.Generator().manual_seed(seed)
            arguments = (self.denoiser, x_T, self.timesteps, self.rule)
            seconds, truth = timed(lambda a=arguments, s=seed: solve_sequential(*a, seed=s))
            sequential.append(seconds)
            bare.append(timed(lambda a=arguments, g=generator: bare_loop(*a, g))[0])
            for choice in self.choices:
                seconds, solution = timed(lambda a=arguments, c=choice, s=seed: solve(*a, c[0], tolerance=c[1], seed=s))
                runs[choice].append((seconds, solution, relative(solution.sample, truth.sample)))
        once = float(np.median(sequential[1:])), float(np.median(bare[1:]))
        return [self._timing(*choice, *once, found[1:]) for choice, found in runs.items()]

    def _timing(
        self, window: int, tolerance: float, sequential: float, bare: float, runs: list[tuple[float, Solution, float]]
    ) -> Timing:
        stats, errors = [solution.stats for _, solution, _ in runs], [error for _, _, error in runs]
        predicted = [sum(self.cost(part.evaluations) for part in one.history) for one in stats]
        return Timing(
            self.problem.name,
            self.sampler,
            self.steps,
            window,
            tolerance,
            sequential,
            bare,
            float(np.median([seconds for seconds, _, _ in runs])),
            float(np.median([one.seconds_denoiser for one in stats])),
            float(np.mean([one.rounds for one in stats])),
            float(np.mean([one.evaluations for one in stats])),
            geometric_mean(errors),
            max(errors),
            float(np.median(predicted)),
        )
