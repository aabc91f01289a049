"""Fewer steps than Newton's method pays for: every stage a node of the core's solver, a window of them in a round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from parasolver_adapters.vector_field.effort import Call, Effort, Row, largest, row_of
from parasolver_adapters.vector_field.methods import RungeKutta
from parasolver_adapters.vector_field.problem import Problem
from parasolver_adapters.vector_field.verification import companions_matter, too_sensitive
from parasolver_core import ParallelIntegralSolver, Rows
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

    denoiser = _Noted(problem, method.stages)
    solver = ParallelIntegralSolver(rule, window, tolerance=tolerance, check=False)
    solution = solver.solve(denoiser, effort.reached[0], rule.timesteps, save="trajectory", throw=False)
    if not solution.success or solution.trajectory is None:
        effort.note = f"rounds did not end well ({solution.status.value})"
        return None
    nodes = solution.trajectory[:, 0, ...]
    states = nodes[:: method.stages, ...]
    stages = problem.xp.reshape(nodes[:-1, ...], (len(grid), method.stages, *nodes.shape[1:]))
    effort.note = companions_matter(problem, denoiser.groups(window))
    effort.note = effort.note or too_sensitive(problem, states, effort, tolerance, stages)
    if effort.note:
        return None
    effort.rounds, effort.windows = solution.stats.rounds, 1
    return states


class _Noted:
    """The field as a denoiser, and in what call each node was last: times do not tell nodes apart.

    Args:
        problem: the problem.
        stages: nodes of a step.
    """

    takes_rows = True

    def __init__(self, problem: Problem, stages: int) -> None:
        self._problem, self._stages = problem, stages
        self._said: dict[int, tuple[Call, int]] = {}  # by node, the call and the row

    def __call__(self, x: Array, t: Array, rows: Rows | None = None) -> Array:
        assert rows is not None
        t = self._problem.xp.astype(t, self._problem.grid.dtype)
        call = t, x, self._problem.field(t, x)
        self._said.update((node, (call, row)) for row, node in enumerate(rows.steps.tolist()))
        return call[2]

    def groups(self, window: int) -> list[list[Row]]:
        """Rows to be called again, in other company: if they act on each other they then differ.

        The largest alone, if the large feel the others. Others without those that are the largest in some way, if these
        act on them; as many as a round. And of the calls that were the largest or the least in some way, guesses
        included, the least row, if all of a call act together.

        Args:
            window: rows of a round.
        """
        nodes, steps = sorted(self._said), self._problem.grid.h
        calls = {id(self._said[node][0]): to_host(self._said[node][0][1]) for node in nodes}
        last_for = {call: [n for n, node in enumerate(nodes) if id(self._said[node][0]) == call] for call in calls}
        y = np.stack([calls[id(call)][row] for call, row in (self._said[node] for node in nodes)])
        extremes = {measure: n for measure, (_, n) in largest(y).items()}
        others = [n for n in range(len(nodes)) if n not in extremes.values()]
        chosen = np.unique(np.linspace(0, len(others) - 1, min(window, -(-len(others) // 2))).astype(int))
        squares = np.sum(np.square(y.reshape(len(y), -1)), axis=-1)
        sizes = {call: largest(x[None, ...]) for call, x in calls.items()}
        of_calls = [max(calls, key=lambda call: sizes[call][measure][0]) for measure in extremes]
        least = dict.fromkeys(min(last_for[call], key=lambda n: squares[n]) for call in of_calls)
        groups = [extremes["square"]], [others[n] for n in chosen], least

        def row(n: int) -> Row:
            return row_of(*self._said[nodes[n]], abs(steps[nodes[n] // self._stages]))

        return [[row(n) for n in group] for group in groups if group]
