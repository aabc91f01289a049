r"""What an accepted trajectory is held against before it is handed over, beside its own defects.

Defects say that every step is right by the field as it was called, with many times at once. They do not say that the
field gives the same alone, nor what becomes of what is left in each step:
:math:`\delta_{n+1} = A_n \delta_n + \rho_n`. Where a check fails, the plain loop is made instead, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from parasolver_adapters.vector_field.jacobian import StepJacobian
from parasolver_adapters.vector_field.problem import Problem
from parasolver_core.arrays import Array, to_host

if TYPE_CHECKING:
    from parasolver_adapters.vector_field.newton import Effort

LARGEST_DENSE = 32  # elements of a sample's state up to which a matrix for each node pays
_SENSITIVE = {64: 2e-9, 32: 2e-5}  # of the local size, by bits of a number: rounding that may show
_LEAST = {64: 1e-3, 32: 1.0}  # of its sample's largest element: what a smaller one is held against
_HOPELESS = 0.1  # of the local size: nobody wants a trajectory that rounding has changed by more
_ALONE = 1e2  # roundings of the state, in a step: what a row alone may differ by
_ALONE_OUTPUT = 1e3  # roundings of the output
_ROUNDING = {64: 1e3, 32: 16.0}  # in roundings, by bits: defects that are no more than rounding
_DRIFT = 0.25  # of what a random walk of such defects comes to: their sum, which rounding leaves far below
_JITTER = 4.0  # roundings


@dataclass
class Samples:
    """A few rows of the last batch of each window, to be compared with the field called alone."""

    rows: list[tuple[Array, Array, Array, float]] = field(default_factory=list)

    def keep(self, recorded: Recorder, steps: NDArray[np.float64]) -> None:
        """The first, the middle, the last and the largest row of those that were accepted."""
        t, y, f = (rows[: len(steps), ...] for rows in recorded.first)
        size = np.max(np.abs(to_host(y).reshape(y.shape[0], -1)), axis=1)
        for n in (0, len(size) // 2, len(size) - 1, int(np.argmax(size))):
            self.rows.append((t[n : n + 1], y[n : n + 1, ...], f[n : n + 1, ...], float(abs(steps[n]))))

    def chosen(self) -> list[tuple[Array, Array, Array, float]]:
        """First, middle, last and largest of all windows."""
        windows = [self.rows[k : k + 4] for k in range(0, len(self.rows), 4)]
        largest = max((w[3] for w in windows), key=lambda row: float(np.max(np.abs(to_host(row[1])))))
        return [windows[0][0], windows[len(windows) // 2][1], windows[-1][2], largest]


class Recorder:
    """The field, remembering its first call: all the steps' beginnings."""

    def __init__(self, f: Any) -> None:
        self._f = f
        self.first: Any = None

    def __call__(self, t: Array, y: Array) -> Array:
        out = self._f(t, y)
        if self.first is None:
            self.first = (t, y, out)
        return out


def rows_differ(problem: Problem, samples: Samples) -> str:
    """How a row of a batch differs from the field called alone; empty if it does not."""
    eps = float(problem.xp.finfo(problem.grid.dtype).eps)
    for t, y, batched, h in samples.chosen():
        alone, row = to_host(problem.field(t, y)), to_host(batched)
        difference = float(np.max(np.abs(alone - row)))
        allowed = max(_ALONE * eps * np.max(np.abs(to_host(y))) / h, _ALONE_OUTPUT * eps * np.max(np.abs(alone)))
        if not difference <= allowed:
            return (
                f"f gave something else for t = {float(t[0]):.6g} among other times than alone, by {difference:.2g} of "
                f"{np.max(np.abs(alone)):.2g}: it acts on all that it is given at once, as a norm, a mean or a largest "
                "value over the whole batch does; reduce over the state's own axes, or give batching='vmap'"
            )
    return ""


def local_scale(xp: Any, states: Array, reach: int) -> Array:
    """The largest value of each element at a node and ``reach`` nodes before it, of states (n, samples, size).

    Nodes further back do not count, nor other elements: what has decayed to nothing may grow again. Nor do later nodes:
    where they have run away, earlier ones would seem accurate beside them.
    """
    tiny = xp.full_like(states[:1, ...], float(xp.finfo(states.dtype).smallest_normal))
    largest, width, wanted = xp.maximum(xp.abs(states), tiny), 1, min(reach + 1, states.shape[0])
    while width < wanted:
        step = min(width, wanted - width)
        largest = xp.concat([largest[:step, ...], xp.maximum(largest[step:, ...], largest[:-step, ...])], axis=0)
        width += step
    return largest


def reach(steps: int) -> int:
    """How many nodes around count as near: the range of double precision decays by 1e6 over so many at most."""
    return max(steps // 50, 1)


def scatter(xp: Any, defects: Array, allowed: Array) -> bool:
    """Whether defects (n, ...) are as small as allowed, and have no common direction: a thousand small ones add up."""
    if not bool(xp.all(xp.abs(defects) <= allowed)):
        return False
    drift = xp.abs(xp.cumulative_sum(defects / allowed, axis=0))
    return bool(xp.all(drift <= _DRIFT * defects.shape[0] ** 0.5))


def is_rounding(xp: Any, defects: Array, size: Array, shaken: Callable[[Array], Array]) -> bool:
    """Whether defects (n, samples, size) are no more than the rounding of what they are made of, and scatter like it.

    They are held against the size of the element itself first, and where that is exceeded against what a step makes of
    rounding in all elements of its beginning, which is measured.

    Args:
        xp: array namespace.
        defects: of each step.
        size: (n, samples, size), of the elements that they are the difference of.
        shaken: by how much the steps' ends change if their beginnings do by these factors.
    """
    eps = float(xp.finfo(size.dtype).eps)
    roundings = _ROUNDING[xp.finfo(size.dtype).bits]
    allowed = roundings * eps * size
    if bool(xp.all(xp.abs(defects) <= allowed)):
        return scatter(xp, defects, allowed)
    whole = xp.max(allowed, axis=-1, keepdims=True)  # a jump of the field is not rounding
    if not bool(xp.all(xp.abs(defects) <= whole)):
        return False
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=tuple(size.shape))
    signs = xp.asarray(signs, dtype=size.dtype, device=device(size))
    answer = xp.abs(shaken(signs * (_JITTER * eps))) * (roundings / _JITTER)
    return scatter(xp, defects, xp.maximum(allowed, xp.minimum(answer, whole)))


