"""The sliding window of one sample: its states, what the network is believed to say at them, and how it moves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from parasolver_core.arrays import Array, coarse, copied, finite_rows, host_view
from parasolver_core.guesses.forecast import Blank, Forecast
from parasolver_core.methods.sample_run import SampleRun
from parasolver_core.rounds.acceptance import RoundView, leading, shares
from parasolver_core.rounds.decisions import WILD
from parasolver_core.rounds.shared import Shared
from parasolver_core.rounds.slopes import ROUNDING, finite_slopes, followed, initial_slopes, new_slopes
from parasolver_core.rounds.squares import sums_of_squares
from parasolver_core.rounds.sweep import SweepCorrection, leading_sums
from parasolver_core.samplers.implied import implied_output
from parasolver_core.samplers.terms import combine
from parasolver_core.solution import SampleRecord, Status

Float64 = NDArray[np.float64]


class SampleWindow(SampleRun):
    """One sample's nodes ``lo .. hi - 1``; everything before ``lo`` is final.

    On a CPU all arithmetic is NumPy's, in the same memory, whichever library the arrays are of.

    Args:
        shared: what all samples share.
        sample: its place in the batch.
        start: ``x_T`` of the sample, (size,), in the working dtype.
        forecast: outputs expected of new nodes; None: they are filled in with a held prediction.
        slope: (N,), slopes to begin with; None: the linearization's.
    """

    def __init__(
        self,
        shared: Shared,
        sample: int,
        start: Array,
        forecast: Forecast | None = None,
        slope: Float64 | None = None,
    ) -> None:
        super().__init__(sample, start if shared.keep else None)
        self._shared, self._noise = shared, shared.noise_of(sample)
        start = host_view(start)
        self._eps, self._single = float(np.finfo(start.dtype).eps), start.dtype.itemsize == 4
        self._xp = array_namespace(start)
        self._recurrence = recurrence = shared.recurrence
        n, width = len(recurrence), shared.width
        self.hi, self._pace = 1, width  # about how many nodes enter a round
        whole_moves = shared.fill == "evaluated"
        self._correction = SweepCorrection(recurrence, self._noise, width, start, whole_moves)
        self._slope = initial_slopes(shared) if slope is None else finite_slopes(shared, slope)
        self._evaluated, self._measured = np.zeros((2, n), dtype=bool)  # the latter: whether a slope is no mere guess
        self._forecast = forecast
        if shared.warmup_steps == 0:
            self._open(start, min(width, n))

    def _open(self, start: Array, width: int) -> None:
        """The first round's nodes after node 0: as forecast, copies, or those whose states do not need a prediction."""
        if self._forecast is None and self._shared.fill == "copy":
            self._correction.write("M", 0, self._stay(0, start, [start], []))
            self._fill(1, width)
            return
        forecast, hi = self._forecast, width
        if forecast is None and self._shared.fill == "held":
            forecast, hi = Blank(self._recurrence), min(width, self._recurrence.blind)
        if forecast is not None:
            self._correction.write("M", 0, self._expected(forecast, 0, start))
            self._fill(1, hi, forecast)

    @property
    def nodes(self) -> NDArray[np.int64]:
        return np.arange(self.lo, self.hi)

    @property
    def inputs(self) -> Array:
        """The window's states, (n, size); a view."""
        return self._shared.given(self._window_states)

    @property
    def upcoming(self) -> list[tuple[int, int]]:
        ahead = range(self.hi - 1, min(self.hi - 1 + self._pace, len(self._recurrence)))
        return [(i, self.sample) for i in ahead if self._recurrence.c[i] != 0]

    def compare(self, D: Array) -> Array:
        return self._correction.compare(self._shared.taken(D), self.lo)

    def correct(self, D: Array, sums: Float64) -> list[SampleRecord]:
        """Second half: update the slopes, move the states, accept what is final, slide and fill in.

        Only the first node has its true input. What is not finite behind it comes of a guess: it is dropped.
        """
        D, nodes, told = self._shared.taken(D), self.nodes, self._correction.read(sums, self.lo)
        unit = self._eps if self._single else max(self._eps, float(coarse(self._xp, D[0, :])[0]))
        smallness = self._shared.small_data.usual
        if self._shared.small_data.told[self.hi - 1]:
            smallness = _smallness(self._shared, self.hi - 1, self._window_states[-1, :], D[-1, :], told.size[-1])
        defects, count = np.sqrt(told.defect), int(leading(np.isfinite(told.size + told.defect)))
        if count == 0:
            return self._first_alone(D)
        if self._forecast is not None:
            count = min(count, self._forecast.usable(self.lo, told.defect * D.shape[1]))
        if count < len(nodes):
            D, self.hi = D[:count, :], self.lo + count
            told = self._correction.read(leading_sums(sums, count), self.lo)
        at = slice(self.lo, self.hi)
        known = self._evaluated[at] & (told.moved > (ROUNDING * unit) ** 2 * told.size)
        old = self._slope[at]
        slope = new_slopes(self._shared, old, np.where(known, told.moved, 0.0), told.cross, told.size, unit)
        self._measured[at] |= slope != old
        near = told.moved <= WILD**2 * told.size  # else its slope says nothing of where it ended
        still = np.where(self._measured[at] & near, 0.0, ROUNDING * unit)
        move = self._correction.move(D, slope, self.lo, still)
        sound = count if np.isfinite(move).all() else int(leading(finite_rows(self._xp, D)))
        if sound == 0:
            return self._first_alone(D)
        move[0] = 0.0  # not a number where the sum of squares of the last output overflows
        self._slope[at], self._evaluated[at] = slope, True
        relative = shares(move, size := np.sqrt(told.size))
        sound = min(sound, int(leading(relative <= WILD)))
        view = RoundView(self.lo, relative, size, self._shared.bound[at], ROUNDING * unit, smallness[at])
        accepted, error = self._shared.accept(view)
        accepted, self.error = min(max(int(accepted), 1), sound), max(self.error, float(error), unit)
        accepted = _followed(self._shared, self.lo, accepted, slope, relative, unit, self._window_states, D)
        self._pace = accepted
        self._slide(accepted, sound)
        if count < len(nodes):
            relative = np.append(relative, np.full(len(nodes) - count, np.nan))
        return self.record(nodes, accepted, relative, defects)

    def estimate(self, sample: int) -> Array:
        if not self._evaluated[0]:
            return self.state
        recurrence, last, (xs, ms) = self._recurrence, self.hi - 1, self._correction.history(self.hi - 1)
        p, q = recurrence.held[last].tolist()
        # made once: its rounding must be the same in all rows, which must fit together
        held = combine([(p, xs[0]), (q, ms[0])])
        believed = recurrence.terms().of_belief
        *_, (x, _) = recurrence.march(last, xs, ms, lambda i, x: combine(believed(i, held, x)), self._noise)
        return self._shared.given(x)

    @property
    def state(self) -> Array:
        return self._shared.given(self._window_states[0, :])

    @property
    def _window_states(self) -> Array:
        return self._correction.X[self._correction.rows(self.lo, self.hi), :]

    def _slide(self, accepted: int, sound: int) -> None:
        """Drop final nodes; keep the next up to ``sound`` nodes of the window; fill in new ones."""
        n, first_new = len(self._recurrence), self.lo + sound
        x, correction = None, self._correction
        for i in range(self.lo, self.lo + accepted):  # final states come from the recurrence itself, to the last bit
            x = correction.X[i + 1 - correction.base, :] if i + 1 < first_new else correction.behind(i)
            if self.final is not None:
                self.final.append(self._shared.given(copied(self._xp, x)))
            if i + 1 == n:
                self._end(x)
                return
        self.lo += accepted
        width = 1 if self.lo <= self._shared.warmup_steps else self._shared.width
        self._fill(first_new, min(self.lo + width, n))

    def _end(self, x: Array) -> None:
        """The last state is final: the sample, unless the arithmetic overflowed in the last step."""
        n = len(self._recurrence)
        if bool(self._xp.all(self._xp.isfinite(x))):
            self.end(Status.CONVERGED, n, self._shared.given(x))
        else:
            self.lo = n - 1
            self.end(Status.NONFINITE_SOLVER, n - 1, self.state, failed_node=n - 1)

    def _fill(self, first: int, hi: int, forecast: Forecast | None = None) -> None:
        """Nodes ``first .. hi - 1``, as forecast or from the node before them."""
        forecast = forecast or self._forecast
        if hi <= first:
            return
        kept = max(min(self.lo, first - 1) - self._recurrence.memory + 1, 0)
        self._correction.make_room(kept, first, hi)
        self._evaluated[first:hi] = False
        self.hi = hi
        if forecast is not None:
            xs, ms = self._correction.history(first - 1)
            forecast = forecast.behind(first - 1, hi - first, xs[0], ms[0])
            march = self._recurrence.march(first - 1, xs, ms, lambda i, x: self._expected(forecast, i, x), self._noise)
            self._put(first, hi, march)
        elif self._shared.fill == "copy":
            self._put(first, hi, self._copies(first - 1))
        else:
            self._fill_held(first, hi)

    def _put(self, first: int, hi: int, rows: Iterator[tuple[Array, Array]]) -> None:
        """Write the states and outputs of the nodes ``first .. hi - 1``."""
        for i, (x, m) in zip(range(first, hi), rows, strict=False):
            self._correction.write("X", i, x)
            self._correction.write("M", i, m)

    def _fill_held(self, first: int, hi: int) -> None:
        """Nodes ``first .. hi - 1`` with the prediction of the node before them."""
        last = first - 1
        xs, ms = self._correction.history(last)
        p, q = self._recurrence.held[last].tolist()
        constant = [(p, xs[0]), (q, ms[0])]
        if self._shared.fill == "evaluated":  # as the network gave it, before the correction
            constant.append((-p - q * float(self._slope[last]), self._correction.last_move(last)))
        self._correction.fill(first, hi, xs, ms, constant)

    def _expected(self, forecast: Forecast, i: int, x: Array) -> Array:
        return forecast(i, x, float(self._slope[i]))

    def _copies(self, last: int) -> Iterator[tuple[Array, Array]]:
        """The state after node ``last`` again and again, with the outputs that would make it so."""
        (xs, ms), memory, x = self._correction.history(last), self._recurrence.memory, self._correction.behind(last)
        for j in range(last + 1, len(self._recurrence)):
            xs, ms = [x, *xs[: memory - 1]], ms[: memory - 1]
            m = self._stay(j, x, xs, ms)
            yield x, m
            ms = [m, *ms]

    def _stay(self, i: int, x: Array, xs: list[Array], ms: list[Array]) -> Array:
        """The output that makes step i end where it begins."""
        return implied_output(self._recurrence, self._xp, i, x, xs, ms, self._noise(i))

    def _first_alone(self, D: Array) -> list[SampleRecord]:
        """The first node's sums are not finite: whose fault is it, or were only the squares too large?"""
        nodes, nothing = self.nodes, np.full(len(self.nodes), np.nan)
        input_ok, output_ok = (bool(finite_rows(self._xp, rows[:1, :])[0]) for rows in (self._window_states, D))
        if input_ok and output_ok:
            self._correction.write("M", self.lo, D[0, :])
            if finite_rows(self._xp, self._correction.behind(self.lo)[None, :])[0]:
                self._evaluated[self.lo], self.error = True, max(self.error, self._eps)
                self._slide(1, 1)
                return self.record(nodes, 1, nothing, nothing)
            input_ok = False  # the step itself overflows
        status, failed_node = Status.NONFINITE_MODEL if input_ok else Status.NONFINITE_SOLVER, self.lo
        while self.lo > self._correction.base and not finite_rows(self._xp, self._window_states[:1, :])[0]:
            self.lo -= 1  # the last state that is good
        self.end(status, self.lo, self.state, failed_node)
        return self.record(nodes, 0, nothing, nothing)


def _smallness(shared: Shared, node: int, x: Array, m: Array, square: float) -> Float64:
    """What of the states' sizes counts, by the prediction at this node, of which ``square`` is the state's."""
    p, q = shared.recurrence.held[node].tolist()
    held = combine([(p, x), (q, m)])
    return shared.small_data.smallness(node, float(np.dot(held, held)) / len(held), float(square))


def _followed(
    shared: Shared, lo: int, count: int, slope: Float64, move: Float64, unit: float, X: Array, D: Array
) -> int:
    """How many of those accepted may be final; what is held is only looked at where the states alone do not tell."""
    if count == 1:
        return count
    nodes = slice(lo, lo + count)
    p, q = shared.form.held_parts[:, nodes]
    told = shared, shared.form.latest[:, nodes], p + q * slope[:count], move[:count]
    if followed(*told, 0.0, unit).all():
        return count
    held = X[:count, :] * p[:, None] + D[:count, :] * q[:, None]
    share = shares(*(np.sqrt(sums_of_squares(rows)) for rows in (held, X[:count, :])))
    return max(int(leading(followed(*told, share, unit))), 1)
