"""Newton's method for all steps of a window at once, from a coarse solution up.

The unknown is the whole trajectory ``y_1 .. y_N``. A round advances every node by one step of the method, in one batch a
stage, compares the ends with the nodes behind (``r_n = Phi_n(y_n) - y_{n+1}``) and carries the defects along the
trajectory with a :class:`~parasolver_adapters.vector_field.surrogate.Propagator`. It rests only where all defects vanish:
at the sequential solution.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from parasolver_adapters.vector_field.jacobian import FieldJacobian
from parasolver_adapters.vector_field.problem import Effort, Problem
from parasolver_adapters.vector_field.problem import integrate as integrate_sequentially
from parasolver_core.arrays import Array, to_host

FEWEST_STEPS = 64  # of a window; fewer are sooner made one after another
_RATIO = 25  # the most steps of one level for one of the level before
_COARSE_TOLERANCE = 1e-7  # a coarse level is no nearer to the finest than this anyway
_CORRECTIONS = 14
_STALE = 1e-3  # Jacobians at states that were this far off are taken again
_UNIT = 500  # rows that cost about as much as the call itself, when efforts are compared


def integrate(
    problem: Problem,
    y0: Array,
    *,
    dense: bool,
    window: int | None,
    coarse_steps: int,
    effort: Effort,
) -> Array:
    """All states ``y_0 .. y_N``, ``(N + 1, *state)``.

    Windows shrink where Newton's method does not converge and grow where it does. What is left is made step by step when
    windows become too short to pay, or when the calls spent on windows that failed exceed a tenth of those of the loop.

    Args:
        problem: the problem.
        y0: ``(1, *state)``.
        dense: whether Jacobians are matrices, or elementwise.
        window: the most steps at once; None: all.
        coarse_steps: steps of the coarsest level.
        effort: counts what was done.
    """
    n, states, lo = len(problem.grid), [y0], 0
    width = cap = min(window or n, n)
    calls_before = problem.field.calls
    budget = None
    while lo < n:
        hi = min(lo + width, n)
        if hi - lo < FEWEST_STEPS:
            if width < FEWEST_STEPS and not effort.note and width < n - lo:
                effort.note = "Newton's method converged in short windows only"
            break
        start, spent = states[-1][-1:, ...], _cost(problem)
        found, converged = _Window(problem, lo, hi, dense, effort).solve(start, problem.past(lo, states), coarse_steps)
        if budget is None:
            stages = max(1, round((problem.field.calls - calls_before) / 1)) and 4
            budget = stages * n / 10
        if found.shape[0]:
            states.append(found)
            lo += found.shape[0]
            effort.windows += 1
        if converged:
            width = min(2 * width, cap)
        else:
            effort.wasted += _cost(problem) - spent
            cap = max(width // 2, 1)
            width = width // 4
            if effort.wasted > budget:
                effort.note = "Newton's method left its basin too often"
                break
    if lo < n:
        effort.sequential_steps += n - lo
        states.append(integrate_sequentially(problem, lo, n, states[-1][-1:, ...], problem.past(lo, states)))
    return problem.xp.concat(states, axis=0)


def _cost(problem: Problem) -> int:
    return problem.field.calls + problem.field.evaluations // _UNIT


class _Window:
    """Steps ``lo .. hi - 1`` of a problem.

    Args:
        problem, dense, effort: as in :func:`integrate`.
        lo, hi: the window.
    """

    def __init__(self, problem: Problem, lo: int, hi: int, dense: bool, effort: Effort) -> None:
        self.problem, self.lo, self.hi, self.dense, self.effort = problem, lo, hi, dense, effort

    def solve(self, y: Array, past: Array | None, coarse_steps: int) -> tuple[Array, bool]:
        """The converged states behind ``lo``, from the state y there, and whether these are all of the window."""
        levels = level_nodes(self.lo, self.hi, coarse_steps)
        coarse = self.problem.coarse(levels[0])
        nodes = levels[0]
        states = self.problem.xp.concat([y, integrate_sequentially(coarse, 0, len(coarse.grid), y)], axis=0)
        if not bool(self.problem.xp.all(self.problem.xp.isfinite(states))):
            return y[:0, ...], False
        for finer in levels[1:]:
            states = self._fill(coarse, nodes, states, finer)
            nodes, last = finer, len(finer) == self.hi - self.lo + 1
            level = self.problem if last else self.problem.coarse(nodes)
            lo, hi = (self.lo, self.hi) if last else (0, len(nodes) - 1)
            tolerance = self.problem.tolerance if last else max(self.problem.tolerance, _COARSE_TOLERANCE)
            states, good = self._correct(level, lo, hi, states, past if last else None, tolerance)
            if last:
                return states[1 : good + 1, ...], good == hi - lo
            if good < hi:
                return y[:0, ...], False
            coarse = level
        raise AssertionError("the last level is the window")

    def _fill(self, coarse: Problem, nodes: NDArray[np.int64], states: Array, finer: NDArray[np.int64]) -> Array:
        """States at the finer nodes by cubic Hermite interpolation."""
        grid, xp = coarse.grid, self.problem.xp
        f, n = coarse.field(grid.asarray(grid.t), states), len(grid)
        if linear := getattr(coarse.method, "linear_part", None):
            f = f + linear(states)
        left = np.minimum(np.searchsorted(nodes, finer, side="right") - 1, n - 1)
        h = grid.h[left]
        s = (self.problem.grid.t[finer] - grid.t[left]) / h
        take = xp.asarray(left)
        ahead = xp.asarray(left + 1)
        table = (
            ((1 + 2 * s) * (1 - s) ** 2, states, take),
            (s**2 * (3 - 2 * s), states, ahead),
            (h * s * (1 - s) ** 2, f, take),
            (h * s**2 * (s - 1), f, ahead),
        )
        total: Any = 0
        for weights, values, index in table:
            total = total + xp.take(values, index, axis=0) * grid.column(weights)
        return total

    def _correct(
        self, problem: Problem, lo: int, hi: int, y: Array, past: Array | None, tolerance: float
    ) -> tuple[Array, int]:
        """Corrected states ``(hi - lo + 1, *state)`` and how many steps, from ``lo`` on, have converged."""
        xp, n = problem.xp, hi - lo
        eps = float(xp.finfo(y.dtype).eps)
        jacobian = FieldJacobian(problem, lo, hi, self.dense)
        propagator, before, theta = None, np.inf, 0.1
        moved = np.full(n, np.inf)
        for _ in range(_CORRECTIONS):
            ends, _past = problem.method.advance(problem.field, problem.grid, lo, hi, y[:-1, ...], past)
            r = problem.flat(ends - y[1:, ...])
            scale = self._scale(problem, y)
            defect = float(xp.max(xp.abs(r) / scale))
            if defect <= 4 * eps:
                return y, n
            if propagator is None or before > _STALE:
                propagator = jacobian.propagator(y)
            d = propagator.propagate(r)
            self.effort.corrections += 1
            moved = to_host(xp.max(xp.reshape(xp.abs(d) / scale, (n, -1)), axis=1)).astype(np.float64)
            size = float(np.max(moved))
            if not np.isfinite(size):
                break
            y = xp.concat([y[:1, ...], y[1:, ...] + problem.unflat(d)], axis=0)
            if np.isfinite(before):
                theta = size / before if before > 0 else 0.0
            if theta < 0.9 and size * theta / (1 - theta) <= tolerance:
                return y, n
            if theta > 0.5 and defect <= 1e3 * eps:  # what moves is rounding
                return y, n
            if theta > 0.1:
                if theta > 0.5 and np.isfinite(before) and not jacobian.refine():
                    break
                propagator = None
            before = size
        good = moved <= tolerance
        return y, 0 if not good[0] else n if good.all() else int(np.argmin(good))

    def _scale(self, problem: Problem, y: Array) -> Array:
        """(samples, size): the largest value of each component, and at least a thousandth of the largest of all."""
        xp = problem.xp
        component = xp.max(xp.abs(problem.flat(y)), axis=0)
        whole = xp.max(component, axis=-1, keepdims=True)
        return xp.maximum(xp.maximum(component, whole * 1e-3), xp.full_like(component, 1e-300))


def level_nodes(lo: int, hi: int, coarse_steps: int) -> list[NDArray[np.int64]]:
    """Nodes of each level from the coarsest, of about ``coarse_steps``, to all of ``lo .. hi``."""
    n = hi - lo
    first = max(min(coarse_steps, n // 8), 1)
    levels = max(1, int(np.ceil(np.log(n / first) / np.log(_RATIO))))
    counts = [round(first * (n / first) ** (k / levels)) for k in range(levels)]
    return [lo + np.unique(np.round(np.linspace(0, n, count + 1)).astype(np.int64)) for count in (*counts, n)]


Linearization = Literal["auto", "identity", "secant", "diagonal", "full", "coarse"]
