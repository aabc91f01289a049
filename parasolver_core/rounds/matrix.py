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
    matmul,
    put_index,
    take_at,
    take_rows,
    uploaded,
    vecdot,
)
from parasolver_core.rounds.decisions import Decision, Sums, Windows
from parasolver_core.rounds.fill import Entering
from parasolver_core.rounds.squares import at_most, largest
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
        self._dtype = np.dtype(f"f{self._xp.finfo(start.dtype).bits // 8}")
        past = [self._xp.zeros((start.shape[0], form.past, self.size), dtype=start.dtype, device=self._device)]
        past = past if form.past else []
        x, h = start[:, None, :], belief[:, None, :]
        self._S = self._xp.concat([*past, x, *past, h, self._xp.zeros_like(x)], axis=1)
        self._dX: Array = self._xp.zeros_like(self._S[:, : form.past + 1, :])
        self._r: Array = self._xp.zeros_like(start[:, None, :])

    @property
    def _half(self) -> int:
        return self._S.shape[1] // 2

    @property
    def first(self) -> Array:
        """(B, size), the states of the windows' first nodes; a view."""
        return self._S[:, self._form.past, :]

    def inputs(self, windows: Windows) -> Array:
        """(rows, size), the states of all nodes, sample by sample."""
        rows = np.arange(len(windows.n))[:, None] * self._S.shape[1] + self._form.past + np.arange(windows.longest)
        return take_rows(self._flat(), rows[windows.inside])

    def history(self, row: int, at: int) -> tuple[list[Array], list[Array]]:
        """Of one sample, the states and held quantities at a node of its window and before it, as a step reads them."""
        place, (states, beliefs) = self._form.past + at, self._form.reads
        held = [self._S[row, self._half + place - k, :] for k in range(beliefs)]
        return [self._S[row, place - k, :] for k in range(states)], held

    def compare(self, D: Array, windows: Windows, with_size: bool) -> Array:
        """``r``, and a vector of the sums that the host needs, for :meth:`unpack`; beliefs are then what was said.

        Args:
            D: (rows, size), the outputs.
            windows: where the windows stand.
            with_size: whether the size of the last node's prediction is asked for.
        """
        xp, past, n, count = self._xp, self._form.past, windows.longest, len(windows.n)
        first_row = D[0, :]
        D = rectangular(D, windows.n, n)
        X, H = self._S[:, past : self._half, :], self._S[:, self._half + past : 2 * self._half, :]
        held = self._put(np.moveaxis(self._form.held[windows.nodes], 2, 0)[..., None])
        said = held[1, ...] * xp.reshape(D, (count, n, self.size))
        said += held[0, ...] * X
        self._r = r = said - H
        gram = xp.reshape(matmul(xp, r, xp.matrix_transpose(r)), (count, -1))
        pairs = [(self._dX[:, past:, :], r), (X, X)] + ([(said, said)] if with_size else [])
        sums = xp.concat([gram, largest(xp, r), *(vecdot(xp, *pair) for pair in pairs)], axis=1)
        sums = xp.reshape(sums, (-1,))
        # not H + r, which has the rounding of what was believed
        self._S = assign(self._S, (slice(None), slice(self._half + past, 2 * self._half), ...), said)
        return sums if self._dtype.itemsize < 8 else xp.concat([sums, coarse(xp, first_row)])

    def unpack(self, sums: Float64, windows: Windows) -> Sums:
        """What :meth:`compare` found, brought to the host."""
        unit, n, count = windows.eps, windows.longest, len(windows.n)
        if self._dtype.itemsize == 8:
            unit, sums = max(unit, float(sums[-1])), sums[:-1]
        finite, sums = bool(np.all(np.isfinite(sums))), sums.reshape(count, -1)
        gram, rest = sums[:, : n * n].reshape(-1, n, n), sums[:, n * n :].reshape(count, -1, n)
        own = np.einsum("bii->bi", gram)  # a view
        own[...] = at_most(own, rest[:, 0], self.size, self._dtype)
        predicted = np.full(count, np.inf)
        if rest.shape[1] > 3:
            predicted = rest[:, 3][np.arange(count), windows.n - 1]
        return Sums(gram, rest[:, 1], rest[:, 2], predicted, unit, finite)

    def well(self, D: Array, windows: Windows) -> tuple[Any, Any]:
        """Of each sample, whether the state and the defect of its first node are finite, and the network's output."""
        first, xp = np.cumsum(windows.n) - windows.n, self._xp
        states = finite_rows(xp, self.first) & finite_rows(xp, self._r[:, 0, :])
        outputs = finite_rows(xp, take_rows(D, first))
        return states | (finite_rows(xp, self.first) & ~outputs), outputs

    def drop(self, inside: Any) -> None:
        """Nothing is known of nodes that are not inside, (B, n): 0 times NaN is NaN."""
        known = self._put(inside.astype(np.float64)[..., None]) > 0
        self._r = self._xp.where(known, self._r, self._xp.zeros_like(self._r))
        beliefs = slice(None), slice(self._half + self._form.past, 2 * self._half), ...
        said = self._S[beliefs]
        self._S = assign(self._S, beliefs, self._xp.where(known, said, self._xp.zeros_like(said)))

    def states_behind(self, decision: Decision, lo: Indices, draw: Draw) -> Array | None:
        """The states behind the first nodes, (B, most, size), by the recurrence itself, if they are to be made again.

        A state that is moved keeps the rounding of the largest that it ever was.
        """
        form, (count, n, _), most = self._form, decision.T.shape, int(decision.passed.max())
        if not decision.grown or most == 0:
            return None
        own, past, half = form.base - 1, form.past, self._half
        x_rows, h_rows = past - np.arange(form.reads[0]), half + past - 1 - np.arange(form.reads[1] - 1)
        rows = np.concatenate([x_rows, h_rows, half + past + np.arange(most)])
        table = form.onwards(lo, most)
        C = np.zeros((count, most, n + table.shape[2]))
        C[:, :, n:] = table
        moves = decision.T * decision.slope[..., None]  # of the beliefs, in terms of r
        C[:, :, :n] = table[:, :, own : own + most] @ moves[:, :most]
        parts = [self._r, self._rows(np.broadcast_to(rows, (count, len(rows))))]
        if form.noisy:
            parts.append(draw(lo, lo + decision.passed, most))
        return matmul(self._xp, self._put(C), self._xp.concat(parts, axis=1))

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

    def write(
        self,
        decision: Decision,
        windows: Windows,
        node: Indices,
        uncorrected: bool,
        entering: Entering,
        further: list[Array],
        again: Array | None = None,
    ) -> None:
        """The rows of the next windows.

        ``S = S[source] + C [r; base; further rows]``: rows that are kept move from where they are, so that the
        product's rounding is that of the move; new ones begin at zero.

        Args:
            decision: of the round.
            windows: where the windows stand now.
            node: (B, rows), the node of each row of the next windows and of what they read before.
            uncorrected: whether new nodes read the last belief as the network gave it, too.
            entering: what new nodes are made of.
            further: rows that they are made of, (B, rows, size), noise at the end.
            again: :meth:`states_behind` the first nodes, if they are made again.
        """
        last = windows.lo + decision.sound - 1
        behind = np.maximum(node - last[:, None], 0)  # how far behind the last row kept; 0: kept
        kept = self._form.past + np.minimum(node, last[:, None]) - windows.lo[:, None]
        base = self._base_rows(self._form.past + last - windows.lo, uncorrected)
        place = (last - windows.lo)[:, None] - 1 - np.arange(base.shape[1])  # of states that are made again
        made = (place >= 0) & (place < decision.passed[:, None]) & (np.arange(base.shape[1]) < self._form.reads[0])
        made &= again is not None
        C = self._table(decision, kept, behind, base, made, uncorrected, entering)
        every, flat, zero = np.arange(len(node))[:, None] * self._S.shape[1], self._flat(), 2 * self._half
        source = np.concatenate([np.where(behind > 0, zero, rows) for rows in (kept, kept + self._half)], axis=1)
        source = np.concatenate([source, np.full((len(node), 1), zero)], axis=1)
        at = put_index(flat, np.concatenate([(base + every).reshape(-1), (source + every).reshape(-1)]))
        bases = self._xp.reshape(take_at(flat, at[: base.size]), (len(node), -1, self.size))
        if again is not None:  # else new nodes would not follow from the states before them
            bases = self._replaced(bases, again, place, made)
        sources = self._xp.concat([self._r, bases, *further], axis=1)
        self._r = self._dX = bases = None  # memory, here and below
        self._S = self._xp.reshape(take_at(flat, at[base.size :]), (len(node), source.shape[1], self.size))
        del flat
        moves = matmul(self._xp, self._put(C), sources)  # everything that is computed
        self._S += moves
        self._dX = moves[:, : node.shape[1], :]
        if again is not None:
            at, half = node - windows.lo[:, None] - 1, node.shape[1]
            states = self._replaced(self._S[:, :half, :], again, at, (at >= 0) & (at < decision.passed[:, None]))
            self._S = self._xp.concat([states, self._S[:, half:, :]], axis=1)

    def _base_rows(self, end: Indices, uncorrected: bool) -> Indices:
        """Rows of the buffer that new nodes are made of, (B, base); ``end`` (B,) are those of the last nodes kept."""
        states, beliefs = self._form.reads
        rows = [end[:, None] - np.arange(states), end[:, None] - np.arange(beliefs) + self._half]
        return np.concatenate([*rows, end[:, None] + self._half] if uncorrected else rows, axis=1)

    def _table(
        self,
        decision: Decision,
        kept: Indices,
        behind: Indices,
        base: Indices,
        made: NDArray[np.bool_],
        uncorrected: bool,
        entering: Entering,
    ) -> Float64:
        """``C``, (B, 2 rows + 1, n + columns of what is entering)."""
        (count, n, _), past, half = decision.T.shape, self._form.past, self._half
        moves = np.zeros((count, 2 * half, n))  # of the present rows, in terms of r
        moves[:, past:half], moves[:, half + past :] = decision.T, decision.T * decision.slope[..., None]
        every, is_new, begins = np.arange(count)[:, None], (behind > 0)[..., None], np.maximum(behind, 1) - 1
        moves_base = np.where(made[..., None], 0.0, moves[every, base])
        if uncorrected:
            moves_base[:, -1] = 0.0
        columns = n + entering.x.shape[2]
        C = np.zeros((count, 2 * behind.shape[1] + 1, columns))
        by_part = C[:, :-1].reshape(count, 2, behind.shape[1], columns)
        for part, answer in enumerate((entering.x, entering.h)):
            new, there = answer[every, begins], moves[every, kept + part * half]
            by_part[:, part, :, n:] = np.where(is_new, new, 0.0)
            by_part[:, part, :, :n] = np.where(is_new, new[..., : base.shape[1]] @ moves_base, there)
        C[:, :-1] = by_part.reshape(count, -1, columns)
        return C

    def _replaced(self, rows: Array, by: Array, place: Indices, where: NDArray[np.bool_]) -> Array:
        """Rows (B, k, size); where asked for, those at that place of ``by``, (B, most, size)."""
        xp, (batch, count), most = self._xp, place.shape, by.shape[1]
        index = np.arange(batch)[:, None] * most + np.clip(place, 0, most - 1)
        other = xp.reshape(take_rows(xp.reshape(by, (-1, self.size)), index.reshape(-1)), (batch, count, -1))
        return xp.where(self._put(where.astype(np.float64)[..., None]) > 0, other, rows)

    def stay(self, rows: Indices) -> None:
        """Only these samples go on."""
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

    def _put(self, table: Float64) -> Array:
        """A host table as an array of the states' kind; the cast is the host's."""
        return uploaded(self._xp, table.astype(self._dtype), self._device)


def rectangular(rows: Array, counts: Indices, longest: int) -> Array:
    """``counts`` (B,) rows of each sample, as ``longest`` of each: shorter lists repeat their last."""
    if rows.shape[0] == len(counts) * longest:
        return rows
    first = np.cumsum(counts) - counts
    return take_rows(rows, (first[:, None] + np.minimum(np.arange(longest), counts[:, None] - 1)).reshape(-1))
