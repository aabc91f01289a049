"""Jacobians of the field in the middle of blocks of steps, and the propagator that they make."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import is_torch_array

from parasolver_adapters.vector_field.methods import ExponentialRungeKutta
from parasolver_adapters.vector_field.problem import Problem
from parasolver_adapters.vector_field.surrogate import Propagator, Surrogate, doubled, step_increment
from parasolver_core.arrays import Array

_BLOCKS = 200  # about as many Jacobians a window at first
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
        self.length = 2 ** int(np.clip(np.log2((hi - lo) / _BLOCKS), 0, 6))
        self._current: Propagator | None = None
        self._size = np.inf

    def propagate(self, r: Array, y: Array) -> Array:
        return self._at(y).propagate(r)

    def propagate_back(self, g: Array, y: Array) -> Array:
        return self._at(y).propagate_back(g)

    def update(self, size: float, theta: float) -> bool:
        moved, self._size = self._size, size
        if theta > _SLOW:
            if self.length == 1:
                return theta < 1
            self.length //= 2
            self._current = None
        elif theta > _FAST or moved > _STALE:
            self._current = None
        return True

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
        J = self._jacobian(t, states)
        hJ = J * xp.reshape(grid.asarray(mean), (blocks, *(1,) * (J.ndim - 1)))
        increment = step_increment(xp, hJ, max(problem.method.order, 2), self._halvings(mean), self.dense)
        block = increment
        for _ in range(int(np.log2(length))):
            block = doubled(xp, block, self.dense)
        eye = grid.asarray(np.eye(problem.size)) if self.dense else 1.0
        h = np.concatenate([grid.h[lo:hi], np.full(blocks * length - n, mean[-1])]).reshape(blocks, length)
        ratio = h / mean[:, None]
        equal = np.max(np.abs(ratio - 1)) < 1e-6
        column = None if equal else xp.reshape(grid.asarray(ratio), (blocks, length, 1, 1))
        return Propagator(xp, increment, block + eye, n, column, length, self.dense)

    def _middle(self, y: Array, edges: np.ndarray) -> tuple[Array, Array]:
        """Times and states in the middle of the blocks."""
        grid, xp, lo = self.problem.grid, self.problem.xp, self.lo
        below, above = (edges[:-1] + edges[1:]) // 2, (edges[:-1] + edges[1:] + 1) // 2
        t = (grid.t[lo + below] + grid.t[lo + above]) / 2
        states = xp.take(y, xp.asarray(below), axis=0)
        if np.any(below != above):
            states = (states + xp.take(y, xp.asarray(above), axis=0)) / 2
        return grid.asarray(t), states

    def _jacobian(self, t: Array, y: Array) -> Array:
        """Of the whole right-hand side: (blocks, samples, d, d) or (blocks, samples, d)."""
        problem = self.problem
        if problem.jacobian is not None:
            J = _given(problem, problem.jacobian, t, y, self.dense)
        elif self.dense:
            J = _by_autograd(problem, t, y) if _prefer_autograd(y) else _by_differences(problem, t, y)
        else:
            J = _diagonal(problem, t, y)
        method = problem.method
        if isinstance(method, ExponentialRungeKutta):
            J = J + problem.grid.asarray(_linear_part(method, problem.size, self.dense))
        return J

    def _halvings(self, mean: np.ndarray) -> int:
        """An exponential method's steps are exact in the linear part however long; Taylor's series needs help there."""
        method = self.problem.method
        if not isinstance(method, ExponentialRungeKutta):
            return 0
        norm = np.max(np.abs(method.linear).sum(axis=-1) if method.dense else np.abs(method.linear))
        return max(0, int(np.ceil(np.log2(max(norm * np.max(np.abs(mean)), 2**-3)))) + 3)


def _prefer_autograd(y: Array) -> bool:
    """Differences are as good in double precision and cheaper; in single precision they are not good enough."""
    return is_torch_array(y) and y.dtype.itemsize < 8


def _by_differences(problem: Problem, t: Array, y: Array) -> Array:
    """Forward differences in all directions, one batch."""
    xp, n, d = problem.xp, y.shape[0], problem.size
    flat = problem.flat(y)
    eps = float(xp.finfo(y.dtype).eps) ** 0.5
    size = xp.max(xp.abs(flat), axis=(0, 2), keepdims=True)
    step = (xp.abs(flat) + size * 1e-2 + 1e-30) * eps  # (n, samples, d)
    step = (flat + step) - flat  # what is really added
    eye = problem.grid.asarray(np.eye(d))
    moved = flat[None, ...] + step[None, ...] * xp.reshape(eye, (d, 1, 1, d))
    rows = problem.unflat(xp.concat([flat[None, ...], moved], axis=0).reshape((d + 1) * n, problem.samples, d))
    f = problem.field(xp.tile(t, (d + 1,)), rows)
    f = xp.reshape(f, (d + 1, n, problem.samples, d))
    change = xp.permute_dims(f[1:, ...] - f[:1, ...], (1, 2, 3, 0))
    return change / step[:, :, None, :]


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
    """Estimate of the diagonal, ``v * J v`` with random signs v; exact where the field acts elementwise.

    Reference: Bekas, Kokiopoulou, Saad, "An Estimator for the Diagonal of a Matrix", Appl. Numer. Math. 57, 2007.
    """
    xp = problem.xp
    eps = float(xp.finfo(y.dtype).eps) ** 0.5
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(1, *problem.field.shape))
    v = problem.grid.asarray(signs)
    step = (xp.max(xp.abs(y)) * 1e-2 + xp.abs(y) + 1e-30) * eps * v
    step = (y + step) - y
    f = problem.field(xp.concat([t, t]), xp.concat([y, y + step], axis=0))
    return problem.flat((f[y.shape[0] :, ...] - f[: y.shape[0], ...]) / step)


def _given(problem: Problem, jacobian: Any, t: Array, y: Array, dense: bool) -> Array:
    xp, n, d = problem.xp, y.shape[0], problem.size
    J = jacobian(xp.reshape(t, (n, *(1,) * len(problem.field.shape))), y)
    expected = (n, *problem.field.shape[: problem.batch_dims], *((d, d) if dense else (d,)))
    if tuple(J.shape) != expected or J.dtype != y.dtype:
        raise ValueError(
            f"jacobian: expected shape {expected} and dtype {y.dtype} for t (rows, 1, ...) and y (rows, *state), "
            f"got shape {tuple(J.shape)}, dtype {J.dtype}"
        )
    return xp.reshape(J, (n, problem.samples, *expected[1 + problem.batch_dims :]))


def _linear_part(method: ExponentialRungeKutta, size: int, dense: bool) -> np.ndarray:
    if method.dense:
        return method.linear if dense else np.diag(method.linear)
    diagonal = np.broadcast_to(method.linear, (size,))
    return np.diag(diagonal) if dense else diagonal
