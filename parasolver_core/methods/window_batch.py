"""The sliding windows of many samples, moved together: a round is a dozen array operations, for any window and batch.

The host decides, the device moves. A round's inner products come to the host in one transfer; there they become small
tables, in float64, for all samples at once (:mod:`parasolver_core.rounds.decisions`). One batched product then writes
every sample's next window (:mod:`parasolver_core.rounds.matrix`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from array_api_compat import array_namespace

from parasolver_core.arrays import Array, host_view, lengths, take_rows, to_host
from parasolver_core.guesses.fill import Fill
from parasolver_core.methods.kept import Kept
from parasolver_core.methods.run import Outcome, Run
from parasolver_core.rounds.decisions import Decision, Windows
from parasolver_core.rounds.matrix import compare, unpack, write
from parasolver_core.rounds.next_rows import NextRows
from parasolver_core.rounds.nodes import Nodes
from parasolver_core.rounds.passed import moved, passed_by
from parasolver_core.rounds.remade import made_again
from parasolver_core.rounds.salvage import Failures, overflowed, salvage
from parasolver_core.rounds.shared import Shared
from parasolver_core.rounds.squares import at_least
from parasolver_core.samplers.held_form import Float64, Indices
from parasolver_core.solution import SampleRecord, SampleRecords, Status


class WindowBatch(Run):
    """The windows of the samples that still run.

    Args:
        shared: what all samples share.
        fill: where nodes that enter begin.
        samples: their places in the batch.
        start: their ``x_T``, (B, size), in the working dtype.
        slope: (N,) or (B, N), slopes dm/dx to begin with; None: the linearization's.
    """

    def __init__(
        self, shared: Shared, fill: Fill, samples: Indices, start: Array, slope: Float64 | None = None
    ) -> None:
        start = host_view(start)
        self._shared, self._form, self._fill, self._xp = shared, shared.form, fill, array_namespace(start)
        count, finite = start.shape[0], self._xp.finfo(start.dtype)
        # a state's length from which on its sum of squares, or the state that a step makes of it, may run out of range
        self._large = float(finite.max) ** 0.375 / self._form.gain
        self.samples, self._places, self.ended = samples, np.arange(count), {}
        self._pace = shared.width  # about how many nodes enter a round
        self._kept = Kept(samples, shared.given(start)) if shared.keep else None
        self._windows = windows = Windows(shared, count, start.shape[1], float(finite.eps), slope)
        self._rows = Nodes(shared.form, start, fill.first(start, windows.slope_held))
        opening = min(fill.opening(shared.recurrence), shared.width)
        if shared.warmup_steps == 0 and opening > 1:  # nodes that are filled in with nothing evaluated yet
            self._slide(windows.nothing(), opening)

    @property
    def nodes(self) -> Indices:
        return self._windows.nodes[self._windows.inside]

    @property
    def owners(self) -> Indices:
        return np.repeat(self.samples, self._windows.n)

    @property
    def inputs(self) -> Array:
        return self._shared.given(self._rows.inputs(self._windows))

    @property
    def lends(self) -> bool:
        return self._rows.inputs_are_a_view(self._windows)

    def compare(self, D: Array) -> Array:
        return compare(self._rows, self._shared.taken(D), self._windows)

    def correct(self, D: Array, sums: Float64) -> Sequence[SampleRecord]:
        windows, rows, failed = self._windows, self._rows, {}
        found, usable = unpack(rows, sums, windows), windows.n
        if not found.finite:
            found, usable, failed = salvage(rows, windows, self._shared.taken(D), found)
        usable = np.minimum(usable, self._fill.usable(self._places, windows.lo, found.defects, windows.n))
        decision = windows.decide(found, usable)
        self._pace = int(decision.accepted.max())
        for row in failed:
            decision.accepted[row], decision.move[row], decision.defect[row] = 0, np.nan, np.nan
        told = decision.accepted, decision.move, decision.defect, windows.error
        records = SampleRecords(self.samples, windows.n, windows.nodes, *told)
        lo, after = windows.lo, windows.lo + decision.accepted
        # where a state may run out of range, the last one that is good is still wanted
        risky = bool((after == self._form.steps).any()) or not found.length.max() <= self._large
        before = self._rows.first_copy() if risky else None
        passed = self._slide(decision, np.where(after > self._shared.warmup_steps, self._shared.width, 1), risky)
        if before is not None and passed is not None:
            for row, failure in overflowed(rows, lo, before, passed, decision.accepted).items():
                failed.setdefault(row, failure)
                records.accepted[row] = failure[1] - lo[row]
        self._leave(failed)
        return records

    @property
    def upcoming(self) -> list[tuple[int, int]]:
        steps = self._windows.last[:, None] + np.arange(self._pace if self._form.noisy else 0)
        adds = (steps < self._form.steps) & (self._form.c[np.minimum(steps, self._form.steps - 1)] != 0)
        columns, rows = np.nonzero(adds.T)  # the next step of each sample first
        return list(zip(steps[rows, columns].tolist(), self.samples[rows].tolist(), strict=True))

    @property
    def steps(self) -> Indices:
        return self._windows.lo

    @property
    def errors(self) -> Float64:
        return self._windows.error

    def states(self) -> Array:
        return self._shared.given(self._rows.first_copy())

    def kept(self, sample: int) -> Sequence[Array]:
        return () if self._kept is None else self._kept.of(sample)

    def estimate(self, sample: int) -> Array:
        row, form = int(np.flatnonzero(self.samples == sample)[0]), self._form
        if not self._windows.begun:
            return self._shared.given(self._rows.first[row, :])
        last = int(self._windows.last[row])
        xs, hs = self._rows.history(row, last - int(self._windows.lo[row]))
        return self._shared.given(form.carried(last, xs, hs, self._shared.noise_of(sample)))

    def _slide(self, decision: Decision, width: int | Indices, risky: bool = False) -> Array | None:
        """Move all states; drop final nodes, keep those that are sound, and fill in up to so many nodes.

        Returns:
            The states that windows pass by, (B, most, size); None where nobody wants them.
        """
        form, windows, rows = self._form, self._windows, self._rows
        first, lo, last = windows.lo, windows.lo + decision.accepted, windows.lo + decision.sound - 1
        hi = np.maximum(np.minimum(lo + width, form.steps), lo + 1)
        count = max(int((hi - 1 - last).max()), 1)  # of nodes behind the last kept
        entering = self._fill.entering(last, count, lambda: windows.slope_held)
        again = made_again(rows, decision, first, self._draw)
        passed = passed_by(rows, decision, again) if risky or self._kept is not None else None
        further = self._fill.rows(self._places, last, count, lambda: moved(rows, decision, last - first))
        further = [] if further is None else [further]
        if entering.noise:
            further.append(self._draw(last, hi, entering.noise))
        place = (lo - first - form.past)[:, None] + np.arange(form.past + (hi - lo).max())
        place = np.minimum(place, (hi - 1 - first)[:, None])
        made_of = NextRows.of(form, decision, place, self._fill.uncorrected, entering, rows.dtype)
        windows.slide(lo, hi, last)
        write(rows, made_of, windows.held, further, again)
        if self._kept is not None and passed is not None:
            given = self._shared.given
            self._kept.add(self.samples, decision.accepted, given(passed), given(rows.first_copy()))
        return passed

    def _draw(self, first: Indices, end: Indices, count: int) -> Array:
        """z of the ``count`` steps from ``first``, (B,), zero from ``end`` on: (B, count, size)."""
        c, wanted = np.append(self._form.c, np.zeros(count + 1)).tolist(), []
        for sample, start, stop in zip(self.samples.tolist(), first.tolist(), end.tolist(), strict=True):
            wanted += [(i, sample) if i < stop and c[i] != 0 else None for i in range(start, start + count)]
        return self._xp.reshape(self._shared.noise.block(wanted), (len(first), count, -1))

    def _leave(self, failed: Failures) -> None:
        """Samples that are final, and those that failed, leave."""
        windows, first = self._windows, self._rows.first
        done = np.flatnonzero(windows.lo == self._form.steps)
        if not (len(done) or failed):
            return
        leaving: Failures = {}
        if len(done):
            final = take_rows(first, done)
            leaving = {row: (Status.CONVERGED, self._form.steps, final[k, :]) for k, row in enumerate(done.tolist())}
            if self._form.cancels:
                length = to_host(lengths(self._xp, final)).astype(np.float64)
                windows.end(done, at_least(length, self._xp, final))
        gone = leaving | failed
        for row, (status, step, state) in gone.items():
            sample, given = int(self.samples[row]), self._shared.given(state)
            node = -1 if status is Status.CONVERGED else step
            self.ended[sample] = Outcome(status, step, float(windows.error[row]), given, self.kept(sample), node)
        stay = np.array([row for row in range(len(self.samples)) if row not in gone], dtype=np.int64)
        self.samples, self._places = self.samples[stay], self._places[stay]
        windows.stay(stay)
        self._rows.stay(stay)
