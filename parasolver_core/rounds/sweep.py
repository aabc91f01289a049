"""One round's correction of one window: a quasi-Newton step, made as a sweep through the recurrence.

The window's equations are ``L X - B D(X) = rhs``. With the network's Jacobian replaced by the slopes ``G``, the step is
the sampler itself, run through the window with the surrogate ``m_i = D(x_i) + g_i dx_i`` in the network's place, where
``dx_i`` is by how much the state is new (:class:`SweepCorrection`). Less the old states, this is ``dX = T r`` with
``T = (L - B G)^{-1} B`` and the defect ``r = D(X) - M``: what the network says, less what was believed
(:mod:`parasolver_core.rounds.matrix`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array
from parasolver_core.rounds.squares import lowest, sums_of_squares
from parasolver_core.samplers.recurrence import Recurrence, StepNoise
from parasolver_core.samplers.terms import combine

Float64 = NDArray[np.float64]

_STRIPE, _PERIOD = 256, 4099  # of a large state's elements 256 in 4099 are sampled: a prime, which no layout matches
_BLOCK = 16 * _PERIOD  # elements of a state worked on at a time: the rows at hand then stay in a core's own cache
_WHOLE = 2**13  # up to so many elements all are sampled
_CALL = 2**13  # elements worth a call
_CHANGED = 0.01  # by trial: a move by this share of a state's size: it is measured again


@dataclass(frozen=True)
class Comparison:
    """What a round's outputs tell before anything is moved; means over a state's elements, each (n,).

    Args:
        cross: ``dX_i r_i``, of the last move of each node's input and its defect.
        moved: ``dX_i^2``.
        size: ``X_i^2``.
        defect: ``r_i^2``.
    """

    cross: Float64
    moved: Float64
    size: Float64
    defect: Float64


class SweepCorrection:
    """A window's states and believed outputs, and how a round moves them: by the recurrence, node by node.

    A block of elements at a time, for NumPy arrays. Its arithmetic does not grow with the window, each row is brought
    into the cache once, and sliding costs nothing: the new rows are written where they come to lie. States are made by
    the recurrence itself, in the order of its table, so those behind final nodes are final to the last bit. Slopes, one
    number for a whole state, are taken from a sixteenth of the elements of a large one, and only there are moves kept.

    The rows of the buffers belong to consecutive nodes, the first to node ``base``: those of the window, those before
    it that the recurrence reads, and room for a few to come, so that sliding is a matter of an offset.

    Args:
        recurrence: the sampler.
        noise: of each step, (size,).
        width: the most nodes of the window.
        start: the state of node 0, (size,).
        whole_moves: whether :meth:`last_move` is needed.
    """

    def __init__(
        self, recurrence: Recurrence, noise: StepNoise, width: int, start: Array, whole_moves: bool = False
    ) -> None:
        self._recurrence, self._noise, self.base = recurrence, noise, 0
        size, n = start.shape[0], len(recurrence)
        self._capacity = min(width + max(3 * width // 8, 1), n) + recurrence.memory - 1
        self.X, self.M = (np.zeros((self._capacity, size), dtype=start.dtype) for _ in range(2))
        self._whole = whole_moves or size <= _WHOLE
        self._blocks = [slice(first, min(first + _BLOCK, size)) for first in range(0, size, _BLOCK)]
        self._dX = np.zeros((min(width, n), *self._sampled(start).shape), dtype=start.dtype)
        self._moved_from = self._moved_to = 0  # the nodes of its rows
        self._moved, self._size = np.zeros(n), np.ones(n)
        block = min(size, _BLOCK)
        rows = min(width, max(2 * block, _CALL) // self._dX[0].size + 1)
        self._work = np.empty(max(2 * block, rows * self._dX[0].size), dtype=start.dtype)
        self._pair = self._work[:block], self._work[block : 2 * block]
        self._together = rows  # of a comparison
        self.X[0], self._terms = start, recurrence.terms(start.dtype)
        self._measure(0, start)

    def rows(self, lo: int, hi: int) -> slice:
        """Where the nodes ``lo .. hi - 1`` are."""
        return slice(lo - self.base, hi - self.base)

    def write(self, buffer: str, i: int, row: Array) -> None:
        """Set one row of X or M."""
        getattr(self, buffer)[i - self.base] = row
        if buffer == "X" and i > 0:
            self._measure(i, row)

    def history(self, i: int) -> tuple[list[Array], list[Array]]:
        """States and outputs at ``i, i - 1, ...`` as far as the recurrence reads."""
        rows = [j - self.base for j in range(i, max(i - self._recurrence.memory, -1), -1)]
        return [self.X[row, :] for row in rows], [self.M[row, :] for row in rows]

    def behind(self, i: int) -> Array:
        """The state behind node i, by the recurrence itself."""
        return self._recurrence.advance(i, *self.history(i), self._noise(i))

    def make_room(self, first: int, first_new: int, hi: int) -> None:
        """Room for nodes up to ``hi - 1``, keeping ``first .. first_new - 1``."""
        if hi - self.base > self._capacity:
            kept = self.rows(first, first_new)
            for buffer in (self.X, self.M):
                buffer[: kept.stop - kept.start] = buffer[kept].copy()
            self.base = first

    def compare(self, D: Array, lo: int) -> Array:
        """A vector for :meth:`read`: how the outputs D, (n, size), of the nodes from ``lo`` compare with belief."""
        n, known = D.shape[0], max(self._moved_to - lo, 0)
        outputs, beliefs = self._sampled(D), self._sampled(self.M[self.rows(lo, lo + n)])
        dX = self._dX[lo - self._moved_from :]
        sums = np.zeros((2, n))
        for first in range(0, n, self._together):
            last = min(first + self._together, n)
            r = np.reshape(self._work[: (last - first) * outputs[0].size], outputs[first:last].shape)
            np.subtract(outputs[first:last], beliefs[first:last], out=r)
            sums[1, first:last] = _inner(r, r)
            last = min(last, known)
            if last > first:
                sums[0, first:last] = _inner(dX[first:last], r[: last - first])
        return np.reshape(sums, (-1,)) / outputs[0].size

    def read(self, compared: Float64, lo: int) -> Comparison:
        """What :meth:`compare` found, brought to the host."""
        n = len(compared) // 2
        cross, defect, nodes = compared[:n], compared[n:], slice(lo, lo + n)
        return Comparison(cross, self._moved[nodes].copy(), self._size[nodes].copy(), defect)

    def move(self, D: Array, slope: Float64, lo: int, still: Float64 | float = 0.0) -> Float64:
        """``X += dX``; ``M = D + g dX``, but ``M = D`` where a move is so small that a guessed slope is worse.

        Args:
            D, lo: as before.
            slope: (n,).
            still: (n,), the relative size of those moves.

        Returns:
            RMS of the moves, (n,). Where an output, or its square, is not finite, that of this node or of a later one
            is not.
        """
        n, size = D.shape
        base = max(lo - self._recurrence.memory + 1, self.base)
        noise = [self._noise(i) for i in range(lo, lo + n - 1)]
        slopes = slope.astype(D.dtype)
        g = [slopes[j, ...] for j in range(n)]  # arrays, as the coefficients of the terms
        squares, still_squares = np.zeros(n), (still**2 * self._size[lo : lo + n]).tolist()
        for columns in self._blocks:
            squares += self._sweep(D, columns, noise, g, still_squares, lo, base)
        self.base, self._moved_from, self._moved_to = base, lo, lo + n
        if self._whole:
            last, squares[1:] = squares[-1], sums_of_squares(self._dX[1:n, 0])  # the first node does not move
            squares[-1] = last if math.isnan(last) else squares[-1]
        moved = squares if self._whole else _inner(self._dX[:n], self._dX[:n])
        self._moved[lo : lo + n] = moved / self._dX[0].size
        move = np.sqrt(squares / size)
        if size <= _WHOLE:  # small: all of them in one call
            X = self.X[lo - base : lo - base + n]
            self._size[lo : lo + n] = sums_of_squares(X) / size
            return move
        for j in np.flatnonzero(~(move <= _CHANGED * np.sqrt(self._size[lo : lo + n]))).tolist():
            self._measure(lo + j, self.X[lo + j - base])
        return move

    def _sweep(
        self,
        D: Array,
        columns: slice,
        noise: list[Array | None],
        slope: list[Array],
        still: list[float],
        lo: int,
        base: int,
    ) -> Float64:
        """One block of :meth:`move`: sums of squares of the moves, (n,); where moves are kept, only those needed here.

        Args:
            D: (n, size).
            columns: the block.
            noise: (size,) of each step.
            slope: n.
            still: n, mean squares of moves that leave the output as it is.
            lo: the window's first node.
            base: the node that the first row of the buffers is to belong to.
        """
        X, M, D = list(self.X[:, columns]), list(self.M[:, columns]), list(D[:, columns])
        kept = self._dX[:, columns.start // _PERIOD : columns.stop // _PERIOD] if not self._whole else self._dX
        moves = list(self._dX[:, 0, columns]) if self._whole else None
        n, first, shift, memory = len(D), lo - base, base - self.base, self._recurrence.memory
        new, work = (scratch[: len(D[0])] for scratch in self._pair)
        for row in range(first + 1 if shift else 0):
            X[row][...], M[row][...] = X[row + shift], M[row + shift]
        M[first][...] = D[0]
        kept[0].fill(0.0)
        squares, low = [0.0, *[math.inf] * (n - 1)], lowest(len(new), new.dtype)
        for j in range(1, n):
            at = first + j
            back = range(at - 1, max(at - 1 - memory, -1), -1)
            x, dx = X[at] if shift else new, moves[j] if moves else work
            z = noise[j - 1]
            z = None if z is None else z[columns]
            combine(self._terms.of_step(lo + j - 1, [X[i] for i in back], [M[i] for i in back], z), x, work)
            np.subtract(x, X[at + shift], out=dx)
            if not shift:
                X[at][...] = new
            if still[j] or not moves:
                squares[j] = np.dot(dx, dx)
                if squares[j] < low:
                    squares[j] = float(sums_of_squares(dx))
            if squares[j] <= still[j] * len(dx):
                M[at][...] = D[j]
            else:
                np.multiply(dx, slope[j], out=M[at])
                np.add(M[at], D[j], out=M[at])
            if not moves:
                kept[j] = self._sampled(dx)
        if not math.isfinite(np.dot(M[first + n - 1], M[first + n - 1])):
            squares[n - 1] = math.nan  # the last output has moved no state yet
        return np.asarray(squares, dtype=np.float64)

    def fill(self, first: int, hi: int, xs: list[Array], ms: list[Array], constant: list[tuple[float, Array]]) -> None:
        """States and outputs of the nodes ``first .. hi - 1`` with the held quantity constant.

        Args:
            first, hi: the nodes.
            xs, ms: states and outputs at ``first - 1, first - 2, ...``, each (size,).
            constant: what the held quantity is made of.
        """
        memory, size = self._recurrence.memory, len(xs[0])
        noise = [self._noise(i - 1) for i in range(first, hi)]
        self._size[first:hi] = 0.0
        for columns in self._blocks:
            held, work = (scratch[: columns.stop - columns.start] for scratch in self._pair)
            combine([(c, row[columns]) for c, row in constant], held, work)
            X, M = self.X[self.rows(first, hi), columns], self.M[self.rows(first, hi), columns]
            past = [row[columns] for row in xs], [row[columns] for row in ms]
            for i, x, m, z in zip(range(first, hi), X, M, noise, strict=True):
                combine(self._terms.of_step(i - 1, *past, None if z is None else z[columns]), x, work)
                combine(self._terms.of_belief(i, held, x), m, work)
                if size > _WHOLE:  # else all of them in one call
                    self._size[i] += float(sums_of_squares(x)) / size
                past = [x, *past[0]][:memory], [m, *past[1]][:memory]
        if size <= _WHOLE:
            self._size[first:hi] = sums_of_squares(self.X[self.rows(first, hi)]) / size

    def last_move(self, i: int) -> Array:
        """``dX_i``, (size,), of a node; 0 where no round has moved it, as after outputs that were not finite."""
        if not self._moved_from <= i < self._moved_to:
            return np.zeros_like(self.X[0])
        return np.reshape(self._dX[i - self._moved_from], (-1,))

    def _measure(self, i: int, row: Array) -> None:
        self._size[i] = float(sums_of_squares(row)) / row.size

    def _sampled(self, rows: Array) -> Array:
        """A view (..., stripes, length) of the elements that stand for all of (..., size): equally spaced stripes."""
        if self._whole:
            return rows[..., None, :]
        count = rows.shape[-1] // _PERIOD
        stripes = np.reshape(rows[..., : count * _PERIOD], (*rows.shape[:-1], count, _PERIOD))
        return stripes[..., :_STRIPE]


def _inner(a: Array, b: Array) -> Float64:
    """Inner products of rows (n, stripes, length), (n,)."""
    return np.vecdot(a, b).sum(axis=1, dtype=np.float64)


def leading_sums(compared: Float64, count: int) -> Float64:
    """What :meth:`SweepCorrection.compare` would have found for the first ``count`` nodes alone."""
    return np.reshape(np.reshape(compared, (2, -1))[:, :count], (-1,))
