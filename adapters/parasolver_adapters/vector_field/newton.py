"""Newton's method for all steps of a window at once, from a coarse solution up.

The unknown is the whole trajectory ``y_1 .. y_N``. A round advances every node by one step of the method, in one batch
a stage, compares the ends with the nodes behind (``r_n = Phi_n(y_n) - y_{n+1}``) and carries the defects along the
trajectory with a :class:`~parasolver_adapters.vector_field.surrogate.Surrogate`. It rests only where all defects
vanish: at the sequential solution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from parasolver_adapters.vector_field.effort import Effort, Recorder
from parasolver_adapters.vector_field.jacobian import LARGEST_DENSE, FieldJacobian
from parasolver_adapters.vector_field.problem import Problem, integrate_sequentially
from parasolver_adapters.vector_field.rounding import is_rounding, local_scale, reach, scatter
from parasolver_adapters.vector_field.surrogate import IdentitySurrogate, SecantSurrogate, Surrogate
from parasolver_core.arrays import Array, to_host

Linearization = Literal["auto", "identity", "secant", "diagonal", "full", "sequential"]

FEWEST_STEPS = 64  # of a window; fewer are sooner made one after another
_RATIO = 25  # the most steps of one level for one of the level before
_COARSE_TOLERANCE = 1e-7  # a coarse level is no nearer to the finest than this anyway
_MOST_ROUNDS = 40  # of one level; what needs more does not pay
_SMALL = 16  # roundings: defects that need no further correction
_DOUBT = 1 / 32  # of a defect may be left after a correction, whatever the corrections before say
_DIVERGED = 1e3  # times the smallest correction
_WASTE = 0.08  # of the sequential cost may go into windows that fail


@dataclass(frozen=True)
class ParallelIntegrator:
    """All states of a problem, window by window.

    Windows shrink where Newton's method does not converge and grow again where it does. What is left is made step by
    step when windows become too short to pay, or when too much was spent on windows that failed.

    Args:
        linearization: one of "identity", "secant", "diagonal", "full".
        tolerance: wanted distance to the sequential solution, relative to the largest value of each component.
        window: the most steps at once; None: all.
        coarse_steps: steps of the coarsest level of a window.
    """

    linearization: Linearization
    tolerance: float
    window: int | None
    coarse_steps: int

    def integrate(self, problem: Problem, effort: Effort) -> Array:
        """``(N + 1, *state)`` from the first state in ``effort.reached``; counts there what it did."""
        n, states, lo = len(problem.grid), effort.reached, 0
        width = cap = min(self.window or n, n)
        allowance = _WASTE * problem.sequential_cost(n)
        while lo < n:
            hi = min(lo + width, n)
            if hi - lo < FEWEST_STEPS:
                if width < n - lo and width < min(self.window or n, n):
                    effort.note = f"Newton's method converged in windows of fewer than {FEWEST_STEPS} steps only"
                break
            before = problem.field.spent
            found, converged = self._window(problem, lo, hi, states, effort)
            if found.shape[0]:
                states.append(found)
                lo += found.shape[0]
                effort.windows += 1
            if converged:
                width = cap
                continue
            allowance -= problem.field.spent - before
            cap, width = width // 2, width // 4
            if allowance < 0:
                effort.note = "Newton's method left its basin, and trying shorter windows would not pay"
                break
        if lo < n:
            if problem.size > LARGEST_DENSE:  # how an error grows in the steps to come is not known: let there be none
                del states[1:]
                lo = 0
            effort.sequential_steps += n - lo
            integrate_sequentially(problem, lo, n, states, problem.past(lo, states))
        return problem.xp.concat(states, axis=0)

    def surrogate(self, problem: Problem, lo: int, hi: int) -> Surrogate:
        """A new one for the steps ``lo .. hi - 1``."""
        if self.linearization == "identity":
            return IdentitySurrogate(problem.xp)
        if self.linearization == "secant":
            return SecantSurrogate(problem.xp)
        return FieldJacobian(problem, lo, hi, dense=self.linearization == "full")

    def scale(self, problem: Problem, states: Array) -> Array:
        """What corrections are held against, (n, samples, size).

        Where one number stands for the Jacobian of a whole sample, elements are not told apart.
        """
        scale = local_scale(problem.xp, problem.flat(states), reach(len(problem.grid)))
        if self.linearization in ("full", "diagonal"):
            return scale
        return problem.xp.zeros_like(scale) + problem.xp.max(scale, axis=-1, keepdims=True)

    def _window(self, problem: Problem, lo: int, hi: int, states: list[Array], effort: Effort) -> tuple[Array, bool]:
        """The converged states behind ``lo``, and whether these are all of the window."""
        xp, y = problem.xp, states[-1][-1:, ...]
        nodes, *finer = level_nodes(lo, hi, self.coarse_steps)
        level = problem.coarse(nodes)
        if problem.size > LARGEST_DENSE:
            found = effort.twin.integrate(level, nodes, y)
        else:
            found = xp.concat(integrate_sequentially(level, 0, len(level.grid), [y]), axis=0)
        if not bool(xp.all(xp.isfinite(found))):
            return y[:0, ...], False
        for after in finer[:-1]:
            found = hermite(level, nodes, found, after, problem.grid)
            nodes, level = after, problem.coarse(after)
            found, good = self._correct(level, 0, len(level.grid), found, None, effort, _COARSE_TOLERANCE)
            if good < len(level.grid):
                return y[:0, ...], False
        found = hermite(level, nodes, found, finer[-1], problem.grid)
        found, good = self._correct(problem, lo, hi, found, problem.past(lo, states), effort, 0.0)
        return found[1 : good + 1, ...], good == hi - lo

    def _correct(
        self, problem: Problem, lo: int, hi: int, y: Array, past: Array | None, effort: Effort, tolerance: float
    ) -> tuple[Array, int]:
        """Corrected states ``(hi - lo + 1, *state)`` and how many steps, from ``lo`` on, have converged.

        A coarse level, with a tolerance of its own, is done when its corrections promise to be; the finest is judged by
        the correction that its own defects ask for.
        """
        xp, n, final = problem.xp, hi - lo, tolerance == 0.0
        tolerance = max(tolerance, self.tolerance)
        surrogate, eps = self.surrogate(problem, lo, hi), float(xp.finfo(y.dtype).eps)
        defects = made = problem.flat(y[1:, ...])
        left, limit = 0.0, problem.field.spent + problem.sequential_cost(n) / 2
        before = before_travelled = best = np.inf
        sizes: list[float] = []
        newton = self.linearization == "full" or (self.linearization == "diagonal" and problem.size == 1)
        moved, field, old = np.full(n, np.inf), Recorder(problem.field), self.scale(problem, y)[1:, ...]
        for _ in range(_MOST_ROUNDS):
            field.calls.clear()
            ends, _past = problem.method.advance(field, problem.grid, lo, hi, y[:-1, ...], past)
            defects, left = problem.flat(ends - y[1:, ...]), 0.0
            made = xp.zeros_like(defects)
            d = surrogate.propagate(defects, y)
            effort.rounds += 1
            corrected = xp.concat([y[:1, ...], y[1:, ...] + problem.unflat(d)], axis=0)
            scale = self.scale(problem, corrected)[1:, ...]
            moved = to_host(xp.max(xp.abs(d) / scale, axis=(1, 2))).astype(np.float64)
            size = float(np.max(moved))
            if not np.isfinite(size):
                return y, 0
            near = basin(xp, y.dtype)
            sizes.append(size)
            done = settled(size, before if newton else slowest(sizes), tolerance, near if final else np.inf)
            if not done and final:
                if size > 0.5 * before and self._rests(problem, lo, hi, y, ends, past, scale):
                    moved[:] = 0  # these are as good as what a further correction makes of them, and known
                    break
                done = (newton or size <= near) and scatter(xp, defects, _SMALL * eps * scale)
            y, made, left = corrected, d, 1.0
            if done:
                moved[:], left = 0, min(max(size / before, _DOUBT), 1.0)
                break
            # Beside what it was: where digits cancel, most of a trajectory goes in each round, and that is progress.
            travelled = float(xp.max(xp.abs(d) / old))
            surrogate.update(travelled, travelled / before_travelled)
            before, before_travelled, best, old = size, travelled, min(travelled, best), scale
            if travelled > _DIVERGED * best or problem.field.spent > limit:
                break
        good = moved <= 0.1 * tolerance
        accepted = n if good.all() else int(np.argmin(good))
        if final and accepted:
            effort.samples.keep(field.calls, problem.grid.h[lo : lo + accepted])
            effort.twin.accept(lo + accepted, tolerance)
            effort.note_left(xp, defects[:accepted, ...], made[:accepted, ...], left)
        return y, accepted

    def _rests(
        self, problem: Problem, lo: int, hi: int, y: Array, ends: Array, past: Array | None, scale: Array
    ) -> bool:
        """Whether what the steps from y miss its nodes by is rounding."""
        flat = problem.flat

        def shaken(factors: Array) -> Array:
            moved = y[:-1, ...] * (1 + problem.unflat(factors))
            return flat(problem.method.advance(problem.field, problem.grid, lo, hi, moved, past)[0] - ends)

        return is_rounding(problem.xp, flat(ends - y[1:, ...]), scale, shaken)


def slowest(sizes: list[float]) -> float:
    """The last correction but one, if all fell as slowly as they did on an average since some of those before.

    Two that fall may mean little where one number stands for a Jacobian: what is wrong then falls slowly, and turns.

    Args:
        sizes: of all corrections so far.
    """
    *before, size = sizes
    ratios = [(size / other) ** (1 / k) for k, other in enumerate(reversed(before), 1) if other > 0]
    return size / max(ratios) if size > 0 and ratios else np.inf


def settled(size: float, before: float, tolerance: float, basin: float) -> bool:
    """Whether a trajectory is within the tolerance of where its corrections lead.

    Args:
        size, before: the last correction and the one before it, infinity for none; what is to come is taken to be a
            geometric series.
        tolerance: wanted distance.
        basin: the largest correction whose ratio to another is trusted; far from the solution it says nothing.
    """
    theta = size / before if 0 < before < np.inf else 0.5
    return theta < 0.9 and size <= max(basin, tolerance) and size * theta / (1 - theta) <= tolerance


def basin(xp: Any, dtype: Any) -> float:
    """The largest correction behind which one may guess what is to come; if the guess is wrong, no harm is done."""
    return float(xp.finfo(dtype).eps) ** 0.7


def level_nodes(lo: int, hi: int, coarse_steps: int) -> list[NDArray[np.int64]]:
    """Nodes of each level from the coarsest, of about ``coarse_steps``, to all of ``lo .. hi``; at least two levels."""
    n = hi - lo
    first = max(min(coarse_steps, n // 8), 1)
    levels = max(1, int(np.ceil(np.log(n / first) / np.log(_RATIO))))
    counts = [round(first * (n / first) ** (k / levels)) for k in range(levels)]
    return [lo + np.unique(np.round(np.linspace(0, n, count + 1)).astype(np.int64)) for count in (*counts, n)]


def hermite(coarse: Problem, nodes: NDArray[np.int64], states: Array, finer: NDArray[np.int64], grid: Any) -> Array:
    """States at the finer nodes of ``grid`` by cubic Hermite interpolation between those of a coarse solution."""
    known, xp = coarse.grid, coarse.xp
    f = coarse.method.derivative(coarse.field(known.asarray(known.t), states), states, known)
    left = np.minimum(np.searchsorted(nodes, finer, side="right") - 1, len(known) - 1)
    h = known.h[left]
    s = (grid.t[finer] - known.t[left]) / h
    here, ahead = (xp.asarray(index, device=device(states)) for index in (left, left + 1))
    table = (
        ((1 + 2 * s) * (1 - s) ** 2, states, here),
        (s**2 * (3 - 2 * s), states, ahead),
        (h * s * (1 - s) ** 2, f, here),
        (h * s**2 * (s - 1), f, ahead),
    )
    return sum(xp.take(values, index, axis=0) * known.column(weights) for weights, values, index in table)
