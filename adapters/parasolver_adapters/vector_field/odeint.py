"""The front doors: :func:`odeint`, and :func:`integrate` and :func:`solve_ivp`, which tell more about the run."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_adapters.vector_field.effort import Effort
from parasolver_adapters.vector_field.few_steps import (
    FEWEST_WORTH_A_WORD,
    NODES,
    SILENT,
    FewSteps,
    check_few_steps,
    few_in_rounds,
)
from parasolver_adapters.vector_field.field import Batching, Field, Signature
from parasolver_adapters.vector_field.grid import Grid, check_times, substeps_of
from parasolver_adapters.vector_field.jacobian import LARGEST_DENSE
from parasolver_adapters.vector_field.methods import StepMethod, get_method
from parasolver_adapters.vector_field.newton import FEWEST_STEPS, Linearization, ParallelIntegrator
from parasolver_adapters.vector_field.problem import Problem, integrate_sequentially
from parasolver_adapters.vector_field.result import IVPResult, ODESolution, announcement, every, finished, partial
from parasolver_adapters.vector_field.verification import doubt
from parasolver_core.arrays import Array, detach, is_array, no_grad, to_host
from parasolver_core.errors import NonFiniteError, attach
from parasolver_core.validation import check_count, check_plain, check_tolerance, own_numbers

_EXPECTED_ROUNDS = 5


_ELSEWHERE = {
    "event_fn": "look for the event in the states, or take torchdiffeq.odeint_event",
    "events": "look for them in the states, or take scipy.integrate.solve_ivp",
    "dense_output": "name the wanted times in t, or take scipy.integrate.solve_ivp",
    "args": "give lambda t, y: f(t, y, *args) as f",
    "max_step": "steps are those of the grid",
    "rtol": "step sizes are not adapted; tolerance is the distance to the sequential solution",
    "atol": "step sizes are not adapted; tolerance is the distance to the sequential solution",
}  # arguments of other libraries, and what to do


class SequentialFallbackWarning(UserWarning):
    """Steps were made one after another, since integrating them in parallel does not pay."""


def odeint(
    f: Callable[..., Any],
    y0: Array,
    t: ArrayLike,
    *,
    rtol: Any = None,
    atol: Any = None,
    options: Mapping[str, Any] | None = None,
    **choices: Any,
) -> Array:
    """The solution of ``y' = f(t, y)`` at all times, ``(N + 1, *state)``: the states of :func:`integrate`.

    Args:
        f, y0, t, choices: as in :func:`integrate`.

    Other arguments:
        rtol, atol: for callers of torchdiffeq, whose methods of fixed steps have no use for them either.
        options: likewise; ``{"step_size": h}`` makes steps of h between two times of t.

    Example::

        t = torch.linspace(0, 10, 1001, dtype=torch.float64)
        y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
        y = odeint(lambda t, y: torch.stack([y[1], -torch.sin(y[0])]), y0, t)
    """
    _refuse(choices)
    if options:
        choices["substeps"] = substeps_of(t, options)
    return integrate(f, y0, t, **choices).states


def _refuse(choices: Mapping[str, Any]) -> None:
    for name in _ELSEWHERE.keys() & choices.keys():
        raise TypeError(f"{name}: not an argument here; {_ELSEWHERE[name]}")


def integrate(
    f: Callable[..., Any],
    y0: Array,
    t: ArrayLike,
    *,
    method: str | StepMethod = "rk4",
    signature: Signature = "ty",
    substeps: int = 1,
    linear: ArrayLike | None = None,
    linearization: Linearization = "auto",
    tolerance: float | None = None,
    window: int | None = None,
    coarse_steps: int = 40,
    batching: Batching = "auto",
    batch_dims: int | None = None,
    jacobian: Callable[[Array, Array], Array] | None = None,
    few_steps: FewSteps | None = None,
    throw: bool = True,
) -> ODESolution:
    """Integrate ``y' = f(t, y)`` over a grid in parallel: what the method gives one step after another, in fewer calls.

    Args:
        f: ``f(t, y) -> dy/dt``, of the shape and dtype of y. It is called with one time (t without axes, y like ``y0``)
            and with many at once, in the first way of ``batching`` that gives the same as single calls.
        y0: the state at ``t[0]``, any shape, float32 or float64, of any array library.
        t: (N + 1,), strictly increasing or decreasing times, equally spaced or not; the grid of the method's steps.

    Other arguments:
        method: "euler", "midpoint", "heun", "heun3", "rk4" (the 3/8 rule, as in torchdiffeq), "rk4_classic", "ab2",
            "ab3", "ab4"; "etd1" and "etdrk2" for semilinear fields, with ``linear``; or a
            :class:`~parasolver_adapters.vector_field.methods.StepMethod`.
        signature: "ty" for ``f(t, y)``, "yt" for ``f(y, t)``.
        substeps: steps of equal length between two times of t.
        linear: L of ``y' = L y + f(t, y)`` acting on the last axis: a number, (d,) for a diagonal, or (d, d).
        linearization: what stands for the Jacobian of a step while errors are carried along the trajectory: "full"
            (matrices), "diagonal", "secant" or "identity" (scalars), "sequential" for the plain loop. "auto": "full"
            for up to 32 elements, "diagonal" for fields that act elementwise, "secant" otherwise, and the plain loop
            where a batch over time costs as much as a loop.
        tolerance: wanted distance to the sequential solution, relative to the largest value of each component so far;
            by default 64 roundings, 1.4e-14 in float64 and 7.6e-6 in float32.
        window: the most steps solved at once, at least 64; by default all. With ``few_steps="parallel"`` the calls of
            the field in one round, 16 by default.
        coarse_steps: steps of the coarse sequential solution that starts a window.
        batching: see :class:`~parasolver_adapters.vector_field.field.Field`.
        batch_dims: leading axes of the state that count independent samples; found out by default.
        jacobian: ``jacobian(t, y)`` of f, for many times in the shapes of ``batching="column"``:
            ``(rows, *batch, d, d)``, or ``(rows, *batch, d)`` with ``linearization="diagonal"``. By default differences
            (float64) or autograd (torch, float32).
        few_steps: how to make fewer than 64 steps. "parallel": in rounds of the core's solver, where each stage of a
            step is a node; for Runge-Kutta methods, and fields of which a call takes long, such as networks.
            "sequential": one after another. None: so too, with a :class:`SequentialFallbackWarning` from 8 steps on.
        throw: raise where a state is not finite; else return what was found, with its status.

    Gradients: a torch trajectory can be differentiated with respect to ``y0`` and everything that f uses; see
    :mod:`parasolver_adapters.vector_field.adjoint`.

    Raises:
        ValueError, TypeError: an argument is not as described here.
        NonFiniteError: the field gave NaN or infinity, or the state overflowed; ``error.solution`` has the states.
        Whatever the field raises, or an interrupt: with the states up to the last one known as ``error.solution``.

    Warns:
        SequentialFallbackWarning: steps were made one after another although parallel integration was tried.

    Reference: Lim et al., "Parallelizing non-linear sequential models over the sequence length", ICLR 2024 (Newton's
    method with a parallel scan).
    """
    _check_state(y0)
    choices = _Choices(linearization, tolerance, window, coarse_steps, batch_dims, few_steps)
    choices.check(y0)
    check_count("substeps", substeps)
    substeps = int(substeps)
    problem, effort = _problem(f, y0, t, method, signature, substeps, linear, batching, jacobian), Effort()
    check_few_steps(few_steps, problem.method)
    effort.reached = [detach(y0)[None, ...]]
    integrator: ParallelIntegrator | None = None
    try:
        with np.errstate(all="ignore"):  # NumPy's warnings; what is not finite is reported below
            with no_grad(problem.xp):
                problem, integrator = choices.prepare(problem, y0)
            states = _states(problem, integrator, y0, effort, choices.rounds(problem))
        solution = finished(problem, states, effort, integrator)
    except BaseException as error:
        kind = type(error)
        attach(error, lambda: cast(Any, every(substeps, partial(problem, effort, integrator, kind))))
        raise
    if effort.note:
        _warn(announcement(effort, problem))
    solution = every(substeps, solution)
    if throw and not solution.success:
        raise NonFiniteError(solution.message, cast(Any, solution))
    return solution


def solve_ivp(
    f: Callable[..., Any],
    t_span: tuple[float, float],
    y0: ArrayLike,
    method: str | StepMethod = "rk4",
    t_eval: ArrayLike | None = None,
    *,
    steps: int | None = None,
    **options: Any,
) -> IVPResult:
    """:func:`integrate` in the shape of :func:`scipy.integrate.solve_ivp`, on a fixed grid.

    Args:
        f, method, options: as in :func:`integrate`.
        t_span: first and last time.
        y0: the first state; a sequence becomes a float64 NumPy array.
        t_eval: the grid; must begin and end as ``t_span`` does.
        steps: instead, so many equal steps.
    """
    _refuse(options)
    if (steps is None) == (t_eval is None):
        raise ValueError("steps: give either steps, for equal ones, or t_eval, the grid; step sizes are not adapted")
    if steps is not None:
        check_count("steps", steps)
    try:
        first, last = map(float, t_span)
        start = y0 if is_array(y0) else np.asarray(y0, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"t_span, y0: expected two times, and a state of real numbers; {error}") from error
    grid = check_times(np.linspace(first, last, cast(int, steps) + 1) if t_eval is None else t_eval)
    if (grid[0], grid[-1]) != (first, last):
        raise ValueError(f"t_eval: expected to begin and end as t_span={t_span}, got {grid[0]} to {grid[-1]}")
    solution = integrate(f, start, grid, method=method, throw=False, **options)
    xp: Any = array_api_compat.array_namespace(start)
    return IVPResult(
        t=solution.t,
        y=xp.moveaxis(solution.states, 0, -1),
        nfev=solution.evaluations,
        status=0 if solution.success else -1,
        message=solution.message,
        success=solution.success,
        solution=solution,
    )


@dataclass(frozen=True)
class _Choices:
    """How to integrate, as far as the user said."""

    linearization: Linearization
    tolerance: float | None
    window: int | None
    coarse_steps: int
    batch_dims: int | None
    few_steps: FewSteps | None

    def rounds(self, problem: Problem) -> int | None:
        """How many nodes a round has if few steps are made in rounds; None if they are not."""
        few = len(problem.grid) < FEWEST_STEPS and self.few_steps == "parallel"
        return (self.window or NODES) if few else None

    def check(self, y0: Array) -> None:
        if self.linearization not in get_args(Linearization):
            names = ", ".join(get_args(Linearization))
            raise ValueError(f"linearization: expected one of {names}, got {self.linearization!r}")
        if self.tolerance is not None:
            check_tolerance(self.tolerance)
        check_count("window", self.window, optional=True)
        check_count("coarse_steps", self.coarse_steps)
        check_count("batch_dims", self.batch_dims, minimum=0, optional=True)
        own_numbers(self, "tolerance", "window", "coarse_steps", "batch_dims")
        if self.batch_dims is not None and self.batch_dims > y0.ndim:
            raise ValueError(f"batch_dims: got {self.batch_dims} for a state with {y0.ndim} axes")

    def prepare(self, problem: Problem, y0: Array) -> tuple[Problem, ParallelIntegrator | None]:
        """What to do with this field; None: the plain loop."""
        asked, steps = self.linearization, len(problem.grid)
        if asked == "sequential" or not problem.field.parallel:
            return problem, None
        rounds = self.rounds(problem)
        if rounds is None and (steps < FEWEST_STEPS or (self.window or steps) < FEWEST_STEPS):
            if self.few_steps is None and FEWEST_WORTH_A_WORD <= steps < FEWEST_STEPS:
                _warn(f"{steps} steps were made one after another: {SILENT}")
            return problem, None
        reason = problem.field.probe(problem.grid, y0, few=rounds is not None)
        if not problem.field.parallel:
            _warn(
                f"f: it cannot be evaluated at many times at once ({reason}), so steps are made one after another. "
                "Write it with array operations, without branches on t or y; linearization='sequential' silences this"
            )
            return problem, None
        eps = float(problem.xp.finfo(y0.dtype).eps)
        tolerance = 64 * eps if self.tolerance is None else self.tolerance
        if rounds is not None:
            return problem, ParallelIntegrator("secant", tolerance, self.window, self.coarse_steps)
        dims = self.batch_dims if self.batch_dims is not None else problem.field.independent_axes(problem.grid, y0)
        problem = replace(problem, batch_dims=min(dims, y0.ndim - problem.method.coupled_axes))
        if asked == "auto":
            cost = _EXPECTED_ROUNDS * problem.method.stages * problem.field.cost(1, steps)
            if cost > problem.sequential_cost(steps):
                return problem, None
            asked = "diagonal" if problem.size == 1 else "full" if problem.size <= LARGEST_DENSE else "secant"
        return problem, ParallelIntegrator(asked, tolerance, self.window, self.coarse_steps)


def _states(
    problem: Problem, integrator: ParallelIntegrator | None, y0: Array, effort: Effort, rounds: int | None
) -> Array:
    """The trajectory, with its gradients."""
    xp, n = problem.xp, len(problem.grid)
    states: Any = None
    why = ""
    if integrator is not None and rounds is not None:
        with no_grad(xp):
            states = few_in_rounds(problem, rounds, integrator.tolerance, effort)
        why = effort.note
    elif integrator is not None:
        with no_grad(xp):
            states = integrator.integrate(problem, effort)
            why = doubt(problem, states, effort, integrator.tolerance) if effort.windows else ""
        effort.note = why or effort.note
    if integrator is not None and not why and _records_gradients(y0):
        from parasolver_adapters.vector_field.adjoint import attach

        states = attach(problem, integrator, y0, states)
        why = "" if states is not None else "all steps in one batch do not end where they do one after another"
        effort.note = why or effort.note
    if integrator is None or why:
        effort.sequential_steps = n
        effort.reached = [y0[None, ...]]
        integrate_sequentially(problem, 0, n, effort.reached)
        return xp.concat(effort.reached, axis=0)
    return states


def _check_state(y0: Any) -> None:
    if not is_array(y0):
        raise TypeError(
            f"y0: expected an array (NumPy, torch, ...), got {type(y0).__name__}; join several states into one array"
        )
    xp: Any = array_api_compat.array_namespace(y0)
    check_plain("y0", y0)
    if not xp.isdtype(y0.dtype, "real floating") or xp.finfo(y0.dtype).bits not in (32, 64):
        raise TypeError(f"y0: expected float32 or float64, got dtype {y0.dtype}; convert it first")
    if 0 in y0.shape:
        raise ValueError(f"y0: expected no empty axis, got shape {tuple(y0.shape)}")
    if not bool(xp.all(xp.isfinite(y0))):
        raise ValueError("y0: holds NaN or infinity")


def _problem(
    f: Callable[..., Any],
    y0: Array,
    t: ArrayLike,
    method: str | StepMethod,
    signature: Signature,
    substeps: int,
    linear: ArrayLike | None,
    batching: Batching,
    jacobian: Callable[[Array, Array], Array] | None,
) -> Problem:
    if jacobian is not None and not callable(jacobian):
        raise TypeError(f"jacobian: expected a function jacobian(t, y), got {type(jacobian).__name__}")
    times = check_times(t)
    if substeps > 1:
        parts = times[:-1, None] + np.diff(times)[:, None] * np.arange(substeps) / substeps
        times = check_times(np.append(parts.ravel(), times[-1]))
    grid = Grid(times, detach(y0), y0.ndim)
    L = None if linear is None else _linear_part(linear, tuple(y0.shape))
    return Problem(Field(f, y0, signature, batching), grid, get_method(method, L).bind(grid), 0, jacobian)


def _linear_part(linear: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    if getattr(linear, "requires_grad", False):
        raise ValueError(
            "linear: gradients with respect to it are not computed; pass linear.detach(), and what is learned within f"
        )
    try:
        L = np.asarray(to_host(linear) if is_array(linear) else linear, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"linear: expected real numbers, got {error}") from error
    if L.shape not in ((), shape[-1:], shape[-1:] * 2):
        wanted = f"a number, shape ({shape[-1]},) or ({shape[-1]}, {shape[-1]})" if shape else "a number"
        raise ValueError(f"linear: expected {wanted}, got shape {L.shape}")
    if not np.all(np.isfinite(L)):
        raise ValueError("linear: holds NaN or infinity")
    return L


def _records_gradients(y0: Array) -> bool:
    if not array_api_compat.is_torch_array(y0):
        return False
    import torch

    return torch.is_grad_enabled()


def _warn(message: str) -> None:
    """At the line that called this module, by whichever of its front doors."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals is globals():
        frame, level = frame.f_back, level + 1
    warnings.warn(message, SequentialFallbackWarning, stacklevel=level)
