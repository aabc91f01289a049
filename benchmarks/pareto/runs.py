"""Running every method, and what is kept of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from benchmarks.baselines import parareal
from benchmarks.pareto.settings import MAX_ROWS, SETTINGS, Setting, allowed, methods_for, step_rule, tolerances
from benchmarks.problems import PROBLEMS, Denoiser, Problem, flow_denoiser
from parasolver_core import Solution, solve, solve_sequential


@dataclass(frozen=True)
class Point:
    """One method with one tolerance on all samples of a problem and setting.

    Args:
        errors: of each sample.
        rounds, evaluations: of each sample.
    """

    problem: str
    setting: str
    method: str
    tolerance: float
    errors: list[float]
    rounds: list[int]
    evaluations: list[int]
    seconds: float

    @property
    def error(self) -> float:
        """Geometric mean."""
        return float(np.exp(np.mean(np.log(np.maximum(self.errors, 1e-12)))))

    @property
    def key(self) -> tuple[str, str, str, float]:
        return self.problem, self.setting, self.method, self.tolerance


class Bench:
    """Samples of one problem and setting, by their seeds from ``first`` on, and their sequential truth."""

    def __init__(self, problem: Problem, setting: Setting, denoiser: Denoiser, seeds: int, first: int = 0) -> None:
        self.problem, self.setting = problem, setting
        self.denoiser = flow_denoiser(denoiser, problem) if setting.sampler == "flow" else denoiser
        self.rule, self.timesteps = step_rule(problem, setting)
        self.x_T = problem.starts(seeds, first) * getattr(self.rule, "init_noise_sigma", 1.0)
        self.seeds = list(range(first, first + seeds))

    @cached_property
    def truth(self) -> torch.Tensor:
        """The sequential samples."""
        return solve_sequential(self.denoiser, self.x_T, self.timesteps, self.rule, seed=self.seeds).sample

    def errors(self, sample: torch.Tensor) -> list[float]:
        """Relative RMS distance of each sample to the truth."""
        truth = self.truth.flatten(1).double()
        return ((sample.flatten(1).double() - truth).norm(dim=1) / truth.norm(dim=1)).tolist()

    def points(self, method: str, done: set[tuple[str, str, str, float]]) -> Iterator[Point]:
        """What is not done yet of a method."""
        if method == "parareal":
            yield from self._parareal(done)
            return
        if method == "few steps":
            yield from self._few_steps(done)
            return
        for tolerance in tolerances(method, self.setting):
            if (self.problem.name, self.setting.name, method, tolerance) in done:
                continue
            warmup = 4 if method == "parasolver" and self.setting.noisy else 0
            started = time.perf_counter()
            solution = solve(
                self.denoiser,
                self.x_T,
                self.timesteps,
                self.rule,
                self.setting.window,
                **allowed(method, tolerance),
                warmup_steps=warmup,
                seed=self.seeds,
                check=False,
                max_rows=MAX_ROWS,
            )
            yield self._point(method, tolerance, solution.sample, *spent(solution, len(self.seeds)), started)

    def _point(
        self,
        method: str,
        tolerance: float,
        sample: torch.Tensor,
        rounds: list[int],
        evaluations: list[int],
        started: float,
    ) -> Point:
        return Point(
            self.problem.name,
            self.setting.name,
            method,
            tolerance,
            self.errors(sample),
            rounds,
            evaluations,
            time.perf_counter() - started,
        )

    def _parareal(self, done: set[tuple[str, str, str, float]]) -> Iterator[Point]:
        if (self.problem.name, self.setting.name, "parareal", 0.0) in done:
            return
        started, points, many = time.perf_counter(), [], len(self.seeds)
        for k, one in enumerate(parareal(self.denoiser, self.x_T, self.timesteps, self.rule)):
            points.append(
                self._point("parareal", float(k), one.sample, [one.rounds] * many, [one.evaluations] * many, started)
            )
            if points[-1].error < 1e-3:
                break
        yield from points  # all at once: an interrupted benchmark begins its iterations anew

    def _few_steps(self, done: set[tuple[str, str, str, float]]) -> Iterator[Point]:
        """What a user would take instead: fewer steps of a good sequential sampler."""
        for sampler in ("2M", "UniPC"):
            for steps in (4, 6, 8, 10, 12, 15, 20, 25, 30, 40):
                if (self.problem.name, self.setting.name, sampler, float(steps)) in done:
                    continue
                rule, timesteps = step_rule(self.problem, Setting("", sampler, steps, 1))
                started = time.perf_counter()
                sample = solve_sequential(self.denoiser, self.x_T, timesteps, rule).sample
                many = len(self.seeds)
                yield self._point(sampler, float(steps), sample, [steps] * many, [steps] * many, started)


def spent(solution: Solution, batch: int) -> tuple[list[int], list[int]]:
    """Rounds and evaluations of each sample."""
    records = [one for part in solution.stats.history for one in part.samples]
    rounds, evaluations = [0] * batch, [0] * batch
    for one in records:
        rounds[one.sample] += 1
        evaluations[one.sample] += len(one.nodes)
    return rounds, evaluations


def at_error(points: list[Point], error: float) -> tuple[float, float] | None:
    """Mean rounds and evaluations at an error, interpolated in its logarithm; None if the points do not reach it."""
    ordered = sorted(points, key=lambda one: one.error)
    best: list[Point] = []  # what no other point beats in error and evaluations
    for one in ordered:
        if not best or np.mean(one.rounds) < np.mean(best[-1].rounds):
            best.append(one)
    logs = np.log([one.error for one in best])
    if not best or not logs[0] <= np.log(error):
        return None
    rounds, evaluations = (
        float(np.interp(np.log(error), logs, [np.mean(getattr(one, what)) for one in best]))
        for what in ("rounds", "evaluations")
    )
    return rounds, evaluations


class Results:
    """All points, kept in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.points = [Point(**one) for one in json.loads(file.read_text())] if file.exists() else []

    def add(self, point: Point) -> None:
        self.points.append(point)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(one) for one in self.points]))
        temporary.replace(self.file)

    def of(self, problem: str, setting: str, method: str) -> list[Point]:
        return [one for one in self.points if (one.problem, one.setting, one.method) == (problem, setting, method)]

    def methods(self, problem: str, setting: str) -> list[str]:
        """In the order in which they ran."""
        return list(
            dict.fromkeys(one.method for one in self.points if (one.problem, one.setting) == (problem, setting))
        )

    def at(self, problem: str, setting: str, method: str, error: float) -> tuple[float, float] | None:
        return at_error(self.of(problem, setting, method), error)


def run(plan: dict[str, tuple[str, ...]], seeds: int, results: Results, methods: list[str] | None = None) -> None:
    """Everything of the plan that the results do not hold yet; None: all methods."""
    for name, settings in plan.items():
        denoiser = PROBLEMS[name].make()
        for setting in (SETTINGS[one] for one in settings):
            bench = Bench(PROBLEMS[name], setting, denoiser, seeds)
            wanted = [one for one in methods_for(setting) if methods is None or one in methods]
            for method in track(wanted, f"{name}, {setting.name}"):
                for point in bench.points(method, {one.key for one in results.points}):
                    results.add(point)
