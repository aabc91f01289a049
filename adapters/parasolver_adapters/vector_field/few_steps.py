"""Fewer steps than Newton's method pays for: every stage a node of the core's solver, a window of them in a round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from parasolver_adapters.vector_field.effort import Call, Effort, Row, largest
from parasolver_adapters.vector_field.methods import RungeKutta
from parasolver_adapters.vector_field.problem import Problem
from parasolver_adapters.vector_field.verification import companions_matter, too_sensitive
from parasolver_core import ParallelIntegralSolver
from parasolver_core.arrays import Array, to_host

FewSteps = Literal["sequential", "parallel"]

FEWEST_WORTH_A_WORD = 8  # steps; nobody would expect fewer to be made in parallel
NODES = 16  # in a round, unless a window is given
SILENT = (
    "fewer than 64 are unless few_steps='parallel' asks for rounds, of a Runge-Kutta method; few_steps='sequential' "
    "silences this"
)


def check_few_steps(few_steps: Any, method: Any) -> None:
    if few_steps is not None and few_steps not in get_args(FewSteps):
        raise ValueError(f'few_steps: expected "sequential" or "parallel", got {few_steps!r}')
    if few_steps == "parallel" and not isinstance(method, RungeKutta):
        raise ValueError(
            "few_steps: only Runge-Kutta methods make fewer than 64 steps in parallel; take 'euler', 'midpoint', "
            "'heun' or 'rk4', or few_steps='sequential'"
        )


def few_in_rounds(problem: Problem, window: int, tolerance: float, effort: Effort) -> Array | None:
    """The trajectory ``(N + 1, *state)``; None where it could not be found so, with the reason in ``effort.note``."""
    import torch  # needed by what follows

    from parasolver_adapters.samplers.flows import sample_flow
    from parasolver_adapters.samplers.rules import step_rule_from_sampler
    from parasolver_adapters.stepwise import FixedRule

    method, grid = problem.method, problem.grid
    assert isinstance(method, RungeKutta)
    table = step_rule_from_sampler(sample_flow, torch.tensor(grid.t), method=method).table
    # Nothing is known of a field before it is called: it stays what it was, and does not depend on the state.
    table = replace(table, slope=np.zeros(len(table)), held=np.tile([0.0, 1.0], (len(table), 1)))
    rule = FixedRule(table)

    last: dict[float, Call] = {}

    def denoiser(x: Array, t: Array) -> Array:
        t = problem.xp.astype(t, grid.dtype)
        f = problem.field(t, x)
        for k, time in enumerate(to_host(t).tolist()):
            last[time] = t[k : k + 1], x[k : k + 1, ...], f[k : k + 1, ...]
        return f

    def rows() -> list[Row]:
        nearest = {time: np.argmin(np.abs(grid.t[:-1] - time)) for time in sorted(last)}
        return [(*last[time], float(abs(grid.h[n]))) for time, n in nearest.items()]

    solver = ParallelIntegralSolver(rule, window, tolerance=tolerance, check=False)
    solution = solver.solve(denoiser, effort.reached[0], rule.timesteps, save="trajectory", throw=False)
    if not solution.success or solution.trajectory is None:
        effort.note = f"rounds did not end well ({solution.status.value})"
        return None
    nodes = solution.trajectory[:, 0, ...]
    states = nodes[:: method.stages, ...]
    stages = problem.xp.reshape(nodes[:-1, ...], (len(grid), method.stages, *nodes.shape[1:]))
    effort.note = companions_matter(problem, _groups(problem.xp, rows(), window))
    effort.note = effort.note or too_sensitive(problem, states, effort, tolerance, stages)
    if effort.note:
        return None
    effort.rounds, effort.windows = solution.stats.rounds, 1
    return states


def _groups(xp: Any, rows: list[Row], window: int) -> list[list[Row]]:
    """The largest row alone, and rows of all times without those that are the largest in some way; as many as a round.

    Rows that act on each other differ so: without the largest if those act on others, and alone if all do together.
    """
    extremes = {measure: n for measure, (_, n) in largest(xp.concat([y for _, y, _, _ in rows], axis=0)).items()}
    others = [row for n, row in enumerate(rows) if n not in extremes.values()]
    chosen = np.unique(np.linspace(0, len(others) - 1, min(window, -(-len(others) // 2))).astype(int))
    return [group for group in ([rows[extremes["square"]]], [others[n] for n in chosen]) if group]
