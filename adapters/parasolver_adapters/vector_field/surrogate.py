"""The linear recurrence that carries a defect along the trajectory: what Newton's method solves in each round.

Near the solution an error moves from node to node by ``d_{n+1} = A_n d_n + r_n``. The matrices ``A_n = dPhi_n/dy``
change slowly along a smooth trajectory, so one Jacobian J of the field, in the middle of a *block* of steps, serves the
whole block: ``A_n = R(h_n J)``. Blocks are then linear maps, and the map of all of them is found by combining
neighbours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device

from parasolver_core.arrays import Array, to_host
from parasolver_core.rounds.linearization import Secant


class Surrogate(ABC):
    """What stands for the Jacobians of a window's steps while defects are carried along it."""

    @abstractmethod
    def propagate(self, r: Array, y: Array) -> Array:
        """``d_1 .. d_N`` of ``d_{n+1} = A_n d_n + r_n``, ``d_0 = 0``; r is ``(N, samples, size)``.

        Args:
            r: defects.
            y: the trajectory, ``(N + 1, *state)``.
        """

    @abstractmethod
    def propagate_back(self, g: Array, y: Array) -> Array:
        """``l_0 .. l_{N-1}`` of the transposed recurrence ``l_n = A_n^T l_{n+1} + g_n``, ``l_N = 0``."""

    def update(self, size: float, theta: float) -> None:  # noqa: B027
        """Told how far the last correction moved the trajectory, and its ratio to the one before, 0 for the first."""


