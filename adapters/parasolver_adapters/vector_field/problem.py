"""One initial value problem with the choices made for it, and the plain loop that every other way has to agree with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_adapters.vector_field.field import Field
from parasolver_adapters.vector_field.grid import Grid
from parasolver_adapters.vector_field.methods import StepMethod
from parasolver_core.arrays import Array


@dataclass(frozen=True)
class Problem:
    """What to integrate, on which grid and how.

    Args:
        field: the vector field.
        grid: the grid.
        method: bound to the grid.
        batch_dims: how many leading axes of the state count independent samples.
        jacobian: ``jacobian(t, y)`` of the field given by the user; None: by differences or by autograd.
    """

    field: Field
    grid: Grid
    method: StepMethod
    batch_dims: int
    jacobian: Callable[[Array, Array], Array] | None = None

    @property
    def xp(self) -> Any:
        """Array namespace."""
        return self.grid.xp

    @property
    def samples(self) -> int:
        """Number of independent samples."""
        return int(np.prod(self.field.shape[: self.batch_dims]))

    @property
    def size(self) -> int:
        """Number of elements of one sample's state."""
        return int(np.prod(self.field.shape[self.batch_dims :]))

    def flat(self, states: Array) -> Array:
        """``(n, *state)`` as (n, samples, size)."""
        return self.xp.reshape(states, (states.shape[0], self.samples, self.size))

    def unflat(self, states: Array) -> Array:
        """(n, samples, size) as ``(n, *state)``."""
        return self.xp.reshape(states, (states.shape[0], *self.field.shape))

    def sequential_cost(self, steps: int) -> float:
        """What so many steps one after another cost, in calls of the field."""
        return self.method.stages * steps * self.field.cost(1, 1)

    def past(self, lo: int, states: list[Array]) -> Array | None:
        """What the steps from ``lo`` on need to know of the nodes before, given the pieces of the trajectory so far."""
        known = min(lo, self.method.memory)
        if not known:
            return None
        rows = self.xp.concat(states, axis=0)[lo - known : lo, ...]
        return self.field(self.grid.times(lo - known, lo, 0.0), rows)

    def coarse(self, nodes: NDArray[np.int64]) -> Problem:
        """The same problem on some nodes of the grid only, by the method that finds a first approximation."""
        grid = self.grid.part(nodes)
        return replace(self, grid=grid, method=self.method.starter.bind(grid))


def integrate_sequentially(
    problem: Problem, lo: int, hi: int, states: list[Array], past: Array | None = None
) -> list[Array]:
    """The states with ``lo + 1 .. hi`` appended, one step after another, from the last of the pieces ``states``.

    The loop goes on where a state is not finite; that is found out for all steps at once.
    """
    for n in range(lo, hi):
        y, past = problem.method.advance(problem.field, problem.grid, n, n + 1, states[-1][-1:, ...], past)
        states.append(y)
    return states
