"""The sliding windows of many samples, moved together: a round is a dozen array operations, for any window and batch.

The host decides, the device moves. A round's inner products come to the host in one transfer; there they become small
tables, in float64, for all samples at once: slopes, ``T``, what is final, where each window goes on. One batched
product then writes every sample's next window, since all of it is linear in what is known: the states moved by ``T r``,
the beliefs ``h + (1 + G T) r``, the states behind final nodes and new nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from parasolver_core.acceptance import RoundView, shares
from parasolver_core.arrays import (
    Array,
    coarse,
    copied,
    finite_rows,
    given_back,
    host_view,
    matmul,
    put_index,
    take_at,
    take_rows,
    vecdot,
)
from parasolver_core.fill import Entering, Fill
from parasolver_core.held_form import Float64, HeldForm, Indices
from parasolver_core.noise import NoiseSource
from parasolver_core.recurrence import combine
from parasolver_core.run import Outcome, Run
from parasolver_core.solution import SampleRecord, Status
from parasolver_core.window import Plan

_ROUNDING = 8  # moves of so many units in the last place are the arithmetic's own noise
_ROOM, _ROOM_TOLERATED = (
    4.0,
    1e-4,
)  # a state may have been so many times its size, or lose such a share of the tolerance
_WILD = 1e3  # a correction so many times the state has left the surrogate's reach: fill the node in again


@dataclass(frozen=True)
class Decision:
    """What the host makes of a round, for B samples whose longest window has n nodes.

    Args:
        T: (B, n, n), moves of the states for unit defects.
        slope: (B, n), dh/dx.
        move: (B, n), relative moves.
        accepted, sound: (B,), how many leading nodes are final, and are worth keeping.
    """

    T: Float64
    slope: Float64
    move: Float64
    accepted: Indices
    sound: Indices


class WindowBatch(Run):
    """The windows of the samples that still run.

    The buffer ``S`` is (B, 2 R, size): R rows of states, then R of held quantities. Row ``past + j`` belongs to node
    ``lo + j`` of its own sample; the ``past`` rows before are what the sampler's memory reads. R fits the longest
    window; shorter ones repeat their last row.

    Args:
        plan: what all samples share.
        form: the sampler.
        fill: where nodes that enter begin.
        samples: their places in the batch.
        start: their ``x_T``, (B, size), in the working dtype.
        source: the noise.
        slope: (N,) or (B, N), slopes dm/dx to begin with; None: the linearization's.
    """

    def __init__(
        self,
        plan: Plan,
        form: HeldForm,
        fill: Fill,
        samples: Sequence[int],
        start: Array,
        source: NoiseSource,
        slope: Float64 | None = None,
    ) -> None:
        self._given_dtype, start = start.dtype, host_view(start)
        self._plan, self._form, self._fill, self._source, self._xp = plan, form, fill, source, array_namespace(start)
        count, self._size = start.shape
        self._like = {"dtype": start.dtype, "device": device(start)}
        finite = self._xp.finfo(start.dtype)
        self._eps, self._dtype = float(finite.eps), np.dtype(f"f{finite.bits // 8}")
        self._large = float(finite.max) ** 0.75  # a state's sum of squares from which on it may run out of range
        self.samples, self._places = np.asarray(samples), np.arange(count)
        self._lo, self._n = np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.int64)
        slope = plan.method.linearization.initial(plan.recurrence) if slope is None else slope
        slope = np.where(np.isfinite(slope), slope, plan.recurrence.slope)
        self._slope = np.array(np.broadcast_to(slope, (count, form.steps)))  # dm/dx
        self._moved = np.zeros((count, form.steps))  # sum of squares of each node's last move; 0: unknown
        self._least = np.zeros(
            (count, form.steps + 1)
        )  # of each state, the least that the root of its sum of squares may be
        self._largest = np.zeros((count, form.steps + 1))  # and the largest it ever was: its rounding is that one's
        self._upper, self._finite = np.zeros((count, 1)), True  # of this round: the most that states may be; all sums
        self._unit = self._eps  # rounding unit of what the network returns
        self._room = max(_ROOM, _ROOM_TOLERATED * plan.tolerance / self._eps)
        self._error = np.zeros(count)
        self._begun = False  # whether the network has been asked
        self.ended = {}
        self._kept: dict[int, list[Array]] | None = None
        if plan.keep:
            self._kept = {int(sample): [self._give(start[row, :])] for row, sample in enumerate(samples)}
        x, belief = start[:, None, :], fill.first(start, self._slope_held())[:, None, :]
        past = [self._xp.zeros((count, form.past, self._size), **self._like)] if form.past else []
        self._S = self._xp.concat([*past, x, *past, belief], axis=1)
        self._dX = self._xp.zeros_like(self._S[:, : form.past + 1, :])
        self._r = self._xp.zeros_like(x)
        opening = min(fill.opening(plan.recurrence), plan.width)
        if plan.warmup_steps == 0 and opening > 1:
            self._open(opening)

    def _open(self, width: int) -> None:
        """The first round's nodes after node 0, filled in with nothing evaluated yet."""
        count = len(self._n)
        nothing = np.zeros((count, 1, 1))
        decision = Decision(nothing, nothing[:, 0], nothing[:, 0], np.zeros(count, dtype=np.int64), self._n)
        self._write(decision, width)

    @property
    def nodes(self) -> Indices:
        """Of each row of :attr:`inputs`."""
        return self._window_nodes[self._inside]

    @property
    def owners(self) -> Indices:
        """The sample of each row of :attr:`inputs`."""
        return np.repeat(self.samples, self._n)

    @property
    def inputs(self) -> Array:
        """What the network is asked next, (rows, size): sample by sample, each sample's nodes in order."""
        rows, past = self._S.shape[1], self._form.past
        at = (np.arange(len(self._n))[:, None] * rows + past + np.arange(self._longest))[self._inside]
        return self._give(take_rows(self._xp.reshape(self._S, (-1, self._size)), at))

    def compare(self, D: Array) -> Array:
        """First half of a round: the defects of the outputs D, (rows, size), and the sums that the host needs."""
        xp, past, n, count = self._xp, self._form.past, self._longest, len(self._n)
        D = host_view(self._plan.xp.astype(D, self._given_dtype, copy=False))
        if D.shape[0] != count * n:  # windows of different lengths: repeat the last row
            first = np.cumsum(self._n) - self._n
            D = take_rows(D, (first[:, None] + np.minimum(np.arange(n), self._n[:, None] - 1)).reshape(-1))
        R = self._S.shape[1] // 2
        X, H = self._S[:, past:R, :], self._S[:, R + past :, :]
        held = self._form.held[self._window_nodes]
        both = self._put(np.moveaxis(held, 2, 0)[..., None])
        p, q = both[0, ...], both[1, ...]
        r = q * xp.reshape(D, (count, n, self._size))
        r += p * X
        r -= H
        self._r = r
        gram = xp.reshape(matmul(xp, r, xp.matrix_transpose(r)), (count, -1))
        pairs = [(self._dX[:, past:, :], r), (X, X)]
        if self._plan.recurrence.tells_size(self._lo + self._n - 1):
            pairs += [(H, H), (H, r)]  # of which the size of the predicted sample follows
        sums = xp.concat([gram, *(vecdot(xp, *pair) for pair in pairs)], axis=1)
        sums = xp.reshape(sums, (-1,))
        return sums if self._dtype.itemsize < 8 else xp.concat([sums, coarse(xp, D[0, :])])

    def correct(self, D: Array, sums: Float64) -> list[SampleRecord]:
        """Second half: update the slopes, move all states, accept what is final, slide and fill in."""
        n, past = self._longest, self._form.past
        if self._dtype.itemsize == 8:
            self._unit, sums = max(self._eps, float(sums[-1])), sums[:-1]
        sums = sums.reshape(len(self._n), -1)
        usable, failed, self._finite = self._n, {}, bool(np.all(np.isfinite(sums)))
        if not self._finite:
            sums, usable, failed = self._salvage(D, sums)
        decision, defects = self._decide(sums, usable)
        for row in failed:
            decision.accepted[row], decision.move[row], defects[row] = 0, np.nan, np.nan
        records = [
            SampleRecord(int(sample), np.arange(lo, lo + own), int(accepted), move[:own], defect[:own], float(error))
            for sample, lo, own, accepted, move, defect, error in zip(
                self.samples, self._lo, self._n, decision.accepted, decision.move, defects, self._error, strict=True
            )
        ]
        lo, ending = self._lo, self._lo + decision.accepted == self._form.steps
        squares = sums[:, n * n + n : n * n + 2 * n]
        risky = ending.any() or not squares.max() <= self._large  # a state may run out of range: keep those before
        before = copied(self._xp, self._S[:, past, :]) if risky else None
        warm = lo + decision.accepted > self._plan.warmup_steps
        self._write(decision, np.where(warm, self._plan.width, 1))
        if before is not None:
            over = np.flatnonzero(~finite_rows(self._xp, self._S[:, past, :])).tolist()
            failed |= {
                row: (Status.NONFINITE_SOLVER, int(lo[row]), before[row, :]) for row in over if row not in failed
            }
        self._leave(failed)
        return records

    @property
    def steps(self) -> Indices:
        return self._lo

    @property
    def errors(self) -> Float64:
        return self._error

    def states(self) -> Array:
        return self._give(copied(self._xp, self._S[:, self._form.past, :]))

    def kept(self, sample: int) -> Sequence[Array]:
        return () if self._kept is None else self._kept[sample]

    def estimate(self, sample: int) -> Array:
        row, form, half = self._row(sample), self._form, self._S.shape[1] // 2
        last = int(self._lo[row] + self._n[row]) - 1
        if not self._begun:
            return self._give(self._S[row, form.past, :])
        at = form.past + last - int(self._lo[row])
        xs = [self._S[row, at - k, :] for k in range(form.reads[0])]
        hs = [self._S[row, half + at - k, :] for k in range(form.reads[1])]
        for i in range(last, form.steps):  # with the last prediction held
            terms = [(float(form.a[i, k]), x) for k, x in enumerate(xs)] + [
                (float(form.b[i, k]), h) for k, h in enumerate(hs)
            ]
            if form.c[i] != 0:
                terms.append((float(form.c[i]), self._source.flat(i, sample)))
            xs, hs = [combine(terms), *xs[:-1]], [hs[0], *hs[:-1]]
        return self._give(xs[0])

    def _row(self, sample: int) -> int:
        return int(np.flatnonzero(self.samples == sample)[0])

    @property
    def _longest(self) -> int:
        """Nodes of the longest window."""
        return self._S.shape[1] // 2 - self._form.past

    @property
    def _inside(self) -> NDArray[np.bool_]:
        return np.arange(self._longest) < self._n[:, None]

    @property
    def _window_nodes(self) -> Indices:
        """(B, n); beyond N the last node."""
        return np.minimum(self._lo[:, None] + np.arange(self._longest), self._form.steps - 1)

    def _decide(self, sums: Float64, usable: Indices) -> tuple[Decision, Float64]:
        """Slopes, T and what is final, from a round's sums; also the RMS of each defect, (B, n)."""
        n, nodes, size = self._longest, self._window_nodes, self._size
        gram, cross, squares, predicted = self._unpacked(sums)
        inside = np.arange(n) < usable[:, None]
        p, q = np.moveaxis(self._form.held[nodes], 2, 0)
        old, moved = (np.take_along_axis(table, nodes, axis=1) for table in (self._slope, self._moved))
        known = inside & (moved > self._eps**2 * squares)
        # <dX, r> of the held quantity is q times that of the output
        slope = self._plan.method.linearization.update(
            old[inside], np.where(known, moved, 0.0)[inside], (cross / q)[inside]
        )
        new = old.copy()
        new[inside] = np.where(np.isfinite(slope), slope, old[inside])
        slope_held = p + q * new
        T, norms = self._form.propagation(self._lo, slope_held, gram)
        length, move = np.sqrt(squares), np.sqrt(norms)
        relative = shares(move, length)
        sound = np.maximum(_leading(inside & (relative <= _WILD)), 1)
        accepted = self._accept(relative, length / np.sqrt(size), predicted, usable, sound)
        at = np.nonzero(inside)
        self._slope[at[0], nodes[at]] = new[at]
        self._moved[at[0], nodes[at]] = np.where(np.arange(n) < sound[:, None], norms, 0.0)[at]
        self._least[at[0], nodes[at]], self._upper = np.maximum(length - move, 0.0)[at], length + move
        self._largest[at[0], nodes[at]] = np.maximum(self._largest[at[0], nodes[at]], self._upper[at])
        if not self._begun:  # all began as copies of the first
            self._largest[at[0], nodes[at]] = np.maximum(self._largest[at[0], nodes[at]], length[at[0], 0])
        self._begun = True
        defects = np.sqrt(np.einsum("bii->bi", gram) / size) / np.abs(q)
        return Decision(T, slope_held, relative, accepted, sound), defects

    def _unpacked(self, sums: Float64) -> tuple[Float64, Float64, Float64, Float64]:
        """``<r, r'>``, (B, n, n); ``<dX, r>``, ``<X, X>``, (B, n); mean square of the last node's prediction, (B,)."""
        n = self._longest
        gram, rest = sums[:, : n * n].reshape(-1, n, n), sums[:, n * n :].reshape(len(sums), -1, n)
        predicted = np.full(len(sums), np.inf)
        if rest.shape[1] > 2:  # h = H + r
            at = (np.arange(len(sums)), self._n - 1)
            predicted = (rest[:, 2][at] + 2 * rest[:, 3][at] + np.einsum("bii->bi", gram)[at]) / self._size
        return gram, rest[:, 0], rest[:, 1], predicted

    def _accept(self, move: Float64, length: Float64, predicted: Float64, usable: Indices, sound: Indices) -> Indices:
        """How many leading nodes of each sample are final."""
        plan, accepted, last = self._plan, np.ones(len(move), dtype=np.int64), (self._lo + self._n - 1).tolist()
        for row, (lo, n) in enumerate(zip(self._lo.tolist(), usable.tolist(), strict=True)):
            view = RoundView(
                lo=lo,
                move=move[row, :n],
                size=length[row, :n],
                bound=plan.bound[lo : lo + n],
                rounding=_ROUNDING * self._unit,
                smallness=plan.recurrence.smallness(last[row], float(predicted[row]))[lo : lo + n],
            )
            count, error = plan.method.acceptance.accept(view, plan.tolerance)
            accepted[row] = min(max(count, 1), sound[row])  # the first node's input was final
            self._error[row] = max(self._error[row], error)
        return accepted

    def _write(self, decision: Decision, width: int | Indices) -> None:
        """The next windows, of so many nodes.

        ``S = S[source] + C [r; base; further rows; z]``: rows that are kept move from where they are, so that the
        product's rounding is that of the move; new ones begin as copies of the last row kept.
        """
        xp, form, (count, rows, size) = self._xp, self._form, self._S.shape
        lo, last = self._lo + decision.accepted, self._lo + decision.sound - 1
        hi = np.maximum(np.minimum(lo + width, form.steps), lo + 1)
        node = np.minimum(lo[:, None] - form.past + np.arange(form.past + (hi - lo).max()), hi[:, None] - 1)
        behind = np.maximum(node - last[:, None], 0)  # how far behind the last row kept; 0: kept
        kept = form.past + np.minimum(node, last[:, None]) - self._lo[:, None]
        entering = self._fill.entering(last, max(int(behind.max()), 1), self._slope_held())
        C = self._table(decision, last, kept, behind, entering)
        every, flat = np.arange(count)[:, None] * rows, xp.reshape(self._S, (-1, size))
        again = self._made_again(decision, flat)
        self._keep_between(decision, flat, again)
        base, source = self._base_rows(last) + every, np.concatenate([kept, kept + rows // 2], axis=1) + every
        at = put_index(flat, np.concatenate([base.reshape(-1), source.reshape(-1)]))
        parts = [self._r, xp.reshape(take_at(flat, at[: base.size]), (count, -1, size))]
        parts.append(self._fill.rows(self._places, last, entering.x.shape[1]))
        if entering.noise:
            parts.append(self._draw(last, hi, entering.noise))
        sources = xp.concat([part for part in parts if part is not None], axis=1)
        self._r = self._dX = parts = None  # memory
        self._S = xp.reshape(take_at(flat, at[base.size :]), (count, source.shape[1], size))
        del flat
        moves = matmul(xp, self._put(C), sources)  # everything that is computed
        self._S += moves
        if again is not None:
            self._put_again(again, node, self._lo, np.maximum(decision.accepted, decision.sound - 1))
        self._dX, self._lo, self._n = moves[:, : kept.shape[1], :], lo, hi - lo
        at = np.nonzero(behind)
        self._least[at[0], node[at]] = self._largest[at[0], node[at]] = self._largest[at[0], last[at[0]]]
        self._keep_first(decision.accepted)

    def _base_rows(self, last: Indices) -> Indices:
        """Rows of the buffer that new nodes are made of, (B, base)."""
        half, (states, beliefs) = self._S.shape[1] // 2, self._form.reads
        end = (self._form.past + last - self._lo)[:, None]
        rows = [end - np.arange(states), end - np.arange(beliefs) + half]
        return np.concatenate([*rows, end + half] if self._fill.uncorrected else rows, axis=1)

    def _table(self, decision: Decision, last: Indices, kept: Indices, behind: Indices, entering: Entering) -> Float64:
        """``C``, (B, 2 rows, n + columns of what is entering)."""
        (count, n, _), past, half = decision.T.shape, self._form.past, self._S.shape[1] // 2
        moves = np.zeros((count, 2 * half, n))  # of the present rows, in terms of r
        moves[:, past:half], moves[:, half + past :] = decision.T, decision.T * decision.slope[..., None]
        moves[:, np.arange(half + past, 2 * half), np.arange(n)] += 1.0
        every, is_new, begins = np.arange(count)[:, None], (behind > 0)[..., None], np.maximum(behind, 1) - 1
        base = self._base_rows(last)
        moves_base = moves[every, base]
        if self._fill.uncorrected:
            moves_base[:, -1] = np.arange(n) == (last - self._lo)[:, None]
        columns, first_belief = n + entering.x.shape[2], n + self._form.reads[0]
        C = np.zeros((count, 2, behind.shape[1], columns))
        for part, (answer, source) in enumerate(((entering.x, n), (entering.h, first_belief))):
            new = answer[every, begins]
            C[:, part, :, n:] = np.where(is_new, new, 0.0)
            C[:, part, :, source] -= behind > 0  # a new row begins as a copy of the last
            C[:, part, :, :n] = np.where(
                is_new, new[..., : base.shape[1]] @ moves_base, moves[every, kept + part * half]
            )
        return C.reshape(count, -1, columns)

    def _slope_held(self) -> Float64:
        """Slopes dh/dx of all nodes, (B, N)."""
        return self._form.held[:, 0] + self._form.held[:, 1] * self._slope

    def _draw(self, last: Indices, hi: Indices, count: int) -> Array:
        """z of the steps from ``last`` to those before the new windows' last nodes, zero beyond: (B, count, size)."""
        c, wanted = np.append(self._form.c, np.zeros(count + 1)).tolist(), []
        for sample, first, end in zip(self.samples.tolist(), last.tolist(), hi.tolist(), strict=True):
            wanted += [(i, sample) if i < end and c[i] != 0 else None for i in range(first, first + count)]
        return self._xp.reshape(self._source.block(wanted), (len(last), count, self._size))

    def _made_again(self, decision: Decision, flat: Array) -> Array | None:
        """The states behind the windows' first nodes, (B, most, size), by the recurrence itself; None where not needed.

        A state that is moved keeps the rounding of the largest that it ever was.
        """
        form, count, n, ahead = (
            self._form,
            len(self._n),
            self._longest,
            np.maximum(decision.accepted, decision.sound - 1),
        )
        nodes, inside = self._window_nodes, np.arange(n) < decision.sound[:, None]
        grown = np.take_along_axis(self._largest > self._room * self._least, nodes, axis=1) & inside
        most = int(ahead.max())
        if not self._finite or most == 0 or not np.any(grown[:, 1:]):
            return None
        every, half, own = np.arange(count)[:, None], self._S.shape[1] // 2, form.base - 1
        x_rows, h_rows = form.past - np.arange(form.reads[0]), half + form.past - 1 - np.arange(form.reads[1] - 1)
        rows = every * 2 * half + np.concatenate([x_rows, h_rows, half + form.past + np.arange(most)])
        table = form.onwards(self._lo, most)
        C = np.zeros((count, most, n + table.shape[2]))
        C[:, :, n:] = table
        moves = decision.T * decision.slope[..., None] + np.eye(n)  # of the beliefs, in terms of r
        C[:, :, :n] = table[:, :, own : own + most] @ moves[:, :most]
        parts = [self._r, self._xp.reshape(take_rows(flat, rows.reshape(-1)), (count, -1, self._size))]
        if form.noisy:
            parts.append(self._draw(self._lo, self._lo + ahead, most))
        self._largest[every, nodes] = np.where(inside, self._upper, self._largest[every, nodes])
        return matmul(self._xp, self._put(C), self._xp.concat(parts, axis=1))

    def _put_again(self, states: Array, node: Indices, first: Indices, count: Indices) -> None:
        """Write states that were made again, (B, most, size), those of nodes ``first + 1 .. first + count``.

        Args:
            states: as :meth:`_made_again` gives them.
            node: (B, rows), of the rows of the buffer.
            first, count: (B,).
        """
        xp, (batch, rows), most = self._xp, node.shape, states.shape[1]
        at = node - first[:, None] - 1
        there = (at >= 0) & (at < count[:, None])
        index = np.arange(batch)[:, None] * most + np.clip(at, 0, most - 1)
        again = xp.reshape(take_rows(xp.reshape(states, (-1, self._size)), index.reshape(-1)), (batch, rows, -1))
        known = self._put(there.astype(np.float64)[..., None]) > 0
        self._S = xp.concat([xp.where(known, again, self._S[:, :rows, :]), self._S[:, rows:, :]], axis=1)

    def _keep_between(self, decision: Decision, flat: Array, final: Array | None) -> None:
        """Add the states that windows pass by to the trajectories, as they will be when the round has moved them."""
        most = int(decision.accepted.max()) - 1
        if self._kept is None or most < 1:
            return
        if final is None:
            final = self._moved_states(decision, flat, most)
        for row, (sample, count) in enumerate(zip(self.samples.tolist(), decision.accepted.tolist(), strict=True)):
            self._kept[sample] += [self._give(final[row, j, :]) for j in range(count - 1)]

    def _moved_states(self, decision: Decision, flat: Array, most: int) -> Array:
        """The states behind the first ``most`` nodes as the round moves them, (B, most, size)."""
        behind = np.minimum(np.arange(1, most + 1), np.maximum(decision.accepted - 1, 0)[:, None])  # (B, most)
        at = np.arange(len(behind))[:, None]
        rows = take_rows(flat, (at * self._S.shape[1] + self._form.past + behind).reshape(-1))
        states = self._xp.reshape(rows, (len(behind), most, -1))
        states += matmul(self._xp, self._put(decision.T[at, behind]), self._r)
        return states

    def _keep_first(self, accepted: Indices) -> None:
        """Add the states where windows now begin."""
        if self._kept is not None:
            first = copied(self._xp, self._S[:, self._form.past, :])
            for row in np.flatnonzero(accepted).tolist():
                self._kept[int(self.samples[row])].append(self._give(first[row, :]))

    def _salvage(self, D: Array, sums: Float64) -> tuple[Float64, Indices, dict[int, tuple[Status, int, Array]]]:
        """Some sums are not finite: nodes from there on are dropped, to be filled in anew.

        They were asked at states that are guesses. A sample fails where its first node, whose input is final, does.

        Returns:
            Finite sums, how many leading nodes of each sample are usable, and the samples (rows) that fail.
        """
        xp, n, past = self._xp, self._longest, self._form.past
        gram, cross, squares, _ = self._unpacked(sums)
        fine = np.isfinite(np.einsum("bii->bi", gram)) & np.isfinite(cross) & np.isfinite(squares)
        usable = np.minimum(np.maximum(_leading(fine), 1), self._n)
        inside = np.arange(n) < usable[:, None]
        states_ok = finite_rows(xp, self._S[:, past, :])
        outputs_ok = finite_rows(xp, self._r[:, 0, :]) | ~states_ok  # a defect is finite where output and belief are
        failed = {}
        for row in np.flatnonzero(~(states_ok & outputs_ok)).tolist():
            status = Status.NONFINITE_MODEL if states_ok[row] else Status.NONFINITE_SOLVER
            failed[row] = status, int(self._lo[row]), copied(xp, self._S[row, past, :])
            inside[row] = False
        at = self._put(inside.astype(np.float64)[..., None]) > 0
        self._r = xp.where(at, self._r, xp.zeros_like(self._r))
        pairs = inside[:, :, None] & inside[:, None, :] & np.isfinite(gram)
        gram = np.where(pairs, gram, 0.0).reshape(len(sums), -1)
        cross, squares = np.where(inside & np.isfinite(cross), cross, 0.0), np.where(inside & fine, squares, 1.0)
        return np.concatenate([gram, cross, squares], axis=1), usable, failed

    def _leave(self, failed: dict[int, tuple[Status, int, Array]]) -> None:
        """Samples that are final, and those that failed, leave."""
        done = np.flatnonzero(self._lo == self._form.steps).tolist()
        leaving = {row: (Status.CONVERGED, self._form.steps, self._S[row, self._form.past, :]) for row in done} | failed
        if not leaving:
            return
        for row, (status, step, state) in leaving.items():
            sample = int(self.samples[row])
            own = self._give(copied(self._xp, state))
            node = -1 if status is Status.CONVERGED else step
            self.ended[sample] = Outcome(status, step, float(self._error[row]), own, self.kept(sample), node)
        stay = np.array([row for row in range(len(self._n)) if row not in leaving], dtype=np.int64)
        self._S, self._dX = take_rows(self._S, stay), take_rows(self._dX, stay)
        for name in ("samples", "_places", "_lo", "_n", "_slope", "_moved", "_least", "_largest", "_error"):
            setattr(self, name, getattr(self, name)[stay])

    def _put(self, table: Float64) -> Array:
        """A host table as an array of the states' kind; the cast is the host's."""
        return self._xp.asarray(table.astype(self._dtype), device=self._like["device"])

    def _give(self, array: Array) -> Array:
        """An array of the windows' as one of the user's library, in the same memory."""
        return given_back(self._plan.xp, array)


def _leading(flags: NDArray[np.bool_]) -> Indices:
    """How many leading flags of each row hold, (B,)."""
    return np.where(flags.all(axis=1), flags.shape[1], np.argmin(flags, axis=1))
