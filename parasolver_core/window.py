"""The sliding window of one sample: its states, what the network is believed to say at them, and how it moves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from parasolver_core.acceptance import RoundView
from parasolver_core.arrays import Array, assign, finite_rows
from parasolver_core.correction import Moments, apply_correction, propagation, take_defect
from parasolver_core.methods import Method
from parasolver_core.recurrence import Recurrence
from parasolver_core.solution import SampleRecord, Status

Float64 = NDArray[np.float64]

_ROUNDING = 8  # moves of so many units in the last place are the arithmetic's own noise
_WILD = 1e3  # a correction so many times the state has left the surrogate's reach: fill the node in again


@dataclass(frozen=True)
class Plan:
    """What all samples of a run share.

    Args:
        xp: array namespace.
        recurrence: the sampler.
        method: how to linearize, accept and fill in.
        bound: (N,), of the method's acceptance.
        width: the most nodes evaluated in one round.
        warmup_steps: how many nodes after the first are evaluated one at a time.
        tolerance: wanted relative error.
        keep: whether to keep the final states.
        on_cpu: whether passes over the window are worth blocking.
    """

    xp: Any
    recurrence: Recurrence
    method: Method
    bound: Float64
    width: int
    warmup_steps: int
    tolerance: float
    keep: bool
    on_cpu: bool


class Forecast(ABC):
    """The outputs expected of nodes that enter a window, from an earlier solution or a coarser one."""

    @abstractmethod
    def __call__(self, i: int, x: Array, slope: float) -> Array:
        """The network's output at node i for the state x, (size,), which may be near or not; its slope there."""


class Near(Forecast):
    """Outputs along a trajectory that is expected to be near.

    Args:
        recurrence: the sampler.
        xp: array namespace.
        trajectory: (N + 1, size).
        noise: ``noise(step)``, (size,).
    """

    def __init__(self, recurrence: Recurrence, xp: Any, trajectory: Array, noise: Callable[[int], Array]) -> None:
        self._states = [trajectory[i, :] for i in range(len(recurrence) + 1)]
        self._outputs = recurrence.implied_outputs(xp, self._states, noise)

    def __call__(self, i: int, x: Array, slope: float) -> Array:
        return self._outputs[i] + (x - self._states[i]) * slope


class Nothing(Forecast):
    """A held quantity of 0: a predicted sample that is the mean of all data, before anything is known."""

    def __init__(self, recurrence: Recurrence) -> None:
        self._held = recurrence.held

    def __call__(self, i: int, x: Array, slope: float) -> Array:
        p, q = self._held[i]
        return x * float(-p / q)


