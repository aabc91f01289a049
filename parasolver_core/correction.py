"""One round's correction: a quasi-Newton step for the whole window.

The window's equations are ``L X - B D(X) = rhs``. With the network's Jacobian replaced by the slopes ``G``, the defect
``r = D(X) - M`` (what the network says, less what was believed) moves the states by ``dX = T r`` with
``T = (L - B G)^{-1} B``. As L and B are banded, this is a recurrence from node to node,

    dx_{i+1} = sum_k (a[i, k] + b[i, k] g_{i-k}) dx_{i-k} + sum_k b[i, k] r_{i-k} ,

which may be run once on the unit vectors, giving the matrix T (:class:`MatrixCorrection`), or on the defects themselves
(:class:`SweepCorrection`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from parasolver_core.arrays import Array, assign, increment, to_host
from parasolver_core.recurrence import Recurrence

Float64 = NDArray[np.float64]

_BLOCK = 2**15  # elements of a state worked on at a time: the rows at hand then stay in a core's own cache
_SMALL = 2**11  # states of fewer elements cost calls and not arithmetic: the matrix needs fewer
_SAMPLED = 2**14  # a state of so many elements is known well enough by a quarter of them,
_STRIPE, _PERIOD = 256, 1024  # the first 256 of every 1024


def coefficients(recurrence: Recurrence, slope: Float64, lo: int) -> tuple[Float64, Float64]:
    """What a step multiplies earlier moves and earlier defects with: ``a + b g`` and ``b``, (n, P) and (n, Q).

    Args:
        recurrence: the sampler.
        slope: (n,), slopes of the nodes ``lo .. lo + n - 1``; all before them have not moved.
        lo: first node of the window.
    """
    n = len(slope)
    a, b = recurrence.a[lo : lo + n], recurrence.b[lo : lo + n]
    c = np.zeros((n, recurrence.memory))
    c[:, : a.shape[1]] = a
    for k in range(min(b.shape[1], n)):
        c[k:, k] += b[k:, k] * slope[: n - k]
    return c, b


def propagation(recurrence: Recurrence, slope: Float64, lo: int) -> Float64:
    """``T``, how defects spread over a window: (n, n), row i is the move of node ``lo + i`` for unit defects.

    The first row is 0: the window's first state is final. Arguments as in :func:`coefficients`.
    """
    c, b = (table.tolist() for table in coefficients(recurrence, slope, lo))
    T = np.zeros((len(slope), len(slope)))
    for i in range(len(slope) - 1):
        row = T[i + 1]
        np.multiply(T[i], c[i][0], out=row)
        for k in range(1, min(len(c[i]), i + 1)):
            row += T[i - k] * c[i][k]
        for k in range(min(len(b[i]), i + 1)):
            row[i - k] += b[i][k]
    return T


@dataclass(frozen=True)
class Moments:
    """Inner products of one sample's window, on the host; n nodes.

    Args:
        gram: (n, n), ``<r_i, r_j>`` of the defects.
        cross: (n,), ``<dX_i, r_i>`` with the last move of each node's input.
        moved: (n,), ``<dX_i, dX_i>``.
        size: (n,), ``<X_i, X_i>``.
    """

    gram: Float64
    cross: Float64
    moved: Float64
    size: Float64

    def norms(self, T: Float64) -> Float64:
        """``||T r||`` of each row of T, (rows, n): how far defects move a state, known before it is moved."""
        return np.sqrt(np.maximum(((T @ self.gram) * T).sum(axis=1), 0.0))

    @classmethod
    def unpack(cls, packed: Float64, n: int) -> Moments:
        """From the vector of :func:`inner_products`, brought to the host."""
        gram, cross, moved, size = np.split(packed, [n * n, n * n + n, n * n + 2 * n])
        return cls(gram.reshape(n, n), cross, moved, size)


def inner_products(xp: Any, X: Array, dX: Array, r: Array) -> Array:
    """The vector that :meth:`Moments.unpack` takes apart, from states, last moves and defects, each (n, size)."""
    gram = xp.reshape(xp.matmul(r, r.T), (-1,))
    dot = xp.linalg.vecdot  # for PyTorch many times as fast as xp.vecdot, a batch of matrix products
    return xp.concat([gram, dot(dX, r), dot(dX, dX), dot(X, X)])


def fetch(xp: Any, packed: list[Array]) -> list[Float64]:
    """Bring the inner products of all samples, a vector each, to the host: those on a device in one transfer."""
    away = [one for one in packed if not isinstance(one, np.ndarray)]
    if away:
        host = to_host(away[0] if len(away) == 1 else xp.concat(away))
        parts = iter(np.split(host, np.cumsum([one.shape[0] for one in away])[:-1]))
        packed = [one if isinstance(one, np.ndarray) else next(parts) for one in packed]
    return [one.astype(np.float64) for one in packed]


@dataclass(frozen=True)
class Told:
    """What a round's outputs tell before anything is moved, mean squares and products over a state's elements; (n,).

    Args:
        cross: ``dX_i r_i``, of the last move of each node's input and its defect.
        moved: ``dX_i^2``.
        size: ``X_i^2``.
    """

    cross: Float64
    moved: Float64
    size: Float64


class Correction(ABC):
    """A window's states, believed outputs and last moves, and how a round moves them.

    The rows of each buffer belong to consecutive nodes, the first to node ``base``: those of the window, those before
    it that the recurrence reads, and room for a few to come, so that sliding is a matter of an offset.

    Args:
        xp: array namespace.
        recurrence: the sampler.
        width: the most nodes of the window.
        start: gives size, dtype and device, (size,); the state of node 0.
    """

    def __init__(self, xp: Any, recurrence: Recurrence, width: int, start: Array) -> None:
        self._xp, self._recurrence, self.base = xp, recurrence, 0
        rows = min(width + max(width // 4, 1), len(recurrence)) + recurrence.memory - 1
        self.X, self.M, self.dX = (
            xp.zeros((rows, start.shape[0]), dtype=start.dtype, device=device(start)) for _ in range(3)
        )
        self.X = assign(self.X, (0, slice(None)), start)

    @staticmethod
    def choose(xp: Any, recurrence: Recurrence, width: int, start: Array) -> Correction:
        """The kind that is faster: :class:`SweepCorrection` for NumPy arrays unless they are small."""
        sweep = isinstance(start, np.ndarray) and start.shape[0] >= _SMALL
        return (SweepCorrection if sweep else MatrixCorrection)(xp, recurrence, width, start)

    def rows(self, lo: int, hi: int) -> slice:
        """Where the nodes ``lo .. hi - 1`` are."""
        return slice(lo - self.base, hi - self.base)

    @abstractmethod
    def compare(self, D: Array, lo: int) -> Array:
        """A vector for :meth:`tell`: how the outputs D, (n, size), of the nodes from ``lo`` compare with belief."""

    @abstractmethod
    def tell(self, compared: Float64, n: int) -> Told:
        """What :meth:`compare` found, brought to the host."""

    @abstractmethod
    def move(self, D: Array, compared: Float64, slope: Float64, lo: int) -> tuple[Float64, Float64]:
        """``dX = T r``; ``X += dX``; ``M = D + g dX``.

        Args:
            D, compared, lo: as before.
            slope: (n,).

        Returns:
            RMS of the moves and of the defects, (n,). Where a defect is not finite, later rows are not to be used.
        """

    def make_room(self, first: int, first_new: int, hi: int) -> None:
        """Room for nodes up to ``hi - 1``, keeping ``first .. first_new - 1``."""
        if hi - self.base <= self.X.shape[0]:
            return
        rows, front = self.rows(first, first_new), slice(0, first_new - first)
        self.X, self.M, self.dX = (
            assign(buffer, (front, slice(None)), self._xp.asarray(buffer[rows, :], copy=True))
            for buffer in (self.X, self.M, self.dX)
        )
        self.base = first


    def fill(self, first: int, states: Float64, outputs: Float64, sources: list[Array]) -> None:
        """Set the states and outputs from node ``first`` on to combinations of the sources, each (size,).

        Args:
            first: the first node.
            states, outputs: weights, (count, sources).
            sources: arrays.
        """
        at = (self.rows(first, first + len(states)), slice(None))
        stacked = self._xp.stack(sources)
        for name, weights in (("X", states), ("M", outputs)):
            table = self._xp.asarray(weights, dtype=stacked.dtype, device=device(stacked))
            setattr(self, name, assign(getattr(self, name), at, self._xp.matmul(table, stacked)))


class MatrixCorrection(Correction):
    """By the matrix T: few calls, so that small states and accelerators lose no time.

    The sizes of all moves follow from the inner products of the defects, so that everything that the host decides in a
    round is known before anything has moved: a round waits for the device once.
    """

    def compare(self, D: Array, lo: int) -> Array:
        at = (self.rows(lo, lo + D.shape[0]), slice(None))
        r = self._xp.astype(D, self.X.dtype, copy=False) - self.M[at]
        self.M = assign(self.M, at, r)  # the defect in the place of belief, until that is known
        return inner_products(self._xp, self.X[at], self.dX[at], r)

    def tell(self, compared: Float64, n: int) -> Told:
        cross, moved, size = np.reshape(compared[n * n :], (3, n)) / self.X.shape[1]
        return Told(cross, moved, size)

    def move(self, D: Array, compared: Float64, slope: Float64, lo: int) -> tuple[Float64, Float64]:
        n, size = D.shape
        moments = Moments.unpack(compared, n)
        defects = np.sqrt(np.diag(moments.gram) / size)
        if not np.all(np.isfinite(defects)):
            return np.full(n, np.nan), defects
        T = propagation(self._recurrence, slope, lo)
        like = {"dtype": self.X.dtype, "device": device(self.X)}
        at = (self.rows(lo, lo + n), slice(None))
        dX = self._xp.matmul(self._xp.asarray(T, **like), self.M[at])
        self.X, self.dX = increment(self.X, at, dX), assign(self.dX, at, dX)
        dX *= self._xp.asarray(slope[:, None], **like)  # our own array by now: no further one is made
        dX += self._xp.astype(D, self.X.dtype, copy=False)
        self.M = assign(self.M, at, dX)
        return moments.norms(T) / np.sqrt(size), defects


class SweepCorrection(Correction):
    """By the recurrence, node by node, a block of elements at a time: for large states in NumPy arrays.

    Its arithmetic does not grow with the window, and each row is brought into the cache once.
    """

    def compare(self, D: Array, lo: int) -> Array:
        """Over a share of the elements, if there are many: slopes and sizes are one number for a whole node."""
        n = D.shape[0]
        at = self.rows(lo, lo + n)
        parts = [_sample(rows) for rows in (D, self.X[at], self.M[at], self.dX[at])]
        sums, together = np.empty((3, n)), max(_BLOCK // parts[0][0].size, 1)
        for j in range(0, n, together):
            rows = slice(j, j + together)
            d, x, m, dx = (part[rows] for part in parts)
            r = np.subtract(d, m, dtype=x.dtype)
            for found, pair in zip(sums[:, rows], ((dx, r), (dx, dx), (x, x)), strict=True):
                np.sum(self._xp.linalg.vecdot(*pair), axis=1, dtype=np.float64, out=found)
        sums /= parts[0][0].size
        first = self.X[at.start]  # a final state: that it is finite must be certain
        sums[2, 0] = np.dot(first, first) / first.size
        return np.reshape(sums, (-1,))

    def tell(self, compared: Float64, n: int) -> Told:
        cross, moved, size = np.reshape(compared, (3, n))
        return Told(cross, moved, size)

    def move(self, D: Array, compared: Float64, slope: Float64, lo: int) -> tuple[Float64, Float64]:
        n, size = D.shape
        c, b = coefficients(self._recurrence, slope, lo)
        sums = np.zeros((2, n))
        # rows are written where the window's first row, and those that steps read before it, come to lie in front
        base = max(lo - self._recurrence.memory + 1, self.base)
        before, after = lo - self.base, lo - base
        for columns in _blocks(size):
            X, M, dX = (buffer[:, columns] for buffer in (self.X, self.M, self.dX))
            if base > self.base:
                for buffer in (X, M):
                    for row in range(after):
                        buffer[row] = buffer[row + base - self.base]
            sums += _sweep(X, M, dX, D[:, columns], before, after, c.tolist(), b.tolist(), slope.tolist())
        self.base = base
        move, defects = np.sqrt(sums / size)
        return move, defects


def _sweep(
    X: Array,
    M: Array,
    dX: Array,
    D: Array,
    before: int,
    after: int,
    c: list[list[float]],
    b: list[list[float]],
    slope: list[float],
) -> Float64:
    """One block of :meth:`SweepCorrection.move`: sums of squares of moves and defects, (2, n).

    Args:
        X, M, dX: (rows, block), the buffers.
        D: (n, block).
        before, after: row of the window's first node in the buffers, as they are and as they are to be.
        c, b: of :func:`coefficients`.
        slope: n.
    """
    kept = len(b[0])
    defects = [np.empty(X.shape[1], dtype=X.dtype) for _ in range(kept + 1)]  # of the last nodes, and work space
    work = defects.pop()
    sums = np.zeros((2, len(slope)))
    for j, (d, x, m, x_new, m_new, dx) in enumerate(
        zip(D, X[before:], M[before:], X[after:], M[after:], dX[after:], strict=False)
    ):
        if j == 0:
            dx.fill(0.0)
        else:
            np.multiply(dX[after + j - 1], c[j - 1][0], out=dx)
            for k in range(1, min(len(c[0]), j)):
                np.multiply(dX[after + j - 1 - k], c[j - 1][k], out=work)
                dx += work
            for k in range(min(kept, j)):
                np.multiply(defects[(j - 1 - k) % kept], b[j - 1][k], out=work)
                dx += work
        r = defects[j % kept]
        np.subtract(d, m, out=r)
        np.add(x, dx, out=x_new)
        np.multiply(dx, slope[j], out=m_new)
        m_new += d
        sums[0, j], sums[1, j] = np.dot(dx, dx), np.dot(r, r)
    return sums


def _sample(rows: Array) -> Array:
    """A view (n, stripes, length) of the elements that stand for all."""
    n, size = rows.shape
    if size < _SAMPLED:
        return rows[:, None, :]
    periods = size // _PERIOD
    return np.reshape(rows[:, : periods * _PERIOD], (n, periods, _PERIOD))[:, :, :_STRIPE]


def _blocks(size: int) -> Iterator[slice]:
    count = -(-size // _BLOCK)
    return (slice(start, stop) for start, stop in pairwise([size * i // count for i in range(count + 1)]))
