"""The sliding windows of many samples, moved together: a round is a dozen array operations, for any window and batch.

The host decides, the device moves. A round's inner products come to the host in one transfer; there they become small
tables, in float64, for all samples at once: slopes, ``T``, what is final, where each window goes on. One batched product
then writes every sample's next window, since all of it is linear in what is known: the states moved by ``T r``, the
beliefs ``h + (1 + G T) r``, the states behind final nodes and new nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from parasolver_core.acceptance import RoundView
from parasolver_core.arrays import Array, finite_rows, host_view, take_rows
from parasolver_core.held_form import Float64, HeldForm, Indices
from parasolver_core.solution import SampleRecord, Status
from parasolver_core.window import Plan

_ROUNDING = 8  # moves of so many units in the last place are the arithmetic's own noise
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


class WindowBatch:
    """The windows of the samples that still run.

    The buffer ``S`` is (B, 2 R, size): R rows of states, then R of held quantities. Row ``past + j`` belongs to node
    ``lo + j`` of its own sample; the ``past`` rows before are what the sampler's memory reads. R fits the longest
    window; shorter ones repeat their last row.

    Args:
        plan: what all samples share; nodes are filled in with a held prediction.
        samples: their places in the batch.
        start: their ``x_T``, (B, size), in the working dtype.
        noise: ``noise(step, sample)``, (size,).
    """

    def __init__(
        self, plan: Plan, samples: Sequence[int], start: Array, noise: Callable[[int, int], Array]
    ) -> None:
        self._given_dtype, start = start.dtype, host_view(start)
        self._plan, self._noise, self._xp = plan, noise, array_namespace(start)
        self._form = form = HeldForm(plan.recurrence, plan.width)
        (count, size), steps = start.shape, form.steps
        self._like = {"dtype": start.dtype, "device": device(start)}
        finite = self._xp.finfo(start.dtype)
        self._eps, self._dtype = float(finite.eps), np.dtype(f"f{finite.bits // 8}")
        self._large = float(finite.max) ** 0.75  # a state's sum of squares from which on it may run out of range
        self._size = size
        self.samples: Indices = np.asarray(samples)
        self._lo, self._n = np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.int64)
        slope = plan.method.linearization.initial(plan.recurrence)
        self._slope = np.tile(np.where(np.isfinite(slope), slope, plan.recurrence.slope), (count, 1))  # dm/dx
        self._moved = np.zeros((count, steps))  # sum of squares of each node's last move; 0: unknown
        self._error = np.zeros(count)
        self.ended: dict[int, tuple[Status, int, float, Array]] = {}  # sample: status, node, error, state
        self.kept: dict[int, list[Array]] | None = None
        if plan.keep:
            self.kept = {sample: [start[row, :]] for row, sample in enumerate(samples)}
        rows = form.past + 1
        S = self._xp.zeros((count, 2 * rows, size), **self._like)
        self._S = self._xp.concat([S[:, : form.past, :], start[:, None, :], S[:, rows - 1 :, :]], axis=1)[:, : 2 * rows, :]
        self._dX = self._S[:, :rows, :]
        self._r = self._xp.zeros((count, 1, size), **self._like)
        if plan.warmup_steps == 0:  # nodes whose states hardly depend on the sample, with a prediction of 0
            zero = np.zeros((count, 1, 1))
            self._write(Decision(zero, zero[:, 0], zero[:, 0], self._lo, self._n), min(plan.width, plan.recurrence.blind))

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
        p, q = self._put(np.moveaxis(held, 2, 0)[..., None])
        r = q * xp.reshape(D, (count, n, self._size))
        r += p * X
        r -= H
        dot = xp.linalg.vecdot
        gram = xp.reshape(xp.matmul(r, xp.matrix_transpose(r)), (count, -1))
        sums = xp.concat([gram, dot(self._dX[:, past:, :], r), dot(X, X)], axis=1)
        self._r = r
        return xp.reshape(sums, (-1,))

    def correct(self, D: Array, sums: Float64) -> list[SampleRecord]:
        """Second half: update the slopes, move all states, accept what is final, slide and fill in."""
        n, past = self._longest, self._form.past
        sums = sums.reshape(len(self._n), -1)
        usable, failed = self._n, {}
        if not np.all(np.isfinite(sums)):
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
        large = sums[:, -n:].max() > self._large
        before = self._xp.asarray(self._S[:, past, :], copy=True) if large else None
        first = self._lo
        warm = self._lo + decision.accepted > self._plan.warmup_steps
        self._write(decision, np.where(warm, self._plan.width, 1))
        if before is not None:
            over = np.flatnonzero(~finite_rows(self._xp, self._S[:, past, :])).tolist()
            failed |= {r: (Status.NONFINITE_SOLVER, int(first[r]), before[r, :]) for r in over if r not in failed}
        self._leave(failed)
        return records

    def state(self, sample: int) -> Array:
        """The last final state, (size,)."""
        if sample in self.ended:
            return self._give(self.ended[sample][3])
        return self._give(self._S[self._row(sample), self._form.past, :])

    def status(self, sample: int) -> Status:
        """How the sample stands."""
        return self.ended[sample][0] if sample in self.ended else Status.RUNNING

    def final(self, sample: int) -> int:
        """How many steps are final."""
        return self.ended[sample][1] if sample in self.ended else int(self._lo[self._row(sample)])

    def error(self, sample: int) -> float:
        """The estimated relative error."""
        return self.ended[sample][2] if sample in self.ended else float(self._error[self._row(sample)])

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
        gram, cross, squares = sums[:, : n * n].reshape(-1, n, n), sums[:, n * n : -n], sums[:, -n:]
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
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = np.where(move > 0, move / length, move)  # NaN stays NaN
        sound = _leading(inside & (relative <= _WILD))
        sound = np.maximum(sound, 1)
        accepted = self._accept(relative, length / np.sqrt(size), usable, sound)
        at = np.nonzero(inside)
        self._slope[at[0], nodes[at]] = new[at]
        self._moved[at[0], nodes[at]] = np.where(np.arange(n) < sound[:, None], norms, 0.0)[at]
        defects = np.sqrt(np.einsum("bii->bi", gram) / size) / np.abs(q)
        return Decision(T, slope_held, relative, accepted, sound), defects

    def _accept(self, move: Float64, length: Float64, usable: Indices, sound: Indices) -> Indices:
        """How many leading nodes of each sample are final."""
        plan, accepted = self._plan, np.ones(len(move), dtype=np.int64)
        for row, (lo, n) in enumerate(zip(self._lo.tolist(), usable.tolist(), strict=True)):
            bound, rounding = plan.bound[lo : lo + n], _ROUNDING * self._eps
            view = RoundView(lo=lo, move=move[row, :n], size=length[row, :n], bound=bound, rounding=rounding)
            count, error = plan.method.acceptance.accept(view, plan.tolerance)
            accepted[row] = min(max(count, 1), sound[row])  # the first node's input was final
            self._error[row] = max(self._error[row], error)
        return accepted

    def _write(self, decision: Decision, width: int | Indices) -> None:
        """The next windows, of so many nodes.

        ``S = S[source] + C [r; base; z]``: rows that are kept move from where they are, so that the product's rounding
        is that of the move; new states move from the last row kept, whose belief they take.
        """
        xp, form, (count, rows, size) = self._xp, self._form, self._S.shape
        lo, last = self._lo + decision.accepted, self._lo + decision.sound - 1
        hi = np.maximum(np.minimum(lo + width, form.steps), lo + 1)
        base, kept_x, kept_h, new = self._sources(lo, last, hi)
        C = self._table(decision, last, base, kept_x, kept_h - rows // 2, new)
        every = np.arange(count)[:, None] * rows
        flat = xp.reshape(self._S, (-1, size))
        parts = [self._r, xp.reshape(take_rows(flat, (base + every).reshape(-1)), (count, form.base, size))]
        if C.shape[2] > decision.T.shape[2] + form.base:
            parts.append(self._draw(last, hi, C.shape[2] - decision.T.shape[2] - form.base))
        sources = xp.concat(parts, axis=1)
        kept = np.concatenate([kept_x, kept_h], axis=1)
        del parts
        self._r = self._dX = None
        states = kept.shape[1] // 2
        self._S = xp.reshape(take_rows(flat, (kept + every).reshape(-1)), (count, 2 * states, size))
        del flat
        moves = xp.matmul(self._put(C), sources)  # everything that is computed
        self._S += moves
        self._dX, self._lo, self._n = moves[:, :states, :], lo, hi - lo

    def _sources(self, lo: Indices, last: Indices, hi: Indices) -> tuple[Indices, Indices, Indices, Indices]:
        """Of the next windows ``lo .. hi - 1``, whose rows up to node ``last`` are there: rows of the present buffer.

        Returns:
            Of the base (B, base); of each state and of each belief, the last one there where it is new (B, rows); and
            how far behind node ``last`` each is, 0 where it is there.
        """
        past, half = self._form.past, self._S.shape[1] // 2
        node = np.minimum(lo[:, None] - past + np.arange(past + (hi - lo).max()), hi[:, None] - 1)
        kept = past + np.minimum(node, last[:, None]) - self._lo[:, None]
        end = past + (last - self._lo)[:, None]
        states, beliefs = (end - np.arange(reads) for reads in self._form.reads)
        return np.concatenate([states, beliefs + half], 1), kept, kept + half, np.maximum(node - last[:, None], 0)

    def _table(
        self, decision: Decision, last: Indices, base: Indices, kept_x: Indices, kept_h: Indices, new: Indices
    ) -> Float64:
        """``C``, (B, 2 rows, n + base + noise)."""
        form, (count, n, _) = self._form, decision.T.shape
        past, half, rows = form.past, self._S.shape[1] // 2, new.shape[1]
        moves = np.zeros((2, count, half, n))  # of the present states and beliefs, in terms of r
        moves[0, :, past:], moves[1, :, past:] = decision.T, decision.T * decision.slope[..., None]
        moves[1, :, np.arange(past, half), np.arange(n)] += 1.0
        every, is_new = np.arange(count)[:, None], (new > 0)[..., None]
        ahead = max(int(new.max()), 1)
        answer = form.continuations(last, ahead)[every, np.maximum(new, 1) - 1] * is_new
        C = np.zeros((count, 2 * rows, n + answer.shape[2]))
        C[:, :rows, n:] = answer
        C[:, :rows, n] -= new > 0  # a new state begins as a copy of the last
        reads = form.reads[0]
        moves_base = np.concatenate([moves[0][every, base[:, :reads]], moves[1][every, base[:, reads:] - half]], axis=1)
        C[:, :rows, :n] = np.where(is_new, answer[..., : form.base] @ moves_base, moves[0][every, kept_x])
        C[:, rows:, :n] = moves[1][every, kept_h]
        return C

    def _draw(self, last: Indices, hi: Indices, count: int) -> Array:
        """z of the steps from ``last`` to the new windows' ends, zero beyond: (B, count, size)."""
        nothing = self._xp.zeros(self._size, **self._like)
        rows = []
        for sample, first, end in zip(self.samples.tolist(), last.tolist(), hi.tolist(), strict=True):
            steps = range(first, first + count)
            rows += [self._noise(i, sample) if i < end - 1 and self._form.c[i] != 0 else nothing for i in steps]
        return self._xp.reshape(self._xp.stack(rows), (len(last), count, self._size))

    def _salvage(self, D: Array, sums: Float64) -> tuple[Float64, Indices, dict[int, tuple[Status, int, Array]]]:
        """Some sums are not finite: nodes from there on are dropped, to be filled in anew.

        They were asked at states that are guesses. A sample fails where its first node, whose input is final, does.

        Returns:
            Finite sums, how many leading nodes of each sample are usable, and the samples (rows) that fail.
        """
        xp, n, past = self._xp, self._longest, self._form.past
        gram, cross, squares = np.split(sums.copy(), [n * n, n * n + n], axis=1)
        gram = gram.reshape(-1, n, n)
        fine = np.isfinite(np.einsum("bii->bi", gram)) & np.isfinite(cross) & np.isfinite(squares)
        usable = np.minimum(np.maximum(_leading(fine), 1), self._n)
        inside = np.arange(n) < usable[:, None]
        states_ok = finite_rows(xp, self._S[:, past, :])
        outputs_ok = finite_rows(xp, self._r[:, 0, :]) | ~states_ok  # a defect is finite where output and belief are
        failed = {}
        for row in np.flatnonzero(~(states_ok & outputs_ok)).tolist():
            status = Status.NONFINITE_MODEL if states_ok[row] else Status.NONFINITE_SOLVER
            failed[row] = status, int(self._lo[row]), xp.asarray(self._S[row, past, :], copy=True)
            inside[row] = False
        at = self._put(inside.astype(np.float64)[..., None]) > 0
        self._r = xp.where(at, self._r, xp.zeros_like(self._r))
        pairs = inside[:, :, None] & inside[:, None, :] & np.isfinite(gram)
        gram = np.where(pairs, gram, 0.0).reshape(len(sums), -1)
        cross, squares = np.where(inside & np.isfinite(cross), cross, 0.0), np.where(inside & fine, squares, 1.0)
        return np.concatenate([gram, cross, squares], axis=1), usable, failed

    def _leave(self, failed: dict[int, tuple[Status, int, Array]]) -> None:
        """Samples that are final, and those that failed, leave."""
        done = self._lo == self._form.steps
        if not done.any() and not failed:
            return
        X = self._S[:, self._form.past, :]
        finite = finite_rows(self._xp, X)
        for row in np.flatnonzero(done).tolist():
            if row not in failed:
                status = Status.CONVERGED if finite[row] else Status.NONFINITE_SOLVER
                failed[row] = status, self._form.steps, X[row, :]
        for row, (status, node, state) in failed.items():
            self.ended[int(self.samples[row])] = status, node, float(self._error[row]), state
        stay = np.array([row for row in range(len(self._n)) if row not in failed], dtype=np.int64)
        self._S, self._dX = take_rows(self._S, stay), take_rows(self._dX, stay)
        for name in ("samples", "_lo", "_n", "_slope", "_moved", "_error"):
            setattr(self, name, getattr(self, name)[stay])

    def _put(self, table: Float64) -> Array:
        """A host table as an array of the states' kind; the cast is the host's."""
        return self._xp.asarray(table.astype(self._dtype), device=self._like["device"])

    def _give(self, array: Array) -> Array:
        """An array of the windows' as one of the user's library, in the same memory."""
        return self._plan.xp.asarray(array)


def _leading(flags: NDArray[np.bool_]) -> Indices:
    """How many leading flags of each row hold, (B,)."""
    return np.where(flags.all(axis=1), flags.shape[1], np.argmin(flags, axis=1))
