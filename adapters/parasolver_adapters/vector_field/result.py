"""What a run gives: the trajectory with a record of what it cost, also of runs that did not end well."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from parasolver_adapters.vector_field.effort import Effort
from parasolver_adapters.vector_field.field import Batching
from parasolver_adapters.vector_field.newton import Linearization, ParallelIntegrator
from parasolver_adapters.vector_field.problem import Problem
from parasolver_core.arrays import Array, detach, finite_rows, no_grad, to_host
from parasolver_core.solution import Status


@dataclass(frozen=True)
class ODESolution:
    """A trajectory and what it cost.

    Args:
        t: (N + 1,), the times asked for, float64 on the host.
        states: ``(N + 1, *state)``, the solution at these times, ``y0`` first; like ``y0`` in library, dtype, device.
        status: CONVERGED; NONFINITE_MODEL if the field gave NaN or infinity, NONFINITE_SOLVER if the state overflowed.
        message: one sentence that says what happened and, after a failure, what to do.
        calls: calls of the field, one after another; what a user waits for.
        evaluations: times and states at which the field was evaluated, summed over calls.
        rounds: corrections of a whole window, on all levels; 0 for sequential integration.
        windows: windows integrated in parallel.
        sequential_steps: steps made one after another.
        linearization: what stood for the steps' Jacobians; "sequential" if nothing was tried in parallel.
        batching: how the field was given many times at once; "loop": not at all.
    """

    t: NDArray[np.float64]
    states: Array
    status: Status
    message: str
    calls: int
    evaluations: int
    rounds: int
    windows: int
    sequential_steps: int
    linearization: Linearization
    batching: Batching

    @property
    def success(self) -> bool:
        """Whether the whole trajectory was found."""
        return self.status is Status.CONVERGED


@dataclass(frozen=True)
class IVPResult:
    """What :func:`scipy.integrate.solve_ivp` returns, as far as it applies.

    Args:
        t: (n,), times.
        y: ``(*state, n)``, states.
        nfev: evaluations of the field.
        status: 0 if the end was reached, -1 if not.
        message, success: in words, and as a truth value.
        solution: the :class:`ODESolution`.
    """

    t: NDArray[np.float64]
    y: Array
    nfev: int
    status: int
    message: str
    success: bool
    solution: ODESolution


def announcement(effort: Effort, problem: Problem) -> str:
    """That steps were made one after another, and why."""
    return (
        f"{effort.sequential_steps} of {len(problem.grid)} steps were made one after another: {effort.note}. The "
        "result is that of the method; linearization='sequential' saves the attempt"
    )


def finished(problem: Problem, states: Array, effort: Effort, integrator: ParallelIntegrator | None) -> ODESolution:
    """The record of a run that came to the end of the grid, whatever it found."""
    field = problem.field
    status, message = _outcome(problem, states)
    if status is Status.CONVERGED:
        message = f"{len(problem.grid)} steps with {field.calls} calls and {field.evaluations} evaluations of the field"
        message += f" ({announcement(effort, problem)})." if effort.note else "."
    return _record(problem, problem.grid.t, states, (status, message), effort, integrator)


def _record(
    problem: Problem,
    t: NDArray[np.float64],
    states: Array,
    outcome: tuple[Status, str],
    effort: Effort,
    integrator: ParallelIntegrator | None,
) -> ODESolution:
    return ODESolution(
        t=t,
        states=states,
        status=outcome[0],
        message=outcome[1],
        calls=problem.field.calls,
        evaluations=problem.field.evaluations,
        rounds=effort.rounds,
        windows=effort.windows,
        sequential_steps=effort.sequential_steps,
        linearization="sequential" if integrator is None else integrator.linearization,
        batching=problem.field.batching,
    )


def partial(
    problem: Problem, effort: Effort, integrator: ParallelIntegrator | None, kind: type[BaseException]
) -> ODESolution:
    """What was reached when the run ended by an exception; gradients are not kept."""
    states = detach(problem.xp.concat(effort.reached, axis=0))
    steps = states.shape[0] - 1
    interrupted = issubclass(kind, KeyboardInterrupt)
    message = f"{'Interrupted' if interrupted else kind.__name__} after {steps} of {len(problem.grid)} steps."
    status = Status.INTERRUPTED if interrupted else Status.FAILED
    effort = replace(effort, sequential_steps=steps if integrator is None else effort.sequential_steps)
    return _record(problem, problem.grid.t[: steps + 1], states, (status, message), effort, integrator)


def every(substeps: int, solution: ODESolution) -> ODESolution:
    """The solution at the times asked for."""
    return replace(solution, t=solution.t[::substeps], states=solution.states[::substeps, ...])


def _outcome(problem: Problem, states: Array) -> tuple[Status, str]:
    xp, grid = problem.xp, problem.grid
    finite = finite_rows(xp, states)
    if finite.all():
        return Status.CONVERGED, ""
    n = int(np.argmin(finite))
    blamed: list[tuple[Array, Array]] = []

    def watched(t: Array, y: Array) -> Array:
        f = problem.field(t, y)
        if not blamed and finite_rows(xp, y)[0] and not finite_rows(xp, f)[0]:
            blamed.append((t, f))
        return f

    with no_grad(xp), np.errstate(all="ignore"):
        past = problem.past(n - 1, [states])
        problem.method.advance(watched, grid, n - 1, n, states[n - 1 : n, ...], past)
    if blamed:
        t, f = blamed[0]
        return Status.NONFINITE_MODEL, (
            f"f gave NaN or infinity at t = {float(t[0]):.6g} for {_element(f[0, ...])}, although the state there "
            f"is finite. States up to t = {grid.t[n - 1]:.6g} are valid; check the field there."
        )
    return Status.NONFINITE_SOLVER, (
        f"In the step from t = {grid.t[n - 1]:.6g} to {grid.t[n]:.6g} {_element(states[n, ...])} became NaN or "
        "infinite: the solution or the method is unstable there. Take smaller steps, or for a stiff field an implicit "
        "method."
    )


def _element(values: Array) -> str:
    """The first one that is not finite, in words."""
    index = np.argwhere(~np.isfinite(to_host(values)))[0]
    where = f"element {tuple(index.tolist())} of the state" if index.size else "the state"
    return f"sample {index[0]} ({where})" if index.size > 1 else where
