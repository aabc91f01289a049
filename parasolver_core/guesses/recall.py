"""A memory of finished samples at work: it fills in the nodes of those that run, as long as it is right about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from parasolver_core.arrays import Array, matmul, take_rows
from parasolver_core.guesses.fill import Behind, Entering, Fill, Slopes
from parasolver_core.guesses.forecast import Forecast
from parasolver_core.guesses.memory import Memory
from parasolver_core.samplers.held_form import Float64, HeldForm, Indices

_UNEXPLAINED = 0.5  # of the squares of predictions: with a larger share the memory is of another network


class Recall:
    """What a memory says of B samples.

    Args:
        memory: of finished samples.
        start: (B, size), states; arrays are made like it.
    """

    def __init__(self, memory: Memory, start: Array) -> None:
        self._memory, count = memory, start.shape[0]
        xp: Any = array_namespace(start)
        self._xp, self._dtype, self._device = xp, start.dtype, device(start)
        self._states, self._predictions, self._directions = (
            self._put(table) for table in (memory.states, memory.predictions, memory.directions)
        )
        self._seen = np.zeros(count, dtype=np.int64)  # nodes before it have been compared with what was expected
        self._defects, self._squares = np.zeros((2, count))
        self._trusted = np.ones(count, dtype=bool)

    def first(self, x: Array) -> Array:
        """The prediction at node 0, (B, size), for its states."""
        samples, node = np.arange(x.shape[0]), np.zeros(x.shape[0], dtype=np.int64)
        return self._expected(samples, node, node[:, None], x, x, known=np.zeros(len(node), dtype=bool))[:, 0, :]

    def behind(self, samples: Indices, last: Indices, count: int, x: Array, h: Array) -> Array:
        """The predictions at the ``count`` nodes behind node ``last`` of these samples, (B, count, size).

        Args:
            samples, last: (B,).
            count: how many; those beyond N have no meaning.
            x, h: (B, size), the states and predictions of the nodes ``last``.
        """
        nodes = np.minimum(last[:, None] + np.arange(1, count + 1), len(self._memory.held) - 1)
        return self._expected(samples, last, nodes, x, h, known=self._seen[samples] > 0)

    def right(self, samples: Indices, lo: Indices, defects: Float64, n: Indices) -> NDArray[np.bool_]:
        """Whether it goes on being asked, (B,), after a round.

        Args:
            samples, lo, n: (B,), first nodes and lengths of the windows.
            defects: (B, longest), sums of squares.
        """
        node = lo[:, None] + np.arange(defects.shape[1])
        new = (node >= self._seen[samples, None]) & (node < (lo + n)[:, None])
        squares = self._memory.squares[np.minimum(node, len(self._memory.squares) - 1)]
        self._defects[samples] += np.where(new, defects, 0.0).sum(axis=1)
        self._squares[samples] += np.where(new, squares, 0.0).sum(axis=1)
        self._seen[samples] = np.maximum(self._seen[samples], lo + n)
        self._trusted[samples] &= ~(self._defects[samples] > _UNEXPLAINED * self._squares[samples])
        return self._trusted[samples]

    def _expected(
        self, samples: Indices, last: Indices, nodes: Indices, x: Array, h: Array, known: NDArray[np.bool_]
    ) -> Array:
        """Predictions at ``nodes``, (B, count), from the states and predictions at ``last``."""
        slopes = np.zeros((2, *nodes.shape, len(self._memory.directions) + 1))
        at, found = nodes.copy(), {}  # found: many samples are at the same node
        for row, (sample, node) in enumerate(zip(samples.tolist(), last.tolist(), strict=True)):
            if self._trusted[sample]:
                key = node, bool(known[row])
                found[key] = found[key] if key in found else self._memory.slopes(node, nodes[row], key[1])
                slopes[:, row] = found[key]
            else:  # the prediction stays
                slopes[1, row], at[row] = 1.0, node
        dx, dh = x - take_rows(self._states, last), h - take_rows(self._predictions, last)
        rest = self._put(slopes[..., -1:])
        along = self._put(slopes[..., :-1] - slopes[..., -1:])
        V = self._xp.matrix_transpose(self._directions)
        parts = [along[k, ...] * matmul(self._xp, move, V)[:, None, :] for k, move in enumerate((dx, dh))]
        expected = self._xp.reshape(take_rows(self._predictions, at.reshape(-1)), (*at.shape, x.shape[1]))
        expected = expected + rest[0, ...] * dx[:, None, :] + rest[1, ...] * dh[:, None, :]
        return expected + matmul(self._xp, parts[0] + parts[1], self._directions)

    def _put(self, values: Float64) -> Array:
        return self._xp.asarray(values, dtype=self._dtype, device=self._device)


class Recalled(Fill):
    """Nodes of many samples, filled in with what a memory expects."""

    def __init__(self, form: HeldForm, recall: Recall, blind: int) -> None:
        super().__init__(form)
        self._recall, self._blind = recall, blind

    def first(self, x: Array, slope: Float64) -> Array:
        return self._recall.first(x)

    def entering(self, last: Indices, count: int, slopes: Slopes) -> Entering:
        base = self._form.base

        def expected(ahead: int, i: Indices, x: Float64) -> Float64:
            return np.eye(1, x.shape[1], base + ahead)

        return self._march(last, count, count, expected)

    def rows(self, samples: Indices, last: Indices, count: int, behind: Behind) -> Array:
        return self._recall.behind(samples, last, count, *behind())

    def usable(self, samples: Indices, lo: Indices, defects: Float64, n: Indices) -> Indices:
        right = self._recall.right(samples, lo, defects, n)
        return np.where(right | (lo > 0), n, np.minimum(n, self._blind))


class RecalledAlone(Forecast):
    """The same for one sample.

    Args:
        held: (N, 2), as in :class:`~parasolver_core.samplers.recurrence.Recurrence`.
        recall: of the batch.
        sample: its row there.
        blind: how many leading nodes do without.
    """

    def __init__(self, held: Float64, recall: Recall, sample: int, blind: int) -> None:
        self._held, self._recall, self._sample, self._blind = held, recall, np.array([sample]), blind

    def __call__(self, i: int, x: Array, slope: float) -> Array:
        return _Ahead(self._held, 0, self._recall.first(x[None, :]))(i, x, slope)

    def behind(self, last: int, count: int, x: Array, m: Array) -> Forecast:
        p, q = self._held[last].tolist()
        h = x * p + m * q
        rows = self._recall.behind(self._sample, np.array([last]), count, x[None, :], h[None, :])
        return _Ahead(self._held, last + 1, rows[0, ...])

    def usable(self, lo: int, defects: Float64) -> int:
        n = len(defects)
        squares = (defects * self._held[lo : lo + n, 1] ** 2)[None, :]
        right = self._recall.right(self._sample, np.array([lo]), squares, np.array([n]))
        return n if right[0] or lo > 0 else min(n, self._blind)


@dataclass(frozen=True)
class _Ahead(Forecast):
    """Known predictions, (count, size), of the nodes from ``first`` on."""

    held: Float64
    first: int
    rows: Array

    def __call__(self, i: int, x: Array, slope: float) -> Array:
        p, q = self.held[i].tolist()
        return (self.rows[min(i - self.first, self.rows.shape[0] - 1), ...] - x * p) * (1 / q)