class SampleWindow:
    """One sample's nodes ``lo .. hi - 1``; everything before ``lo`` is final.

    The buffers hold a node's row next to its predecessor's, a little longer than the window, so that sliding is a
    matter of an offset and rows are moved only now and then.

    Args:
        plan: what all samples share.
        index: the sample's place in the batch.
        start: ``x_T`` of the sample, (size,), in the working dtype.
        noise: ``noise(step)``, (size,).
        forecast: outputs expected of new nodes; None: they are filled in with a held prediction.
        slope: (N,), slopes to begin with; None: the linearization's.
    """

    def __init__(
        self,
        plan: Plan,
        index: int,
        start: Array,
        noise: Callable[[int], Array],
        forecast: Forecast | None = None,
        slope: Float64 | None = None,
    ) -> None:
        self._plan, self.index, self._noise = plan, index, noise
        self._xp = xp = plan.xp
        self._recurrence = recurrence = plan.recurrence
        self._method = method = plan.method
        width, keep = plan.width, plan.keep
        self.status, self.failed_node = Status.RUNNING, -1
        self.lo, self.hi, self._base = 0, 1, 0
        n, rows = len(recurrence), min(width + max(width // 4, 1), len(recurrence)) + recurrence.memory - 1
        self._X, self._M, self._dX = (
            xp.zeros((rows, start.shape[0]), dtype=start.dtype, device=device(start)) for _ in range(3)
        )
        self._X = assign(self._X, (0, slice(None)), start)
        slope = method.linearization.initial(recurrence) if slope is None else slope
        self._slope = np.where(np.isfinite(slope), slope, recurrence.slope)
        self._evaluated = np.zeros(n, dtype=bool)
        self._eps = float(xp.finfo(start.dtype).eps)
        self.error = 0.0
        self.result: Array | None = None
        self.kept: list[Array] | None = [start] if keep else None
        self._forecast = forecast
        if plan.warmup_steps == 0:
            self._open(start, min(width, n))

    def _open(self, start: Array, width: int) -> None:
        """The first round's nodes after node 0: as forecast, copies, or those whose states do not need a prediction."""
        if self._forecast is None and self._method.fill == "copy":
            self._M = assign(self._M, (0, slice(None)), self._stay(0, start, [start], []))
            self._fill(1, width)
            return
        forecast, hi = self._forecast, width
        if forecast is None and self._method.fill == "held":
            forecast, hi = Nothing(self._recurrence), min(width, self._recurrence.blind)
        if forecast is not None:
            self._M = assign(self._M, (0, slice(None)), forecast(0, start, float(self._slope[0])))
            self._fill(1, hi, forecast)

    @property
    def running(self) -> bool:
        """Whether the sample takes part in the next round."""
        return self.status is Status.RUNNING

    @property
    def nodes(self) -> NDArray[np.int64]:
        """The window's nodes."""
        return np.arange(self.lo, self.hi)

    @property
    def inputs(self) -> Array:
        """The window's states, (n, size); a view."""
        return self._X[self._rows(), :]

    def take_defect(self, D: Array) -> Array:
        """First half of a round: compare the outputs D, (n, size), with belief; inner products for the host."""
        self._M, packed = take_defect(self._xp, self._X, self._M, self._dX, D, self._rows(), self._plan.on_cpu)
        return packed

    def correct(self, D: Array, products: Float64) -> SampleRecord:
        """Second half: update the slopes, move the states, accept what is final, slide and fill in."""
        moments = Moments.unpack(products, len(self.nodes))
        if not np.all(np.isfinite(np.concatenate([moments.size, np.diag(moments.gram)]))):
            return self._salvage(D)
        nodes, lo, size = self.nodes, self.lo, self._X.shape[1]
        known = self._evaluated[nodes] & (moments.moved > (self._eps**2) * moments.size)
        moved = np.where(known, moments.moved, 0.0)
        old = self._slope[nodes]
        slope = self._method.linearization.update(old, moved, moments.cross)
        slope = np.where(np.isfinite(slope), slope, old)
        self._slope[nodes], self._evaluated[nodes] = slope, True

        # T maps defects to the states behind each node; a node's own input moves with the row before
        inputs_T = np.vstack([np.zeros(len(nodes)), propagation(self._recurrence, slope, lo)[:-1]])
        move = moments.norms(inputs_T)
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = np.where(move > 0, move / np.sqrt(moments.size), 0.0)
        view = RoundView(
            lo=lo,
            move=relative,
            size=np.sqrt(moments.size / size),
            bound=self._plan.bound[nodes],
            rounding=_ROUNDING * self._eps,
        )
        wild = ~(relative <= _WILD)
        sound = int(np.argmax(wild)) if wild.any() else len(wild)
        accepted, error = self._method.acceptance.accept(view, self._plan.tolerance)
        accepted = min(max(accepted, 1), sound)  # the first node is always final, and never moved
        self._X, self._M, self._dX = apply_correction(
            self._xp, self._X, self._M, self._dX, D, self._rows(), inputs_T, slope, self._plan.on_cpu
        )
        self.error = max(self.error, error)
        self._slide(accepted, sound)
        defects = np.sqrt(np.diag(moments.gram) / size)
        return SampleRecord(self.index, nodes, accepted, relative, defects, self.error)

    def estimate(self) -> Array:
        """The sample, or the best estimate of it so far, (size,)."""
        if self.result is not None:
            return self.result
        if self.status in (Status.NONFINITE_MODEL, Status.NONFINITE_SOLVER) or not self._evaluated[0]:
            return self.state
        last, (xs, ms) = self.hi - 1, self._history(self.hi - 1)
        p, q = self._recurrence.held[last]
        constant = xs[0] * float(p) + ms[0] * float(q)
        *_, (_, x, _) = self._continuation(last, xs, ms, self._noise, constant)
        return x

    @property
    def state(self) -> Array:
        """The last final state, (size,)."""
        return self.result if self.result is not None else self._X[self.lo - self._base, :]

    def _slide(self, accepted: int, sound: int) -> None:
        """Drop final nodes; keep the next up to ``sound`` nodes of the window; fill in new ones."""
        n, first_new = len(self._recurrence), self.lo + sound
        x = None
        for i in range(self.lo, self.lo + accepted):  # final states come from the recurrence itself, to the last bit
            x = self._advance(i)
            if i + 1 < first_new:
                self._X = assign(self._X, (i + 1 - self._base, slice(None)), x)
            if self.kept is not None:
                self.kept.append(x)
            if i + 1 == n:
                self._end(x)
                return
        self.lo += accepted
        width = 1 if self.lo <= self._plan.warmup_steps else self._plan.width
        self._fill(first_new, min(self.lo + width, n))
        if self.lo == first_new:  # the whole window is final, so the first new state is too
            self._X = assign(self._X, (first_new - self._base, slice(None)), x)

    def _end(self, x: Array) -> None:
        """The last state is final: the sample, unless the arithmetic overflowed in the last step."""
        n = len(self._recurrence)
        if bool(self._xp.all(self._xp.isfinite(x))):
            self.result, self.status, self.lo = x, Status.CONVERGED, n
        else:
            self.status, self.failed_node, self.lo = Status.NONFINITE_SOLVER, n - 1, n - 1

    def _fill(self, first: int, hi: int, forecast: Forecast | None = None) -> None:
        """Nodes ``first .. hi - 1``, as forecast or from the node before them."""
        forecast = forecast or self._forecast
        if hi <= first:
            return
        self._make_room(first, hi)
        self._evaluated[first:hi] = False
        self.hi = hi
        if forecast is not None:
            self._put(self._along(forecast, first - 1), hi - first)
        elif self._method.fill == "copy":
            self._put(self._copies(first - 1), hi - first)
        else:
            self._fill_held(first, hi)

    def _put(self, filled: Iterator[tuple[int, Array, Array | None]], count: int) -> None:
        """Write ``count`` nodes with their states and beliefs."""
        for j, x, m in islice(filled, count):
            self._X = assign(self._X, (j - self._base, slice(None)), x)
            self._M = assign(self._M, (j - self._base, slice(None)), m)

    def _fill_held(self, first: int, hi: int) -> None:
        """Nodes ``first .. hi - 1`` with the prediction of the node before them."""
        last, recurrence = first - 1, self._recurrence
        xs, ms = self._history(last)
        noisy = [i for i in range(last, hi - 1) if recurrence.c[i] != 0]
        # The new rows are fixed combinations of these arrays, found by running the recurrence on unit vectors. The held
        # quantity stands for the last output: made once, its rounding is the same in all rows, which must fit together.
        p, q = recurrence.held[last]
        held = xs[0] * float(p) + ms[0] * float(q)
        sources = [*xs, held, *ms[1:], *(self._noise(i) for i in noisy)]
        if self._method.fill == "evaluated":
            sources.append(self._dX[last - self._base, :])
        units = list(np.eye(len(sources)))
        x_units, m_units = units[: len(xs)], units[len(xs) : 2 * len(xs)]
        constant = m_units[0]
        m_units[0] = (constant - p * x_units[0]) / q
        if self._method.fill == "evaluated":  # as the network gave it, before the correction
            constant = constant - (p + q * self._slope[last]) * units[-1]
        noise_units = dict(zip(noisy, units[2 * len(xs) :], strict=False))
        new = islice(self._continuation(last, x_units, m_units, noise_units.get, constant), hi - first)
        states, outputs = zip(*((x, m) for _, x, m in new), strict=True)
        table = self._xp.asarray(np.stack([*states, *outputs]), dtype=self._X.dtype, device=device(self._X))
        filled = self._xp.matmul(table, self._xp.stack(sources))
        rows, count = slice(first - self._base, hi - self._base), hi - first
        self._X = assign(self._X, (rows, slice(None)), filled[:count, :])
        self._M = assign(self._M, (rows, slice(None)), filled[count:, :])

    def _advance(self, i: int) -> Array:
        z = self._noise(i) if self._recurrence.c[i] != 0 else None
        return self._recurrence.advance(i, *self._history(i), z)

    def _history(self, i: int) -> tuple[list[Array], list[Array]]:
        """States and outputs at ``i, i - 1, ...`` as far as the recurrence reads."""
        rows = [j - self._base for j in range(i, max(i - self._recurrence.memory, -1), -1)]
        return [self._X[row, :] for row in rows], [self._M[row, :] for row in rows]

    def _continuation(
        self, last: int, xs: list[Array], ms: list[Array], noise: Callable[[int], Array | None], constant: Array
    ) -> Iterator[tuple[int, Array, Array | None]]:
        """States and outputs after node ``last`` with the held quantity (the predicted sample) constant; ends at N.

        ``xs`` and ``ms`` are the states and outputs at ``last, last - 1, ...``.
        """
        held = self._recurrence.held

        def believe(j: int, x: Array) -> Array:
            p, q = held[j]
            return (constant - x * float(p)) * float(1 / q)

        return self._steps(last, xs, ms, noise, believe)

    def _along(self, forecast: Forecast, last: int) -> Iterator[tuple[int, Array, Array | None]]:
        """States and outputs after node ``last`` as forecast."""

        def believe(j: int, x: Array) -> Array:
            return forecast(j, x, float(self._slope[j]))

        return self._steps(last, *self._history(last), self._noise, believe)

    def _copies(self, last: int) -> Iterator[tuple[int, Array, Array | None]]:
        """The state after node ``last`` again and again, with the outputs that would make it so."""
        (xs, ms), memory = self._history(last), self._recurrence.memory
        x = self._advance(last)
        for j in range(last + 1, len(self._recurrence)):
            xs, ms = [x, *xs[: memory - 1]], ms[: memory - 1]
            m = self._stay(j, x, xs, ms)
            yield j, x, m
            ms = [m, *ms]

    def _stay(self, i: int, x: Array, xs: list[Array], ms: list[Array]) -> Array:
        """The output that makes step i end where it begins."""
        z = self._noise(i) if self._recurrence.c[i] != 0 else None
        return self._recurrence.implied_output(self._xp, i, x, xs, ms, z)

    def _steps(
        self,
        last: int,
        xs: list[Array],
        ms: list[Array],
        noise: Callable[[int], Array | None],
        believe: Callable[[int, Array], Array],
    ) -> Iterator[tuple[int, Array, Array | None]]:
        """The recurrence from node ``last`` to N, with ``believe(j, x)`` in the place of the network."""
        n, memory = len(self._recurrence), self._recurrence.memory
        for i in range(last, n):
            z = noise(i) if self._recurrence.c[i] != 0 else None
            x = self._recurrence.advance(i, xs, ms, z)
            m = believe(i + 1, x) if i + 1 < n else None
            yield i + 1, x, m
            xs, ms = [x, *xs[: memory - 1]], [m, *ms[: memory - 1]]

    def _make_room(self, first_new: int, hi: int) -> None:
        """Move the rows to the front of the buffers when the window would run over their end."""
        if hi - self._base <= self._X.shape[0]:
            return
        first = max(min(self.lo, first_new - 1) - self._recurrence.memory + 1, 0)
        rows = slice(first - self._base, first_new - self._base)
        front = slice(0, first_new - first)
        self._X, self._M, self._dX = (
            assign(buffer, (front, slice(None)), self._xp.asarray(buffer[rows, :], copy=True))
            for buffer in (self._X, self._M, self._dX)
        )
        self._base = first

    def _rows(self) -> slice:
        return slice(self.lo - self._base, self.hi - self._base)

    def _salvage(self, D: Array) -> SampleRecord:
        """The round's sums are not finite: whose fault is it, and what of the round can be kept?"""
        nodes, nothing = self.nodes, np.full(len(self.nodes), np.nan)
        inputs_ok, outputs_ok = finite_rows(self._xp, self.inputs), finite_rows(self._xp, D)
        model = inputs_ok & ~outputs_ok
        if model.any() or not inputs_ok[0]:
            self.status = Status.NONFINITE_MODEL if model.any() else Status.NONFINITE_SOLVER
            self.failed_node = self.lo + (int(np.argmax(model)) if model.any() else 0)
            while self.lo > self._base and not finite_rows(self._xp, self.inputs[:1, :])[0]:
                self.lo -= 1  # the last state that is good
            return SampleRecord(self.index, nodes, 0, nothing, nothing, self.error)
        # the network is well, but a correction or a sum of squares overflowed: keep the first node, drop the others
        self._M = assign(
            self._M, (self.lo - self._base, slice(None)), self._xp.astype(D[0, :], self._M.dtype, copy=False)
        )
        self._evaluated[nodes] = True
        self._slide(1, 1)
        return SampleRecord(self.index, nodes, 1, nothing, nothing, self.error)
