"""How many rounds will a run take? ``python -m benchmarks.planning`` fits the constants of the prediction.

Counts the rounds of the default method, one sample at a time, over samplers, numbers of steps, windows and tolerances,
and compares them with :func:`parasolver_core.planning.prediction.predicted_rounds`; then fits that formula's constants
anew. Nothing here depends on time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.pareto.settings import MAX_ROWS, Setting, step_rule
from benchmarks.problems import PROBLEMS, Denoiser
from benchmarks.tables import show
from parasolver_core import solve
from parasolver_core.methods.expected import _SLIDING, _SLIDING_NOISY
from parasolver_core.methods.presets import get_method
from parasolver_core.planning.prediction import predicted_rounds, predicted_rows

SAMPLERS = ("DDIM", "2M", "DDPM")
STEPS = (10, 20, 50, 100, 200, 1000)
WINDOWS = (2, 4, 8, 16, 32, 64, 128)
TOLERANCES = (1e-1, 1e-2, 1e-3)
KINDS = {
    (False, False): "sliding",
    (False, True): "sliding, noise",
    (True, False): "spread",
    (True, True): "spread, noise",
}


@dataclass(frozen=True)
class Case:
    """One sampler on one problem."""

    problem: str
    sampler: str
    steps: int
    window: int
    tolerance: float


@dataclass(frozen=True)
class Count:
    """What a case took, and what was predicted.

    Args:
        kind: one of :data:`KINDS`.
        nodes: how many the tolerance needs where nodes are spread.
    """

    case: Case
    kind: str
    rounds: int
    predicted: float
    evaluations: int
    predicted_evaluations: int
    nodes: float

    @property
    def ratio(self) -> float:
        """Above 1: more rounds than predicted."""
        return self.rounds / self.predicted


def cases(problems: list[str], most: int) -> Iterator[Case]:
    """All of them; windows from 2 to the number of steps."""
    for problem in problems:
        for sampler in SAMPLERS:
            for steps in (one for one in STEPS if one <= most):
                for window in (one for one in WINDOWS if one <= steps):
                    yield from (Case(problem, sampler, steps, window, tolerance) for tolerance in TOLERANCES)


def count(case: Case, denoiser: Denoiser, seed: int) -> Count:
    """Run it."""
    problem, method = PROBLEMS[case.problem], get_method("secant")
    rule, timesteps = step_rule(problem, Setting("", case.sampler, case.steps, case.window))
    recurrence = rule.recurrence(timesteps)
    solution = solve(
        denoiser,
        problem.starts(1, seed),
        timesteps,
        rule,
        case.window,
        tolerance=case.tolerance,
        seed=seed,
        max_rows=MAX_ROWS,
    )
    kind = KINDS[method.spreads(recurrence, case.window, case.tolerance), recurrence.stochastic]
    predicted = predicted_rounds(recurrence, method, case.window, case.tolerance)
    rows = sum(predicted_rows(recurrence, method, case.window, case.tolerance))
    nodes = method.needed_nodes(recurrence, case.tolerance)
    return Count(case, kind, solution.stats.rounds, predicted, solution.stats.evaluations, rows, nodes)


def fit(counts: list[Count], kind: str) -> list[float]:
    """The constants of one kind of run, least squares of the relative error; runs that took all steps tell nothing."""
    own = [one for one in counts if one.kind == kind and one.rounds < one.case.steps]
    n, window, tolerance, rounds, nodes = (
        np.array([value(one) for one in own])
        for value in (
            lambda one: one.case.steps,
            lambda one: one.case.window,
            lambda one: one.case.tolerance,
            lambda one: one.rounds,
            lambda one: one.nodes,
        )
    )
    digits = np.log10(1 / tolerance)
    lengths, settling, power = n / window, 1 - 1 / window, _SLIDING_NOISY[2] if kind.endswith("noise") else _SLIDING[2]
    sliding = [settling, settling * digits * lengths**power], rounds - lengths  # the power is not fitted
    terms, target = {
        "sliding": sliding,
        "sliding, noise": sliding,
        "spread": ([np.ones(len(own)), digits, nodes / window], rounds),
        "spread, noise": ([np.ones(len(own)), nodes / window], rounds),  # q is 0
    }[kind]
    return np.linalg.lstsq(np.stack(terms, axis=1) / rounds[:, None], target / rounds, rcond=None)[0].tolist()


def spread_table(counts: list[Count]) -> list[dict[str, str]]:
    """Real over predicted rounds, and the constants that fit best, by kind of run and problem."""
    rows = []
    for kind in dict.fromkeys(one.kind for one in counts):
        own = [one for one in counts if one.kind == kind]
        for problem in [None, *dict.fromkeys(one.case.problem for one in own)]:
            some = [one for one in own if problem in (None, one.case.problem)]
            ratios = np.array([one.ratio for one in some])
            tenth, half, ninth = np.quantile(ratios, (0.1, 0.5, 0.9))
            evaluations = np.median([one.evaluations / one.predicted_evaluations for one in some])
            rows.append(
                {
                    "runs": kind,
                    "problem": problem or "all",
                    "count": str(len(some)),
                    "real / predicted: tenth": f"{tenth:.2f}",
                    "median": f"{half:.2f}",
                    "nine tenths": f"{ninth:.2f}",
                    "within -15 %, +20 %": f"{np.mean((ratios >= 0.85) & (ratios <= 1.2)):.0%}",
                    "evaluations, median": f"{evaluations:.2f}",
                    "constants, fitted": ", ".join(f"{one:.2f}" for one in fit(some, kind)),
                }
            )
    return rows


def main(
    problem: Annotated[list[str] | None, typer.Option(help="Of benchmarks.problems; may be repeated.")] = None,
    most: Annotated[int, typer.Option(help="Steps of the longest runs.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the counts to this file.")] = None,
) -> None:
    """Count rounds, compare them with the prediction, and fit its constants."""
    names = problem or ["policy", "mixture", "clothes"]
    networks = {name: PROBLEMS[name].make() for name in names}
    listed = [(case, seed) for case in cases(names, most) for seed in range(seeds)]
    counts = [count(case, networks[case.problem], seed) for case, seed in track(listed, "Counting rounds")]
    show(Console(), "Rounds of the default method", spread_table(counts))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(one) for one in counts]) + "\n")


if __name__ == "__main__":
    typer.run(main)
