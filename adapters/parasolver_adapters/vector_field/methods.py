"""Integration methods: how a step's end follows from its beginning, for one step and for many at once.

Sequential and parallel integration call the same :meth:`StepMethod.advance`; it knows nothing of either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_adapters.vector_field.grid import Grid
from parasolver_core.arrays import Array

Float64 = NDArray[np.float64]
Slopes = Callable[[Array, Array], Array]  # field(t, y): t is (rows,), y is (rows, *state)


class StepMethod(ABC):
    """A way to integrate on a given grid.

    Attributes:
        order: the global order of convergence.
        memory: how many outputs before its own a step reads.
        stages: calls of the field a step.
        coupled_axes: how many trailing axes of the state the method itself couples, beside the field.
    """

    order: int
    memory: int = 0
    stages: int = 1
    coupled_axes: int = 0

    @abstractmethod
    def advance(
        self, field: Slopes, grid: Grid, lo: int, hi: int, y: Array, past: Array | None = None
    ) -> tuple[Array, Array | None]:
        """The ends of the steps ``lo .. hi - 1`` that begin at ``y``, ``(hi - lo, *state)``.

        Args:
            field: called once a stage with all the steps.
            past: the field at the last ``min(lo, memory)`` nodes before ``lo``; None if the method reads none.

        Returns:
            The ends, and what the steps from ``hi`` on need as ``past``.
        """

    def bind(self, grid: Grid) -> StepMethod:
        """The method with what it precomputes for a grid; itself if nothing."""
        return self

    @property
    def starter(self) -> StepMethod:
        """The method that finds a first approximation on a coarser grid."""
        return RK4

    def derivative(self, f: Array, y: Array, grid: Grid) -> Array:
        """``y'`` where the field says f."""
        return f


@dataclass(frozen=True)
class RungeKutta(StepMethod):
    r"""An explicit Runge-Kutta method.

    .. math:: K_i = f(t + c_i h, y + h \sum_j a_{ij} K_j) , \qquad y' = y + h \sum_i b_i K_i

    Args:
        order: of convergence.
        a: row i holds the i weights of the stages before stage i.
        b: one weight a stage.
    """

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    @property
    def stages(self) -> int:  # type: ignore[override]
        return len(self.b)

    def advance(
        self, field: Slopes, grid: Grid, lo: int, hi: int, y: Array, past: Array | None = None
    ) -> tuple[Array, Array | None]:
        return self.step(field, grid, lo, hi, y, field(grid.times(lo, hi, 0.0), y)), None

    def step(self, field: Slopes, grid: Grid, lo: int, hi: int, y: Array, first: Array) -> Array:
        """The ends of the steps, given the field at their beginnings."""
        h, stages = grid.steps(lo, hi), [first]
        for row in self.a[1:]:
            stages.append(field(grid.times(lo, hi, sum(row)), y + _combine(row, stages) * h))
        return y + _combine(self.b, stages) * h


@dataclass(frozen=True)
class AdamsBashforth(StepMethod):
    """An explicit multistep method: a step integrates the polynomial through the last ``order`` outputs.

    The weights are those of the grid at hand, equal steps or not. The first ``order - 1`` steps are Runge-Kutta steps.

    Reference: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", 1993, section III.5.
    """

    order: int
    weights: Any = None  # (N, order) columns on the device, once bound

    @property
    def memory(self) -> int:  # type: ignore[override]
        return self.order - 1

    def bind(self, grid: Grid) -> AdamsBashforth:
        table = adams_weights(grid.t, self.order)
        return AdamsBashforth(self.order, tuple(grid.column(table[:, k]) for k in range(self.order)))

    def advance(
        self, field: Slopes, grid: Grid, lo: int, hi: int, y: Array, past: Array | None = None
    ) -> tuple[Array, Array | None]:
        xp, first = grid.xp, field(grid.times(lo, hi, 0.0), y)
        outputs = first if past is None else xp.concat([past, first], axis=0)
        known = outputs.shape[0] - (hi - lo)  # nodes before lo among the outputs
        multi = min(max(lo, self.memory), hi)  # the first step with enough history
        ends = []
        if multi > lo:
            ends.append(RK4.step(field, grid, lo, multi, y[: multi - lo, ...], first[: multi - lo, ...]))
        if hi > multi:
            start = known + multi - lo
            moves = (
                self.weights[k][multi:hi, ...] * outputs[start - k : start - k + hi - multi, ...]
                for k in range(self.order)
            )
            ends.append(y[multi - lo :, ...] + _sum(moves))
        end = ends[0] if len(ends) == 1 else xp.concat(ends, axis=0)
        return end, outputs[max(outputs.shape[0] - self.memory, 0) :, ...] if self.memory else None