class IdentitySurrogate(Surrogate):
    """Each step's Jacobian is the identity: Picard iteration."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    def propagate(self, r: Array, y: Array) -> Array:
        return self.xp.cumulative_sum(r, axis=0)

    def propagate_back(self, g: Array, y: Array) -> Array:
        return self.xp.flip(self.xp.cumulative_sum(self.xp.flip(g, axis=0), axis=0), axis=0)


class SecantSurrogate(Surrogate):
    """Each step's Jacobian is a multiple of the identity, learned from how the step's end moved with its beginning.

    A defect is what the step's end differs by from what the slope predicted, as in the core.
    """

    def __init__(self, xp: Any) -> None:
        self.xp, self._moved = xp, None

    def propagate(self, r: Array, y: Array) -> Array:
        self._learn(r)
        d = self._propagator(r).propagate(r)
        self._moved = self.xp.concat([self.xp.zeros_like(d[:1, ...]), d[:-1, ...]], axis=0)
        return d

    def propagate_back(self, g: Array, y: Array) -> Array:
        self._learn(g)
        d = self._propagator(g).propagate_back(g)
        self._moved = self.xp.concat([d[1:, ...], self.xp.zeros_like(d[:1, ...])], axis=0)
        return d

    def _learn(self, defect: Array) -> None:
        if self._moved is None:
            self._slope = np.zeros(tuple(defect.shape[:2]))
            return
        moved, xp = self._moved, self.xp
        products = xp.stack([xp.sum(moved * moved, axis=-1), xp.sum(moved * defect, axis=-1)])
        self._slope = Secant().update(self._slope, *to_host(products).astype(np.float64))

    def _propagator(self, like: Array) -> Propagator:
        increment = self.xp.asarray(self._slope[:, :, None], dtype=like.dtype, device=device(like))
        return Propagator(self.xp, increment, increment + 1, like.shape[0], None, 1, False)


@dataclass(frozen=True)
class Propagator:
    """Steps of the linearized flow, with one Jacobian a block.

    A Jacobian is a matrix ``(blocks, batch, d, d)`` or, elementwise, ``(blocks, batch, d)``.

    Args:
        xp: array namespace.
        increment: ``R(h J) - 1`` for each block's mean step.
        block: ``R(h J)`` to the power of the block's length.
        steps: the number of steps, not more than blocks times length.
        ratio: (blocks, length, 1, 1), each step's length over its block's mean; None where all are equal.
        length: steps a block.
        dense: whether the Jacobians are matrices.
    """

    xp: Any
    increment: Array
    block: Array
    steps: int
    ratio: Array | None
    length: int
    dense: bool

    def propagate(self, r: Array) -> Array:
        """``d_1 .. d_N`` of ``d_{n+1} = A_n d_n + r_n``, ``d_0 = 0``; r is ``(N, batch, d)``."""
        return self._run(self._split(r), range(self.length), self.increment, self.block, False)

    def propagate_back(self, g: Array) -> Array:
        """``l_0 .. l_{N-1}`` of the transposed recurrence ``l_n = A_n^T l_{n+1} + g_n``, ``l_N = 0``."""
        increment, block = (self.xp.matrix_transpose(m) if self.dense else m for m in (self.increment, self.block))
        flipped = self.xp.flip
        order = range(self.length - 1, -1, -1)
        return self._run(self._split(g), order, flipped(increment, axis=0), flipped(block, axis=0), True)

    def _split(self, r: Array) -> Array:
        """(blocks, length, batch, d), with steps that do nothing at the end."""
        xp, blocks = self.xp, self.increment.shape[0]
        missing = blocks * self.length - self.steps
        if missing:
            r = xp.concat([r, xp.zeros_like(r[:missing, ...])], axis=0)
        return xp.reshape(r, (blocks, self.length, *r.shape[1:]))

    def _run(self, r: Array, order: range, increment: Array, block: Array, back: bool) -> Array:
        xp = self.xp
        if back:
            r = xp.flip(r, axis=0)
        end, _ = self._sweep(r, order, increment, xp.zeros_like(r[:, 0, ...]), back, keep=False)
        starts = scan(xp, block[:-1, ...], end[:-1, ...], self.dense)
        starts = xp.concat([xp.zeros_like(end[:1, ...]), starts], axis=0)
        _, states = self._sweep(r, order, increment, starts, back, keep=True)
        if back:
            states = states[::-1]
        out = xp.stack(states, axis=1)
        if back:
            out = xp.flip(out, axis=0)
        return xp.reshape(out, (-1, *out.shape[2:]))[: self.steps, ...]

    def _sweep(
        self, r: Array, order: range, increment: Array, v: Array, back: bool, keep: bool
    ) -> tuple[Array, list[Array]]:
        """All blocks at once, a step at a time, from the states v at their beginnings."""
        states, ratio = [], self.ratio
        if back and ratio is not None:
            ratio = self.xp.flip(ratio, axis=0)
        for j in order:
            move = apply(self.xp, increment, v, self.dense)
            v = v + (move if ratio is None else move * ratio[:, j, ...]) + r[:, j, ...]
            if keep:
                states.append(v)
        return v, states


def apply(xp: Any, matrix: Array, v: Array, dense: bool) -> Array:
    """Matrix times vector, or elementwise product, in each batch."""
    return xp.matmul(matrix, v[..., None])[..., 0] if dense else matrix * v


def scan(xp: Any, P: Array, r: Array, dense: bool) -> Array:
    """``d_1 .. d_N`` of ``d_{n+1} = P_n d_n + r_n``, ``d_0 = 0``, by combining neighbours: about 2 log2(N) batches.

    Reference: Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4.
    """
    n = r.shape[0]
    if n < 2:
        return r
    pairs = n // 2
    first_P, second_P = P[: 2 * pairs : 2, ...], P[1::2, ...]
    first_r, second_r = r[: 2 * pairs : 2, ...], r[1::2, ...]
    product = xp.matmul(second_P, first_P) if dense else second_P * first_P
    even = scan(xp, product, apply(xp, second_P, first_r, dense) + second_r, dense)  # d_2, d_4, ...
    before = xp.concat([xp.zeros_like(r[:1, ...]), even], axis=0)[: n - pairs, ...]  # d_0, d_2, ...
    odd = apply(xp, P[::2, ...], before, dense) + r[::2, ...]  # d_1, d_3, ...
    paired = xp.reshape(xp.stack([odd[:pairs, ...], even], axis=1), (2 * pairs, *r.shape[1:]))
    return paired if n == 2 * pairs else xp.concat([paired, odd[pairs:, ...]], axis=0)


def step_increment(xp: Any, x: Array, order: int, halvings: int, dense: bool) -> Array:
    """``exp(x) - 1``, with ``x = h J``, by Taylor's series to the given order, after halving and followed by doubling.

    Without halvings this is the increment of a Runge-Kutta method of that order for a field linear in y.
    """
    x = x * 0.5**halvings
    total = x
    for k in range(order, 1, -1):
        total = x + product(xp, x, total, dense) * (1 / k)
    # sum x^i / i! by Horner's rule: x (1 + x/2 (1 + x/3 (...)))
    for _ in range(halvings):
        total = doubled(xp, total, dense)
    return total


def doubled(xp: Any, increment: Array, dense: bool) -> Array:
    """The increment of two steps: ``(1 + C)^2 - 1``."""
    return increment * 2 + product(xp, increment, increment, dense)


def product(xp: Any, a: Array, b: Array, dense: bool) -> Array:
    """Matrix product, or elementwise, in each batch."""
    return xp.matmul(a, b) if dense else a * b
