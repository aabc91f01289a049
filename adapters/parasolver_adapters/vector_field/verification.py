r"""What an accepted trajectory is held against before it is handed over, beside its own defects.

Defects say that every step is right by the field as it was called, with many times at once. They do not say that the
field gives the same alone, nor what becomes of what is left in each step:
:math:`\delta_{n+1} = A_n \delta_n + \rho_n`. Where a check fails, the plain loop is made instead, with a warning.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from array_api_compat import device

from parasolver_adapters.vector_field.effort import Effort, Row, Samples
from parasolver_adapters.vector_field.jacobian import LARGEST_DENSE, StepJacobian
from parasolver_adapters.vector_field.problem import Problem
from parasolver_adapters.vector_field.rounding import local_scale, reach, relative
from parasolver_core.arrays import Array, to_host

_SENSITIVE = {64: 2e-9, 32: 2e-5}  # of the local size, by bits of a number: rounding that may show
_HOPELESS = 0.1  # of the local size: nobody wants a trajectory that rounding has changed by more
_ALONE = 1e2  # roundings of the state, in a step, and what the field makes of them: what a row alone may differ by
_ALONE_OUTPUT = 1e3  # roundings of the output
_JITTER = 4.0  # roundings of the state
_LEFT = 4.0  # roundings of the largest element of a sample: what rounds may leave in each step of any element


def rows_differ(problem: Problem, samples: Samples) -> str:
    """How a row of a batch differs from the field called alone; empty if it does not."""
    return companions_matter(problem, [[row] for row in samples.chosen()])


def companions_matter(problem: Problem, groups: list[list[Row]]) -> str:
    """How a row differs from what the field gives for it among its group only; empty if none does."""
    eps, xp = float(problem.xp.finfo(problem.grid.dtype).eps), problem.xp
    suspects: list[tuple[Row, float, float]] = []
    for rows in groups:
        t, y, known = (xp.concat([row[k] for row in rows], axis=0) for k in (0, 1, 2))
        again = to_host(problem.field(t, y)).reshape(len(rows), -1)
        difference = np.max(np.abs(again - to_host(known).reshape(len(rows), -1)), axis=1)
        size = np.max(np.abs(again), axis=1)
        fine = difference <= _ALONE_OUTPUT * eps * size
        suspects += [(rows[k], float(difference[k]), float(size[k])) for k in np.flatnonzero(~fine)]
    if not suspects:
        return ""
    answers = _answers(problem, [row for row, _, _ in suspects], eps)
    for ((t, y, _, h), difference, size), answer in zip(suspects, answers, strict=True):
        if not difference <= _ALONE * min(answer, eps * float(np.max(np.abs(to_host(y)))) / h):
            return (
                f"f gave something else for t = {float(t[0]):.6g} among other times than alone, by {difference:.2g} of "
                f"{size:.2g}: it acts on all that it is given at once, as a norm, a mean or a largest "
                "value over the whole batch does; reduce over the state's own axes, or give batching='vmap'"
            )
    return ""


def _answers(problem: Problem, rows: list[Row], eps: float) -> list[float]:
    """What the field makes of a rounding of the state, row by row, in one call.

    A step's rounding is not small enough a measure: in float32 the same difference in all of a thousand steps adds up.
    """
    xp, n = problem.xp, len(rows)
    t, y = (xp.concat([row[k] for row in rows], axis=0) for k in (0, 1))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=tuple(y.shape))
    shaken = y * (1 + xp.asarray(signs * (_JITTER * eps), dtype=y.dtype, device=device(y)))
    f = problem.field(xp.concat([t, t]), xp.concat([y, shaken], axis=0))
    answer = np.abs(to_host(f[n:, ...]) - to_host(f[:n, ...])).reshape(n, -1)
    return [float(largest) / _JITTER for largest in np.max(answer, axis=1)]


def sensitivity(
    problem: Problem,
    states: Array,
    defects: list[Array],
    corrections: Sequence[Array] = (),
    stages: Array | None = None,
) -> float:
    """What rounding and the defects left in each step may have grown into somewhere, of the local size.

    Args:
        problem: the problem.
        states: all nodes, ``(N + 1, *state)``.
        defects: of the first steps, in pieces (n, samples, size); those of further steps are 0.
        corrections: made since, in the same pieces; by default none.
        stages: as :class:`~parasolver_adapters.vector_field.jacobian.StepJacobian` takes them.
    """
    xp, n, flat = problem.xp, len(problem.grid), problem.flat(states)
    size = xp.maximum(xp.abs(flat[:-1, ...]), xp.abs(flat[1:, ...]))
    rho = size * _signs(problem, size) * (float(xp.finfo(states.dtype).eps) / 2)
    known = sum(piece.shape[0] for piece in defects)
    rho = rho + xp.concat([*defects, xp.zeros_like(rho[known:, ...])], axis=0)
    grown = StepJacobian(problem, stages).propagate(rho, states)
    if corrections:
        grown = grown - xp.concat([*corrections, xp.zeros_like(rho[known:, ...])], axis=0)
    return relative(xp, grown, local_scale(xp, flat, reach(n))[1:, ...])


def _signs(problem: Problem, like: Array) -> Array:
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size=tuple(like.shape))
    return problem.xp.asarray(signs, dtype=like.dtype, device=device(like))


def doubt(problem: Problem, states: Array, effort: Effort, tolerance: float) -> str:
    """Why the plain loop's answer may be another; empty if there is no reason."""
    if effort.sequential_steps == len(problem.grid):
        return ""
    if not bool(problem.xp.all(problem.xp.isfinite(states))):
        return "the trajectory that was found in parallel is not finite"
    if why := rows_differ(problem, effort.samples):
        return why
    return too_sensitive(problem, states, effort, tolerance)


def too_sensitive(
    problem: Problem, states: Array, effort: Effort, tolerance: float, stages: Array | None = None
) -> str:
    """Why rounding may decide what the states are; empty if it does not."""
    limit = max(_SENSITIVE[problem.xp.finfo(states.dtype).bits], 2 * tolerance)
    grown = effort.twin.grown if problem.size > LARGEST_DENSE else _grown(problem, states, effort, limit, stages)
    if not grown <= limit:
        allowed = f"; tolerance={grown:.1g} allows it" if grown < _HOPELESS else ""
        return (
            f"rounding may grow to {grown:.1g} of the solution, and two ways to a trajectory differ by that much"
            + allowed
        )
    return ""


def _grown(problem: Problem, states: Array, effort: Effort, limit: float, stages: Array | None) -> float:
    """The sensitivity, by known defects or the largest that rounds may leave; by measured ones if that is too much."""
    defects = effort.defects or [_as_large_as_rounds_leave(problem, states)]
    grown = sensitivity(problem, states, defects, effort.corrections, stages)
    if grown <= limit:
        return grown
    ends, _ = problem.method.advance(problem.field, problem.grid, 0, len(problem.grid), states[:-1, ...], None)
    return sensitivity(problem, states, [problem.flat(ends - states[1:, ...])], (), stages)


def _as_large_as_rounds_leave(problem: Problem, states: Array) -> Array:
    """Of random signs: rounds end when what is left is small beside the sample, which is large for a small element."""
    xp, flat = problem.xp, problem.flat(states)[1:, ...]
    largest = xp.max(xp.abs(flat), axis=-1, keepdims=True) + xp.zeros_like(flat)
    return largest * _signs(problem, largest) * (_LEFT * float(xp.finfo(states.dtype).eps))
