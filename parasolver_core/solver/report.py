"""What is told of a run: its solution with a message, whatever ended it, and the error if it is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_core.arrays import Array, copied, detach, no_grad, own_arithmetic, to_host
from parasolver_core.errors import ConvergenceError, NonFiniteError, SolverError
from parasolver_core.solution import Solution, Stats, Status
from parasolver_core.solver.state import Save, SolverState
from parasolver_core.validation import check_timesteps

_NONFINITE = (Status.NONFINITE_MODEL, Status.NONFINITE_SOLVER)


def solution_of(state: SolverState) -> Solution:
    """The solution so far, with the best estimate of the samples."""
    return _solution(state, state.estimate)


def status_after(error: BaseException) -> Status:
    return Status.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Status.FAILED


def left_by(error: BaseException, state: SolverState | None, x_T: Array, timesteps: ArrayLike, save: Save) -> Solution:
    """The solution of a run that an exception has ended, maybe before it had begun.

    It has the best estimate, or the last final states where making that fails too.
    """
    status = status_after(error)
    if state is None:
        return _untouched(x_T, timesteps, save, status)
    state.halt(status)
    try:
        return solution_of(state)
    except Exception:
        return _solution(state, lambda: state.states)


def _solution(state: SolverState, estimate: Callable[[], Array]) -> Solution:
    end = state.halted or Status.RUNNING
    with no_grad(state.xp), own_arithmetic():
        sample = estimate()
        fits = within_range(state.xp, sample)  # a float32 state need not fit a half-precision sample
        now = {Status.RUNNING: end}, {Status.RUNNING: end, Status.CONVERGED: Status.NONFINITE_SOLVER}
        statuses = tuple(
            now[not ok].get(status, status) for status, ok in zip(state.statuses, fits.tolist(), strict=True)
        )
        status = next((status for status in statuses if status is not Status.CONVERGED), Status.CONVERGED)
        return Solution(
            sample=sample,
            status=status,
            message=message_of(status, state),
            statuses=statuses,
            steps=state.steps,
            error_estimate=np.where([one is Status.CONVERGED for one in statuses], state.errors(), np.inf),
            stats=state.stats,
            trajectory=state.trajectory(),
            states=state.states,
        )


def _untouched(x_T: Array, timesteps: ArrayLike, save: Save, status: Status) -> Solution:
    """Of a run that had not begun: ``x_T``."""
    xp = array_api_compat.array_namespace(x_T)
    x, batch, trajectory = copied(xp, detach(x_T)), int(x_T.shape[0]), None
    if save == "trajectory":
        trajectory = xp.stack([x, *[xp.full_like(x, float("nan"))] * len(check_timesteps(timesteps))])
    ended = "Interrupted" if status is Status.INTERRUPTED else "An error ended the run"
    return Solution(
        sample=x,
        status=status,
        message=f"{ended} before the first round; no step is final.",
        statuses=(status,) * batch,
        steps=(0,) * batch,
        error_estimate=np.full(batch, np.inf),
        stats=Stats(),
        trajectory=trajectory,
        states=x,
    )


def within_range(xp: Any, rows: Array) -> NDArray[np.bool_]:
    inside = xp.abs(rows) < float(xp.finfo(rows.dtype).max)
    return to_host(xp.all(xp.reshape(inside, (rows.shape[0], -1)), axis=1))


def message_of(status: Status, state: SolverState) -> str:
    steps, rounds, total = min(state.steps), state.stats.rounds, state.length
    if status in _NONFINITE:
        if not state.failures:
            return f"The sample overflows in {state.x_T.dtype}. Start from an x_T of a wider dtype."
        sample = min(state.failures)
        node, rounds = state.failures[sample]
        where = f"sample {sample} at step {node} (timestep {state.timesteps[node]}) in round {rounds}"
        if status is Status.NONFINITE_MODEL:
            return (
                f"The denoiser gave NaN or infinity for {where}; nothing of it was accepted and the other samples "
                "went on. Check the network there, for example in float32 instead of half precision."
            )
        return f"The solver's own arithmetic overflowed for {where}. Use a wider dtype or a smaller window."
    memory = state.evaluator.max_rows
    ran_out = (
        "" if memory is None else f" Memory ran out; the network was called with at most {memory} rows from then on."
    )
    fewer = f" instead of {total}" if rounds < total else ""
    each = " a sample" if state.batch > 1 else ""
    return {
        Status.CONVERGED: (
            f"Converged in {rounds} rounds{fewer}, with {state.stats.evaluations / state.batch:g} evaluations{each}."
            f"{ran_out}"
        ),
        Status.MAX_ROUNDS: (
            f"Not converged within max_rounds={rounds}: {steps} of {total} steps are final. Raise max_rounds "
            f"({total} always suffice), the window or the tolerance."
        ),
        Status.MAX_SECONDS: (
            f"Time was up (max_seconds) after round {rounds}: {steps} of {total} steps are final, and the sample is an "
            "estimate; error_estimate says how far it may be off."
        ),
        Status.STOPPED: f"Stopped by the callback after round {rounds}; {steps} of {total} steps are final.",
        Status.INTERRUPTED: f"Interrupted after round {rounds}; {steps} of {total} steps are final.",
        Status.FAILED: f"An error ended the run in round {rounds + 1}; {steps} of {total} steps are final.",
        Status.RUNNING: f"Still running: {steps} of {total} steps are final after round {rounds}.",
    }[status]


def raise_for(solution: Solution) -> None:
    errors: dict[Status, type[SolverError]] = {
        Status.MAX_ROUNDS: ConvergenceError,
        Status.NONFINITE_MODEL: NonFiniteError,
        Status.NONFINITE_SOLVER: NonFiniteError,
    }
    if solution.status in errors:
        raise errors[solution.status](solution.message, solution)
