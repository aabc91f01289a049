"""The seconds that a run may take, and how far its estimate is off when they are over."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import replace
from itertools import pairwise
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array, to_host, working_dtype
from parasolver_core.solution import Solution, Status
from parasolver_core.solver.state import SolverState

_ROUNDS_LEFT = 3  # from so many on, any round may turn out to be the last


class Deadline:
    """Halts a run before the round that would end too late if it took as long as the one before.

    The first round is always made. How far the estimate is off is guessed: twice the larger of what the last two rounds
    have changed of it, times the rounds that are left at the pace of those so far; as many again where no step is final
    yet. After the first round it says no more than that nothing is known. ``python -m benchmarks.deadlines`` holds it
    against the true error.

    Args:
        seconds: from now on; None: no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.perf_counter() + float(seconds)
        self._estimates: deque[Array] = deque(maxlen=2)  # before the last two rounds
        self._total = 0  # steps

    def halts(self, state: SolverState) -> bool:
        """Before each round: whether the run is over, and if so halt it."""
        if self._end == math.inf:
            return False
        if history := state.stats.history:
            needed, left = history[-1].seconds, self._end - time.perf_counter()
            late, early = state.evaluator.agree([needed - left, left - _ROUNDS_LEFT * needed])  # in all processes alike
            if late > 0:
                state.halt(Status.MAX_SECONDS)
                return True
            if early > 0:
                self._estimates.clear()
                return False
        if state.foresees:
            self._estimates.append(state.estimate())
            self._total = state.length
        return False

    def told(self, solution: Solution) -> Solution:
        """The solution, with the error of its estimate if the run was halted."""
        if Status.MAX_SECONDS not in solution.statuses:
            return solution
        halted = [status is Status.MAX_SECONDS for status in solution.statuses]
        error = np.where(halted, self._error(solution), solution.error_estimate)
        return replace(solution, error_estimate=error)

    def _error(self, solution: Solution) -> Any:
        if not self._estimates:
            return np.inf
        rounds, steps = solution.stats.rounds, np.array(solution.steps)
        left = np.where(steps > 0, rounds * (self._total - steps) / np.maximum(steps, 1), rounds)
        changes = [_apart(after, before) for before, after in pairwise([*self._estimates, solution.sample])]
        return 2 * np.maximum(left, 1) * np.max(changes, axis=0)


def _apart(state: Array, other: Array) -> NDArray[np.float64]:
    """RMS of the difference over RMS, of each sample."""
    xp: Any = array_api_compat.array_namespace(state)
    wide = working_dtype(xp, state.dtype)
    rows = [to_host(xp.astype(each, wide)).reshape(each.shape[0], -1).astype(np.float64) for each in (state, other)]
    with np.errstate(all="ignore"):
        ratio = np.linalg.norm(rows[0] - rows[1], axis=1) / np.linalg.norm(rows[0], axis=1)
    return np.where(np.isfinite(ratio), ratio, np.inf)


def check_seconds(seconds: Any) -> None:
    """A number of seconds, or None."""
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float, np.floating, np.integer)):
        raise TypeError(f"max_seconds: expected a number above 0, got {seconds!r}")
    if not seconds > 0:
        raise ValueError(f"max_seconds: expected a number above 0, got {seconds}")