@dataclass(frozen=True)
class ExponentialRungeKutta(StepMethod):
    r"""Exponential integrators for :math:`y' = L y + N(t, y)`, exact in the linear part.

    .. math::
        a = e^{hL} y + h \varphi_1(hL) N(t, y) , \qquad
        y' = a + h \varphi_2(hL) \bigl(N(t + h, a) - N(t, y)\bigr)

    Order 1 ends at a.

    Args:
        order: 1 (ETD1, exponential Euler) or 2 (ETD2RK).
        linear: L, on the host: a number, (d,) for a diagonal, or (d, d), acting on the last axis.

    Reference: Cox, Matthews, "Exponential Time Differencing for Stiff Systems", J. Comput. Phys. 176, 2002, section 3.
    """

    order: int
    linear: Float64
    tables: Any = None  # e^{hL}, h phi_1(hL), h phi_2(hL) of each step, once bound

    def bind(self, grid: Grid) -> ExponentialRungeKutta:
        lengths, which = np.unique(grid.h, return_inverse=True)
        functions = phi_functions(lengths, self.linear)
        return ExponentialRungeKutta(
            self.order, self.linear, tuple(self._rows(grid, table[which]) for table in functions)
        )

    def advance(
        self, field: Slopes, grid: Grid, lo: int, hi: int, y: Array, past: Array | None = None
    ) -> tuple[Array, Array | None]:
        exp, phi_1, phi_2 = (table[lo:hi, ...] for table in self.tables)
        first = field(grid.times(lo, hi, 0.0), y)
        end = self._apply(grid, exp, y) + self._apply(grid, phi_1, first)
        if self.order == 2:
            end = end + self._apply(grid, phi_2, field(grid.times(lo, hi, 1.0), end) - first)
        return end, None

    @property
    def stages(self) -> int:  # type: ignore[override]
        return self.order

    @property
    def coupled_axes(self) -> int:  # type: ignore[override]
        return int(self.dense)

    @property
    def starter(self) -> StepMethod:
        return ExponentialRungeKutta(2, self.linear)

    def derivative(self, f: Array, y: Array, grid: Grid) -> Array:
        return f + self._apply(grid, grid.asarray(self.linear), y)

    @property
    def dense(self) -> bool:
        """Whether L is a matrix."""
        return self.linear.ndim == 2

    def _rows(self, grid: Grid, table: Float64) -> Array:
        lead = grid.ndim - (self.linear.ndim if not self.dense else 1)
        return grid.asarray(table.reshape(len(grid), *(1,) * lead, *table.shape[1:]))

    def _apply(self, grid: Grid, table: Array, y: Array) -> Array:
        return grid.xp.matmul(table, y[..., None])[..., 0] if self.dense else table * y


def adams_weights(t: Float64, order: int) -> Float64:
    """(N, order), what step n multiplies the outputs at nodes ``n, n - 1, ...`` with; zero without enough history."""
    h = np.diff(t)
    table = np.zeros((len(h), order))
    n = np.arange(order - 1, len(h))
    if not n.size:
        return table
    # Nodes in units of the step, from its beginning: moments of the polynomial's integral over [0, 1].
    nodes = (t[n[:, None] - np.arange(order)] - t[n][:, None]) / h[n][:, None]
    powers = nodes[:, None, :] ** np.arange(order)[:, None]
    moments = 1 / np.arange(1, order + 1)
    table[n] = np.linalg.solve(powers, np.broadcast_to(moments[:, None], (len(n), order, 1)))[..., 0]
    return table * h[:, None]


