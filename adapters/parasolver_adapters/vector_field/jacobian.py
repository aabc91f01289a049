"""Jacobians of the field in the middle of blocks of steps, and the propagator that they make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from array_api_compat import device, is_torch_array

from parasolver_adapters.vector_field.field import own_memory
from parasolver_adapters.vector_field.methods import (
    AdamsBashforth,
    ExponentialRungeKutta,
    RungeKutta,
    adams_weights,
    phi_functions,
)
from parasolver_adapters.vector_field.problem import Problem
from parasolver_adapters.vector_field.surrogate import Propagator, Surrogate, doubled, step_increment
from parasolver_core.arrays import Array

LARGEST_DENSE = 32  # elements of a sample's state up to which a matrix for each node pays
_BLOCKS = 200  # about as many Jacobians a window at first; fewer of large matrices, whose products cost more
_BLOCK_ELEMENTS = 800
_FEW = 2**22  # elements of all steps' matrices, each by itself
_DIRECTIONS = 8  # that estimate a diagonal
_STALE = 1e-3  # Jacobians at states that were this far off are taken again
_FAST, _SLOW = 0.1, 0.5  # contractions: better than the first, Jacobians are kept; worse than the second, blocks halved


class FieldJacobian(Surrogate):
    """Jacobians along a window of a problem; starts with long blocks of steps and halves them when progress is slow.

    Args:
        problem: the problem.
        lo, hi: the window's steps.
        dense: matrices, or elementwise.
    """

    def __init__(self, problem: Problem, lo: int, hi: int, dense: bool) -> None:
        self.problem, self.lo, self.hi, self.dense = problem, lo, hi, dense
        blocks = np.clip(_BLOCK_ELEMENTS / problem.size, _BLOCKS // 4, _BLOCKS) if dense else _BLOCKS
        self.length = 2 ** int(np.clip(np.log2((hi - lo) / blocks), 0, 6))
        self._current: Propagator | None = None

    def propagate(self, r: Array, y: Array) -> Array:
        return self._at(y).propagate(r)

    def propagate_back(self, g: Array, y: Array) -> Array:
        return self._at(y).propagate_back(g)

    def update(self, size: float, theta: float) -> None:
        if theta > _SLOW:
            self.length = max(self.length // 2, 1)
        if theta > _FAST or size > _STALE:
            self._current = None

    def _at(self, y: Array) -> Propagator:
        if self._current is None:
            self._current = self._propagator(y)
        return self._current

    def _propagator(self, y: Array) -> Propagator:
        """With Jacobians at the states y, ``(hi - lo + 1, *state)``."""
        problem, length, grid = self.problem, self.length, self.problem.grid
        xp, n, lo, hi = problem.xp, self.hi - self.lo, self.lo, self.hi
        blocks = -(-n // length)
        edges = np.minimum(np.arange(blocks + 1) * length, n)
        count = np.diff(edges)
        mean = (grid.t[lo + edges[1:]] - grid.t[lo + edges[:-1]]) / count
        t, states = self._middle(y, edges)
        increment = self._increment(self._jacobian(t, states), mean)
        block = increment
        for _ in range(int(np.log2(length))):
            block = doubled(xp, block, self.dense)
        eye = grid.asarray(np.eye(increment.shape[-1])) if self.dense else 1.0
        h = np.concatenate([grid.h[lo:hi], np.full(blocks * length - n, mean[-1])]).reshape(blocks, length)
        ratio = h / mean[:, None]
        equal = np.max(np.abs(ratio - 1)) < 1e-6 or increment.shape[-1] != problem.size
        column = None if equal else xp.reshape(grid.asarray(ratio), (blocks, length, 1, 1))
        return Propagator(xp, increment, block + eye, n, column, length, self.dense)

    def _increment(self, J: Array, mean: np.ndarray) -> Array:
        """``A - 1`` for the mean step of each block."""
        problem = self.problem
        method, full = problem.method, J
        if isinstance(method, ExponentialRungeKutta):
            full = J + problem.grid.asarray(_linear_part(problem, method.linear, self.dense))
        scaled = self._times(full, mean)
        return step_increment(problem.xp, scaled, max(method.order, 2), self._halvings(mean), self.dense)

    def _times(self, J: Array, mean: np.ndarray) -> Array:
        return J * self.problem.xp.reshape(self.problem.grid.asarray(mean), (len(mean), *(1,) * (J.ndim - 1)))

    def _middle(self, y: Array, edges: np.ndarray) -> tuple[Array, Array]:
        """Times and states in the middle of the blocks."""
        grid, xp, lo = self.problem.grid, self.problem.xp, self.lo
        below, above = (edges[:-1] + edges[1:]) // 2, (edges[:-1] + edges[1:] + 1) // 2
        t = (grid.t[lo + below] + grid.t[lo + above]) / 2
        states = xp.take(y, xp.asarray(below, device=device(y)), axis=0)
        if np.any(below != above):
            states = (states + xp.take(y, xp.asarray(above, device=device(y)), axis=0)) / 2
        return grid.asarray(t), states

    def _jacobian(self, t: Array, y: Array) -> Array:
        """Of the field: (blocks, samples, d, d) or (blocks, samples, d)."""
        problem = self.problem
        if problem.jacobian is not None:
            return _given(problem, problem.jacobian, t, y, self.dense)
        if self.dense:
            return _by_autograd(problem, t, y) if _prefer_autograd(y) else _by_differences(problem, t, y)
        return _diagonal(problem, t, y)

    def _halvings(self, mean: np.ndarray) -> int:
        """An exponential method's steps are exact in the linear part however long; Taylor's series needs help there."""
        method = self.problem.method
        if not isinstance(method, ExponentialRungeKutta):
            return 0
        norm = np.max(np.abs(method.linear).sum(axis=-1) if method.dense else np.abs(method.linear))
        return int(np.ceil(np.log2(max(norm * np.max(np.abs(mean)), 2**-3)))) + 3


class StepJacobian(FieldJacobian):
    """Jacobians of the method's own steps, with the nodes before that they read: how far an error really grows.

    Matrices act on the last ``memory + 1`` nodes at once. They are larger than what corrections need, and made once.

    Args:
        problem: the problem.
        stages: states at which a Runge-Kutta method calls the field, (N, stages, *state), where steps are few and these
            known; by default the middle of a step stands for all of it.
    """

    def __init__(self, problem: Problem, stages: Array | None = None) -> None:
        super().__init__(replace(problem, jacobian=None), 0, len(problem.grid), dense=True)
        self._stages = stages
        self.memory = problem.method.memory
        self._weights = np.empty((0, self.memory + 1))
        h, elements = problem.grid.h, len(problem.grid) * ((self.memory + 1) * problem.size) ** 2
        if isinstance(problem.method, AdamsBashforth) and np.ptp(h) > 1e-6 * np.max(np.abs(h)) and elements <= _FEW:
            self.length = 1  # a step of its own weights, which are large where it is long beside those before it
            self._weights = adams_weights(problem.grid.t, self.memory + 1) / h[:, None]
            self._weights[: self.memory, 0] = 1.0  # the first steps are Runge-Kutta steps

    def propagate(self, r: Array, y: Array) -> Array:
        xp, d = self.problem.xp, r.shape[-1]
        before = xp.concat([xp.zeros_like(r)] * self.memory, axis=-1) if self.memory else r[..., :0]
        return self._at(y).propagate(xp.concat([r, before], axis=-1))[..., :d]

    def _middle(self, y: Array, edges: np.ndarray) -> tuple[Array, Array]:
        """Where the field is called in a step by itself; a coarse step's middle may have another Jacobian."""
        xp, method = self.problem.xp, self.problem.method
        if self._stages is not None and isinstance(method, RungeKutta):
            t = [self.problem.grid.times(0, len(self.problem.grid), sum(row)) for row in method.a]
            return xp.reshape(xp.stack(t, axis=1), (-1,)), xp.reshape(self._stages, (-1, *self._stages.shape[2:]))
        if self.length > 1 or self.problem.method.stages > 1:
            return super()._middle(y, edges)
        return self.problem.grid.times(0, len(self.problem.grid), 0.0), y[:-1, ...]

    def _increment(self, J: Array, mean: np.ndarray) -> Array:
        xp, method = self.problem.xp, self.problem.method
        if isinstance(method, ExponentialRungeKutta):
            return self._exponential(method, J, mean)
        if isinstance(method, RungeKutta):
            each = xp.reshape(J, (len(mean), -1, *J.shape[1:]))  # one for all stages, or for each
            scaled = [self._times(each[:, k, ...], mean) for k in range(each.shape[1])]
            return _runge_kutta(xp, method, scaled * (method.stages // len(scaled)))
        scaled, d, order = self._times(J, mean), J.shape[-1], self.memory + 1
        if not isinstance(method, AdamsBashforth):
            return super()._increment(J, mean)
        weights = self._weights
        if self.length > 1 or not len(weights):
            weights = np.broadcast_to(adams_weights(np.arange(order + 1.0), order)[-1], (len(mean), order))
        columns = self.problem.grid.asarray(weights.T.reshape(order, -1, *(1,) * (scaled.ndim - 1)))
        top = xp.concat([scaled * columns[k, ...] for k in range(order)], axis=-1)
        shift = np.eye(self.memory * d, order * d) - np.eye(self.memory * d, order * d, d)
        rows = xp.concat([xp.zeros_like(top[..., :1, :])] * (self.memory * d), axis=-2)
        return xp.concat([top, rows + self.problem.grid.asarray(shift)], axis=-2)

    def _exponential(self, method: ExponentialRungeKutta, J: Array, mean: np.ndarray) -> Array:
        problem, xp = self.problem, self.problem.xp
        lengths, which = np.unique(mean, return_inverse=True)
        L = _linear_part(problem, method.linear, True)
        if method.dense:
            tables = phi_functions(lengths, L[0])
        else:  # matrices would be exponentiated at length
            each = phi_functions(lengths, np.diagonal(L, axis1=-2, axis2=-1).ravel())
            tables = tuple(t.reshape(-1, *L.shape[:-1])[..., None] * np.eye(problem.size) for t in each)
        exp, phi_1, phi_2 = (t[which].reshape(len(mean), -1, problem.size, problem.size) for t in tables)
        euler = problem.grid.asarray(exp - np.eye(problem.size)) + xp.matmul(problem.grid.asarray(phi_1), J)
        if method.order == 1:
            return euler
        return euler + xp.matmul(problem.grid.asarray(phi_2), xp.matmul(J, euler))


def _runge_kutta(xp: Any, method: RungeKutta, scaled: list[Array]) -> Array:
    """A step's Jacobian less 1, where those of the field at its stages times the step's length are ``scaled``."""
    stages: list[Array] = []
    for row, J in zip(method.a, scaled, strict=True):
        stages.append(J + xp.matmul(J, _weighted(xp, row, stages, J)))
    return _weighted(xp, method.b, stages, scaled[0])


def _weighted(xp: Any, weights: tuple[float, ...], stages: list[Array], like: Array) -> Array:
    return sum((K * w for w, K in zip(weights, stages, strict=True)), xp.zeros_like(like))


def _prefer_autograd(y: Array) -> bool:
    """Differences are as good in double precision and cheaper; in single precision they are not good enough."""
    return is_torch_array(y) and y.dtype.itemsize < 8


def _by_differences(problem: Problem, t: Array, y: Array) -> Array:
    """Column by column."""
    return problem.xp.stack(_changes(problem, t, y, np.eye(problem.size)), axis=-1)


def _changes(problem: Problem, t: Array, y: Array, directions: np.ndarray) -> list[Array]:
    """``J v`` for each direction v (size,), by forward differences in one batch."""
    xp, n, d, k = problem.xp, y.shape[0], problem.size, len(directions)
    flat = problem.flat(y)
    eps = float(xp.finfo(y.dtype).eps) ** 0.5
    size = xp.max(xp.abs(flat), axis=-1, keepdims=True)
    step = (size + 1e-30) * eps * problem.grid.asarray(directions)[:, None, None, :]
    step = (flat + step) - flat  # what is really added
    rows = xp.concat([flat[None, ...], flat + step], axis=0)
    f = problem.field(xp.tile(t, (k + 1,)), problem.unflat(xp.reshape(rows, ((k + 1) * n, problem.samples, d))))
    f = xp.reshape(f, (k + 1, n, problem.samples, d))
    length = xp.max(xp.abs(step), axis=-1, keepdims=True)
    change = (f[1:, ...] - f[:1, ...]) / length
    return [change[i, ...] for i in range(k)]


def _by_autograd(problem: Problem, t: Array, y: Array) -> Array:
    """A backward pass for each component; rows and samples are independent, so one serves them all."""
    import torch

    with torch.enable_grad():
        y = y.detach().requires_grad_()
        f = problem.flat(problem.field(t, y))
        if not f.requires_grad:
            return torch.zeros((*f.shape, f.shape[-1]), dtype=y.dtype, device=y.device)
        rows = []
        for i in range(problem.size):
            (row,) = torch.autograd.grad(f[..., i].sum(), y, retain_graph=True, materialize_grads=True)
            rows.append(problem.flat(row))
        return torch.stack(rows, dim=-2)


def _diagonal(problem: Problem, t: Array, y: Array) -> Array:
    """The diagonal, ``sum_k v_k * J v_k / sum_k v_k * v_k``, by differences in a few directions v_k.

    Exact for small states and where the field acts elementwise; for others an estimate with random signs.

    Reference: Bekas, Kokiopoulou, Saad, "An Estimator for the Diagonal of a Matrix", Appl. Numer. Math. 57, 2007.
    """
    d = problem.size
    v = np.eye(d) if d <= _DIRECTIONS else np.random.default_rng(0).choice([-1.0, 1.0], size=(_DIRECTIONS, d))
    weighted = sum(change * problem.grid.asarray(w) for change, w in zip(_changes(problem, t, y, v), v, strict=True))
    return weighted / problem.grid.asarray((v**2).sum(axis=0))


def _given(problem: Problem, jacobian: Any, t: Array, y: Array, dense: bool) -> Array:
    xp, n, d = problem.xp, y.shape[0], problem.size
    J = own_memory(jacobian(xp.reshape(own_memory(t), (n, *(1,) * len(problem.field.shape))), own_memory(y)))
    expected = (n, *problem.field.shape[: problem.batch_dims], *((d, d) if dense else (d,)))
    if tuple(J.shape) != expected or J.dtype != y.dtype:
        raise ValueError(
            f"jacobian: expected shape {expected} and dtype {y.dtype} for t (rows, 1, ...) and y (rows, *state), "
            f"got shape {tuple(J.shape)}, dtype {J.dtype}"
        )
    return xp.reshape(J, (n, problem.samples, *expected[1 + problem.batch_dims :]))


def _linear_part(problem: Problem, L: np.ndarray, dense: bool) -> np.ndarray:
    """What L adds to the Jacobians, (samples, size, size) or (samples, size); it acts on the last axis of the state."""
    if dense and L.ndim == 2:
        return np.kron(np.eye(problem.size // len(L)), L)[None]
    diagonal = np.broadcast_to(np.diag(L) if L.ndim == 2 else L, problem.field.shape)
    diagonal = diagonal.reshape(problem.samples, problem.size)
    return diagonal[..., None] * np.eye(problem.size) if dense else diagonal