def sensitivity(problem: Problem, states: Array, defects: list[Array]) -> float:
    """What rounding and the defects left in each step may have grown into somewhere, of the local size."""
    xp, n, flat = problem.xp, len(problem.grid), problem.flat(states)
    info = xp.finfo(states.dtype)
    size = xp.maximum(xp.abs(flat[:-1, ...]), xp.abs(flat[1:, ...])) + float(info.smallest_normal)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size=tuple(size.shape))
    rho = size * xp.asarray(signs * (float(info.eps) / 2), dtype=size.dtype, device=device(size))
    known = xp.concat(defects, axis=0)
    rho = rho + xp.concat([known, xp.zeros_like(rho[known.shape[0] :, ...])], axis=0)
    grown = StepJacobian(problem).propagate(rho, states)
    return relative(xp, grown, local_scale(xp, flat, reach(n))[1:, ...])


def relative(xp: Any, difference: Array, scale: Array) -> float:
    """The largest difference (n, samples, size), of the elements' sizes.

    An element counts as at least a thousandth of its sample's largest, in float32 as the largest: below that it is
    decided by the rounding of the others, in the plain loop too.
    """
    least = _LEAST[xp.finfo(scale.dtype).bits] * xp.max(scale, axis=-1, keepdims=True)
    return float(xp.max(xp.abs(difference) / xp.maximum(scale, least)))


class Twin:
    """How far rounding grows along coarse solutions, window after window: for states too large for matrices.

    Beside the coarse trajectory goes another, nearly the same, in the same calls of the field. Before each step their
    difference is made small, and the rounding of the steps that this one stands for is added to it.

    Attributes:
        grown: the largest difference so far, of the local size.
    """

    def __init__(self) -> None:
        self.grown = 0.0
        self._apart: Any = None
        self._trial: list[tuple[int, Array, float]] = []

    def integrate(self, level: Problem, nodes: NDArray[np.int64], y: Array) -> Array:
        """The coarse solution at the nodes of a level, from y, ``(1, *state)``."""
        xp, states, eps = level.xp, [y], float(level.xp.finfo(y.dtype).eps)
        field, samples = level.field, np.random.default_rng(2)
        apart = xp.zeros_like(y) if self._apart is None else self._apart
        self._trial = []
        for k, steps in enumerate(np.diff(nodes)):
            signs = samples.choice([-1.0, 1.0], size=(1, *field.shape))
            apart = apart + xp.abs(y) * level.grid.asarray(signs * (eps / 2 * np.sqrt(steps)))
            small = xp.max(xp.abs(y)) * eps**0.5 / xp.max(xp.abs(apart))
            small = float(small) if bool(xp.isfinite(small)) else 1.0
            pair = xp.concat([y, y + apart * small], axis=0)
            pair, _ = level.method.advance(lambda t, y: field(xp.concat([t, t]), y), level.grid, k, k + 1, pair)
            y, apart = pair[:1, ...], (pair[1:, ...] - pair[:1, ...]) / small
            states.append(y)
            scale = local_scale(xp, level.flat(xp.concat(states[-2:], axis=0)), 1)[1:, ...]
            self._trial.append((int(nodes[k + 1]), apart, relative(xp, level.flat(apart), scale)))
        return xp.concat(states, axis=0)

    def accept(self, hi: int, tolerance: float) -> None:
        """The last window was found up to the node ``hi``, to that tolerance."""
        for node, apart, grown in self._trial:
            if node > hi:
                break
            self._apart, self.grown = apart, max(self.grown, grown)
        if self._apart is not None:
            self._apart = self._apart * (1 + tolerance / max(self.grown, tolerance))


def doubt(problem: Problem, states: Array, effort: Effort, tolerance: float) -> str:
    """Why the plain loop's answer may be another; empty if there is no reason."""
    if effort.sequential_steps == len(problem.grid):
        return ""
    if not bool(problem.xp.all(problem.xp.isfinite(states))):
        return "the trajectory that was found in parallel is not finite"
    if why := rows_differ(problem, effort.samples):
        return why
    limit = max(_SENSITIVE[problem.xp.finfo(states.dtype).bits], 2 * tolerance)
    grown = effort.twin.grown if problem.size > LARGEST_DENSE else _grown(problem, states, effort, limit)
    if not grown <= limit:
        allowed = f"; tolerance={grown:.1g} allows it" if grown < _HOPELESS else ""
        return (
            f"rounding may grow to {grown:.1g} of the solution, and two ways to a trajectory differ by that much"
            + allowed
        )
    return ""


def _grown(problem: Problem, states: Array, effort: Effort, limit: float) -> float:
    """The sensitivity, by defects that are guessed at if these are good enough, and else measured."""
    grown = sensitivity(problem, states, effort.defects)
    if grown <= limit:
        return grown
    ends, _ = problem.method.advance(problem.field, problem.grid, 0, len(problem.grid), states[:-1, ...], None)
    return sensitivity(problem, states, [problem.flat(ends - states[1:, ...])])