def phi_functions(h: Float64, linear: Float64) -> tuple[Float64, Float64, Float64]:
    """``e^{hL}``, ``h phi_1(hL)`` and ``h phi_2(hL)`` for each h, (n, *linear.shape).

    All three are blocks of one exponential, that of ``[[hL, h, 0], [0, 0, 1], [0, 0, 0]]``.
    """
    matrix = linear.ndim == 2
    L = linear if matrix else linear.reshape(-1, 1, 1)
    d = L.shape[-1]
    block = np.zeros((len(h), *L.shape[:-2], 3 * d, 3 * d))
    scale = h.reshape(-1, *(1,) * L.ndim)
    block[..., :d, :d] = scale * L
    block[..., :d, d : 2 * d] = scale * np.eye(d)
    block[..., d : 2 * d, 2 * d :] = np.eye(d)
    exponential = matrix_exponential(block)
    parts = (exponential[..., :d, k * d : (k + 1) * d] for k in range(3))
    exp, phi_1, phi_2 = (part if matrix else part.reshape(len(h), *linear.shape) for part in parts)
    return exp, phi_1, phi_2


def matrix_exponential(matrix: Float64) -> Float64:
    """``exp`` of each matrix ``(..., d, d)``: Taylor series of order 18 after scaling to norm 1/2, then squaring."""
    norm = np.max(np.abs(matrix).sum(axis=-2), axis=-1)[..., None, None]
    squarings = np.ceil(np.log2(np.maximum(norm, 0.5))) + 1  # of each: one more doubles the rounding of 1 + small
    scaled = matrix / 2.0**squarings
    total = eye = np.eye(matrix.shape[-1])
    for k in range(18, 0, -1):
        total = eye + scaled @ total / k
    for k in range(int(np.max(squarings, initial=0))):
        total = np.where(k < squarings, total @ total, total)
    return total


def _combine(weights: tuple[float, ...], stages: list[Array]) -> Array:
    return _sum(K if w == 1 else K * w for w, K in zip(weights, stages, strict=True) if w != 0)


def _sum(terms: Any) -> Array:
    terms = iter(terms)
    total = next(terms)
    for term in terms:
        total = total + term
    return total


RK4 = RungeKutta(4, ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8))
METHODS: dict[str, StepMethod] = {
    "euler": RungeKutta(1, ((),), (1.0,)),
    "midpoint": RungeKutta(2, ((), (1 / 2,)), (0.0, 1.0)),
    "heun": RungeKutta(2, ((), (1.0,)), (1 / 2, 1 / 2)),
    "heun3": RungeKutta(3, ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "rk4": RK4,
    "rk4_classic": RungeKutta(4, ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "ab2": AdamsBashforth(2),
    "ab3": AdamsBashforth(3),
    "ab4": AdamsBashforth(4),
}
EXPONENTIAL = {"etd1": 1, "etdrk2": 2}


def get_method(method: Any, linear: Float64 | None) -> StepMethod:
    """The method of that name, or the method itself."""
    if isinstance(method, StepMethod):
        if linear is not None:
            raise ValueError(f"linear: goes with the name of a method; give it to {type(method).__name__} itself")
        return method
    if not isinstance(method, str) or method not in (*METHODS, *EXPONENTIAL):
        names = ", ".join(repr(name) for name in (*METHODS, *EXPONENTIAL))
        raise ValueError(f"method: expected one of {names}, or a StepMethod, got {method!r}")
    if (linear is None) == (method in EXPONENTIAL):
        wanted = ", ".join(repr(name) for name in EXPONENTIAL)
        raise ValueError(
            f"linear: the linear part L of y' = L y + f(t, y) goes with method {wanted} and with these only; got "
            f"method={method!r} {'without' if linear is None else 'with'} it"
        )
    return METHODS[method] if linear is None else ExponentialRungeKutta(EXPONENTIAL[method], linear)
