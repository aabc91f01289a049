"""The states and beliefs of many windows, and the few products that move them: what is done on the device.

A round is, for all samples at once,

    r = D(X) - M ,    X += T r ,    M = D(X_old) + G T r ,

in terms of the held quantity, of which beliefs are kept: ``r = p X + q D - H``, and then ``H = p X + q D``. New nodes
are linear in what is known, so they are rows of the same product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from parasolver_core.arrays import (
    Array,
    assign,
    coarse,
    copied,
    finite_rows,
    gram,
    lengths,
    matmul,
    plus_product,
    put_index,
    take_at,
    take_rows,
    uploaded,
    uploaded_together,
    vecdot,
)
from parasolver_core.rounds.decisions import Decision, Sums, Windows
from parasolver_core.rounds.next_rows import NextRows
from parasolver_core.rounds.squares import at_least, at_most
from parasolver_core.samplers.held_form import Float64, HeldForm, Indices

Draw = Callable[[Indices, Indices, int], Array]  # (first, end, count): z of the steps, zero from the end on


class Buffers:
    """States ``X``, held quantities ``H`` and last moves ``dX`` of the windows of B samples.

    ``S`` is (B, 2 R + 1, size): R rows of states, R of held quantities, and one of zeros. Row ``past + j`` belongs to
    node ``lo + j`` of its own sample; the ``past`` rows before are what the sampler's memory reads. R fits the longest
    window; shorter ones repeat their last row.

    Args:
        form: the sampler.
        start, belief: (B, size), the states of node 0, and what is held of them.
    """

    def __init__(self, form: HeldForm, start: Array, belief: Array) -> None:
        self._xp: Any = array_namespace(start)
        self._form, self.size, self._device = form, start.shape[1], device(start)
        self.dtype = np.dtype(f"f{self._xp.finfo(start.dtype).bits // 8}")
        past = [self._xp.zeros((start.shape[0], form.past, self.size), dtype=start.dtype, device=self._device)]
        past = past if form.past else []
        x, h = start[:, None, :], belief[:, None, :]
        self._S = self._xp.concat([*past, x, *past, h, self._xp.zeros_like(x)], axis=1)
        self._dX: Array = self._xp.zeros_like(self._S[:, : form.past + 1, :])
        self._r: Array = self._xp.zeros_like(start[:, None, :])
        self._held: Array | None = None  # the weights of what is held at the nodes, once they are on the device

    @property
    def _half(self) -> int:
        return self._S.shape[1] // 2

    @property
    def first(self) -> Array:
        """(B, size), the states of the windows' first nodes; a view."""
        return self._S[:, self._form.past, :]

    def inputs(self, windows: Windows) -> Array:
        """(rows, size), the states of all nodes, sample by sample; see :meth:`inputs_are_a_view`."""
        if windows.inside.all():
            return self._xp.reshape(self._S[:, self._form.past : self._half, :], (-1, self.size))
        rows = np.arange(len(windows.n))[:, None] * self._S.shape[1] + self._form.past + np.arange(windows.longest)
        return take_rows(self._flat(), rows[windows.inside])

    def inputs_are_a_view(self, windows: Windows) -> bool:
        """Whether :meth:`inputs` may be rows of the buffer itself: where they are equally far apart."""
        return 1 in (len(windows.n), windows.longest)

    def history(self, row: int, at: int) -> tuple[list[Array], list[Array]]:
        """Of one sample, the states and held quantities at a node of its window and before it, as a step reads them."""
        place, (states, beliefs) = self._form.past + at, self._form.reads
        held = [self._S[row, self._half + place - k, :] for k in range(beliefs)]
        return [self._S[row, place - k, :] for k in range(states)], held

    def compare(self, D: Array, windows: Windows) -> Array:
        """``r``, and a vector of the sums that the host needs, for :meth:`unpack`; beliefs are then what was said.

        Args:
            D: (rows, size), the outputs.
            windows: where the windows stand.
        """
        xp, past, n, count = self._xp, self._form.past, windows.longest, len(windows.n)
        first_row = D[0, :]
        D = rectangular(D, windows.n, n)
        X, beliefs = self._S[:, past : self._half, :], (slice(None), slice(self._half + past, 2 * self._half), ...)
        held = self._put(windows.held[..., None]) if self._held is None else self._held
        said = plus_product(held[1, ...] * xp.reshape(D, (count, n, self.size)), held[0, ...], X)
        self._r = r = said - self._S[beliefs]
        self._S = assign(self._S, beliefs, said)  # not H + r, which has the rounding of what was believed
        del said  # memory
        products = xp.reshape(gram(xp, r), (count, -1))
        cross = vecdot(xp, self._dX[:, past:, :], r)
        sums = xp.reshape(xp.concat([products, cross, lengths(xp, self._S)], axis=1), (-1,))
        self._dX = None  # memory: not read any more
        return sums if self.dtype.itemsize < 8 else xp.concat([sums, coarse(xp, first_row)])

    def unpack(self, sums: Float64, windows: Windows) -> Sums:
        """What :meth:`compare` found, brought to the host."""
        unit, n, count = windows.eps, windows.longest, len(windows.n)
        if self.dtype.itemsize == 8:
            unit, sums = max(unit, float(sums[-1])), sums[:-1]
        finite, sums = bool(np.isfinite(sums).all()), sums.reshape(count, -1)
        pairs, cross = sums[:, : n * n].reshape(-1, n, n), sums[:, n * n : n * n + n]
        sizes = sums[:, n * n + n : -1].reshape(count, 2, -1)[:, :, self._form.past :]  # of X and H
        diagonal = sums[:, : n * n : n + 1]  # a view
        diagonal[...] = at_most(diagonal, self._xp, self._r)
        length = at_least(sizes[:, 0], self._xp, self._S[:, self._form.past : self._half, :])
        return Sums(pairs, cross, length, sizes[:, 1], unit, finite)

    def well(self, D: Array, windows: Windows) -> tuple[Any, Any]:
        """Of each sample, whether the state and the defect of its first node are finite, and the network's output."""
        first, xp = np.cumsum(windows.n) - windows.n, self._xp
        states = finite_rows(xp, self.first) & finite_rows(xp, self._r[:, 0, :])
        outputs = finite_rows(xp, take_rows(D, first))
        return states | (finite_rows(xp, self.first) & ~outputs), outputs

    def drop(self, inside: Any) -> None:
        """Nothing is known of nodes that are not inside, (B, n)."""
        self._r = where_known(self._r, inside)
        for first in (self._form.past, self._half + self._form.past):
            rows = slice(None), slice(first, first + inside.shape[1]), ...
            self._S = assign(self._S, rows, where_known(self._S[rows], inside))

    def made_again(self, decision: Decision, lo: Indices, draw: Draw) -> Array | None:
        """The states behind the first nodes by the recurrence itself, if they are to be made again; and their beliefs.

        A state that is moved keeps the rounding of the largest that it ever was. Beliefs follow the states as they are
        made, so that rounding grows no faster than the sampler itself lets it.

        Returns:
            (B, most + k, size), the ``most`` states behind the first nodes, and what is held at the first k of them.
        """
        form, most = self._form, int(decision.passed.max())
        if not decision.grown or most == 0:
            return None
        xp, past, half = self._xp, form.past, self._half
        slope = decision.slope.copy()
        slope[:, 0] = 0.0  # the first state stays what it is
        g = self._put(slope[..., None])
        d = self._S[:, half + past : 2 * half, :] - g * self._S[:, past:half, :]
        before = np.append(past - np.arange(form.reads[0]), half + past - 1 - np.arange(form.reads[1] - 1))
        parts = [self._rows(np.broadcast_to(before, (len(lo), len(before)))), d[:, :most, :]]
        if form.noisy:
            parts.append(draw(lo, lo + decision.passed, most))
        x = matmul(xp, self._put(form.onwards(lo, most, slope[:, :most])), xp.concat(parts, axis=1))
        inner = slice(1, min(most + 1, slope.shape[1]))
        h = plus_product(d[:, inner, :], g[:, inner, :], x[:, : inner.stop - 1, :])
        return xp.concat([x, h], axis=1)

    def moved_states(self, decision: Decision, most: int) -> Array:
        """The states behind the first ``most`` nodes as the round moves them, (B, most, size)."""
        behind = np.minimum(np.arange(1, most + 1), np.maximum(decision.accepted - 1, 0)[:, None])
        states = self._rows(self._form.past + behind)
        states += matmul(self._xp, self._put(decision.T[np.arange(len(behind))[:, None], behind]), self._r)
        return states

    def moved(self, decision: Decision, at: Indices) -> tuple[Array, Array]:
        """The states and held quantities of the windows' nodes number ``at``, (B,), as the round moves them."""
        every = np.arange(len(at))
        T = decision.T[every, at]
        moves = np.stack([T, T * decision.slope[every, at, None]], axis=1)
        rows = self._rows(np.stack([at, at + self._half], axis=1) + self._form.past)
        rows = rows + matmul(self._xp, self._put(moves), self._r)
        return rows[:, 0, :], rows[:, 1, :]

    def write(self, next_rows: NextRows, held: Float64, further: list[Array], again: Array | None = None) -> None:
        """The rows of the next windows.

        Args:
            next_rows: what they are made of.
            held: (2, B, n), the weights of what is held at their nodes.
            further: rows that new nodes are made of, (B, k, size), noise at the end.
            again: what is :meth:`made_again`.
        """
        base, source, flat, places = next_rows.base, next_rows.source, self._flat(), next_rows.again
        every = np.arange(0, flat.shape[0], self._S.shape[1])[:, None]
        at = put_index(flat, np.concatenate([(base + every).reshape(-1), (source + every).reshape(-1)]))
        bases = self._xp.reshape(take_at(flat, at[: base.size]), (*base.shape, self.size))
        if again is not None:  # else new nodes would not follow from the states before them
            assert places is not None
            bases = self._replaced(bases, again, places[1])
        sources = self._xp.concat([self._r, bases, *further], axis=1)
        self._r = bases = None  # memory, here and below
        self._S = self._xp.reshape(take_at(flat, at[base.size :]), (*source.shape, self.size))
        del flat
        tables = [next_rows.C, held[..., None].astype(self.dtype, copy=False)]
        C, self._held = uploaded_together(self._xp, tables, self._device)
        moves = matmul(self._xp, C, sources)  # everything that is computed
        del sources
        self._S += moves
        self._dX = moves[:, : self._half, :]
        if again is not None:
            assert places is not None
            self._S = self._replaced(self._S, again, places[0])

    def _replaced(self, rows: Array, by: Array, place: Indices) -> Array:
        """Rows (B, k, size); where a place is not -1, those at that place of ``by``, (B, most, size)."""
        xp, (batch, count), most = self._xp, place.shape, by.shape[1]
        index = np.arange(batch)[:, None] * most + np.maximum(place, 0)
        other = xp.reshape(take_rows(xp.reshape(by, (-1, self.size)), index.reshape(-1)), (batch, count, -1))
        return xp.where(uploaded(xp, (place >= 0)[..., None], self._device), other, rows)

    def stay(self, rows: Indices) -> None:
        """Only these samples go on."""
        self._held = None
        self._S, self._dX = take_rows(self._S, rows), take_rows(self._dX, rows)

    def first_copy(self) -> Array:
        """:attr:`first` in memory of its own."""
        return copied(self._xp, self.first)

    def _flat(self) -> Array:
        return self._xp.reshape(self._S, (-1, self.size))

    def _rows(self, rows: Indices) -> Array:
        """Rows (B, k) of each sample's own, (B, k, size)."""
        at = np.arange(len(rows))[:, None] * self._S.shape[1] + rows
        return self._xp.reshape(take_rows(self._flat(), at.reshape(-1)), (*rows.shape, self.size))

    def _put(self, table: NDArray[Any]) -> Array:
        """A host table as an array of the states' kind; the cast is the host's."""
        return uploaded(self._xp, table.astype(self.dtype, copy=False), self._device)


def where_known(rows: Array, known: NDArray[np.bool_]) -> Array:
    """Rows (B, k, size), and 0 where nothing is known, (B, k): in a product 0 times NaN would be NaN."""
    xp: Any = array_namespace(rows)
    return xp.where(uploaded(xp, known[..., None], device(rows)), rows, xp.zeros_like(rows))


def rectangular(rows: Array, counts: Indices, longest: int) -> Array:
    """``counts`` (B,) rows of each sample, as ``longest`` of each: shorter lists repeat their last."""
    if rows.shape[0] == len(counts) * longest:
        return rows
    first = np.cumsum(counts) - counts
    return take_rows(rows, (first[:, None] + np.minimum(np.arange(longest), counts[:, None] - 1)).reshape(-1))
