"""Looking once at a network's rows as the plain loop would see them: alone.

A parallel round asks more of a network than the plain loop does: rows of many steps and samples in one call, each of
which may depend on that row alone. So a few rows of a run are evaluated again, in calls of one row, and compared.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from parasolver_core.arrays import Array, copied, to_host, working_dtype
from parasolver_core.denoiser.calls import out_of_memory
from parasolver_core.denoiser.evaluator import Evaluator
from parasolver_core.errors import CoupledRowsError, NondeterministicDenoiserError
from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.solution import SampleRecord

Float64 = NDArray[np.float64]
Indices = NDArray[np.int64]

_SINGLE = float(np.finfo(np.float32).eps)
_CLOSE = 1e-2  # relative differences up to this, and the root of the network's rounding, are looked at no closer
_BATCHING = 0.1  # what kernels for other row counts may make of a row, guidance and half precision included
_REPEAT = 2e-2  # what a half-precision network may differ by between two equal calls (sums in no fixed order)
_AT_END = 3  # rows of the finished trajectory that are looked at alone
_TOGETHER = 6  # further rows of it that are looked at in one call,
_MANY = 32  # so many where states are small, but not more than a round has
_SMALL = 2**22  # elements of a round's states: one more copy of them is no matter
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Row:
    """A row of a round's call.

    Args:
        x, prediction: (size,), copies.
        node, sample: which it is.
        place, count: its place in the call, of so many rows.
        score: how much the outputs of the next round differed from what was believed.
    """

    x: Array
    prediction: Array
    node: int
    sample: int
    place: int
    count: int
    score: float = 0.0


class RowCheck:
    """The rows of one run that are looked at.

    In the first round that holds several nodes of a sample: one of the last sample's, in a place that conditions tiled
    over the rows would not fit. With the next such round the first row of all once more. At the end: nodes of the
    finished trajectory, above all those after which the network's next output came as a surprise.

    Args:
        denoiser: remembered, weakly, once it has passed.
        evaluator: calls it.
        x_T: ``(batch, *event)``.
        dtype: of the states.
        recurrence: the sampler.
        tolerance: of the run.
    """

    def __init__(
        self, denoiser: Any, evaluator: Evaluator, x_T: Array, dtype: Any, recurrence: Recurrence, tolerance: float
    ) -> None:
        self._denoiser, self._evaluate, self._recurrence, self._tolerance = denoiser, evaluator, recurrence, tolerance
        self._xp: Any = array_namespace(x_T)
        self._x_T, self._batch, self._event = x_T, int(x_T.shape[0]), tuple(x_T.shape[1:])
        self._eps = float(self._xp.finfo(x_T.dtype).eps)
        self._start = self._xp.reshape(self._xp.astype(x_T[:1, ...], dtype), (1, -1))
        self._first: Row | None = None  # the first row of all,
        self._again: Row | None = None  # and the same once more
        self._looked = False
        self._rounds, self._rows, self._accepted, self._room = 0, 0, 2, _AT_END + _TOGETHER
        self._now: list[Row] = []  # of this round: those of one sample behind its first
        self._before: Row | None = None  # of the last round, if it was accepted
        self._kept: list[Row] = []

    def with_extra(
        self, inputs: list[Array], nodes: list[Indices], owners: list[Indices]
    ) -> tuple[list[Array], list[Indices], list[Indices]]:
        """The rows of a call, in parts, and the first row of all behind them, if it is to be evaluated once more."""
        several = np.count_nonzero(owners[0] == owners[0][0]) > 1
        if self._first is None or self._again is not None or not several:
            return inputs, nodes, owners
        zero = np.zeros(1, dtype=np.int64)
        return [*inputs, self._start], [*nodes, zero], [*owners, zero]

    def note(self, inputs: Sequence[Array], nodes: Sequence[Indices], owners: Sequence[Indices], D: Array) -> None:
        """Before the states are moved: keep what will be looked at of a round's rows and their predictions.

        Args:
            inputs, nodes: of the rows, in parts, as :meth:`with_extra` gives them; rows are sample by sample.
            owners: the sample of each row.
            D: (rows, size).
        """
        count, self._now = D.shape[0], []
        if inputs[-1] is self._start:
            (self._again,) = self._copies(inputs[-1], D, count - 1, [0], 0)
            inputs, nodes, owners = inputs[:-1], nodes[:-1], owners[:-1]
        inputs, nodes, samples = _by_sample(inputs, nodes, owners)
        if self._rounds == 0:
            (self._first,) = self._copies(inputs[0][:1, :], D, 0, nodes[0][:1], samples[0])
        several = [k for k, own in enumerate(nodes) if len(own) > 1]
        if several:
            last = several[-1]
            first, own = sum(len(one) for one in nodes[:last]), nodes[last]
            inner = range(0 if first else 1, len(own))  # not the first row of the call
            if len(own) * D.shape[1] <= _SMALL:
                self._room = max(self._room, _AT_END + min(_MANY, count))
            else:
                inner = [min(max(self._wanted(self._accepted, len(own)), inner[0]), inner[-1])]
            part = slice(inner[0], inner[-1] + 1)
            self._now = self._copies(inputs[last][part, :], D, first + inner[0], own[part], samples[last])
        self._rounds += 1

    def look(self, records: Sequence[SampleRecord]) -> int:
        """After a round, before the next: compare; how many rows were evaluated for that.

        Raises:
            NondeterministicDenoiserError, CoupledRowsError: the network does not do what is asked of it.
        """
        self._rows = 0
        if self._again is not None:
            first, again = self._first, self._again
            assert first is not None
            predictions = self._host(first.prediction), self._host(again.prediction)
            if not distance(*predictions) <= self._close(predictions[1]):
                self._compare(first)
                self._compare(again)
            self._first = self._again = None
        if self._now and not self._looked:
            self._looked = True
            untiled = [row for row in self._now if row.place % max(self._batch, 2)] or self._now
            spread = next(record.accepted == 0 for record in records if record.sample == self._now[0].sample)
            self._compare(untiled[len(untiled) // 2 if spread else 0])
        self._keep({record.sample: record for record in records})
        return self._rows

    def finish(self) -> int:
        """The trajectory is finished: the last comparisons, and the denoiser is remembered."""
        self._rows = 0
        last = [] if self._before is None else [self._before]
        rows = [*last, *reversed(self._kept)]
        for row in rows[:_AT_END]:
            self._compare(row)
        self._compare_together(rows[_AT_END:])
        if self._looked:
            remember(self._denoiser, self._batch)
        return self._rows

    def _wanted(self, accepted: int, count: int) -> int:
        """Which of a sample's nodes to look at: the last accepted; spread nodes, which end together, in turns."""
        return accepted - 1 if 0 < accepted <= count else int((self._rounds * _GOLDEN) % 1 * count)

    def _copies(self, x: Array, D: Array, first: int, nodes: Sequence[int] | Indices, sample: int) -> list[Row]:
        """Rows x of the call, (k, size), from place ``first`` on, in memory of their own."""
        x, predictions = (copied(self._xp, one) for one in (x, D[first : first + len(nodes), :]))
        count = D.shape[0]
        return [Row(x[k, :], predictions[k, :], int(i), sample, first + k, count) for k, i in enumerate(nodes)]

    def _keep(self, records: dict[int, SampleRecord]) -> None:
        """Of the rows accepted behind a window's first, keep those after which the next round surprised most.

        Where a network takes the first row's time for all, its outputs change when another node becomes the first.
        """
        before, self._before = self._before, None
        if before is not None and before.sample in records:
            record = records[before.sample]
            size = abs(float(self._recurrence.held[record.first, 1]))  # in units of the predicted sample
            self._kept.append(replace(before, score=size * float(record.defects[0])))
        if self._now:
            record = records[self._now[0].sample]
            self._accepted = record.accepted
            node = record.nodes[self._wanted(record.accepted, record.window)]
            row = next((row for row in self._now if row.node == node), None)
            if row is not None and 0 < record.accepted <= record.window:
                self._before = row
            elif row is not None:
                self._kept.append(row)
        rows = {row.node: row for row in self._kept}  # the latest of each node
        kept = list(rows.values())
        order = sorted(range(len(kept)), key=lambda i: (kept[i].score, i))[-self._room :]
        self._kept = [kept[i] for i in order]

    def _compare(self, row: Row) -> None:
        """A row's prediction with that of the row alone."""
        batched = self._host(row.prediction)
        if not np.all(np.isfinite(batched)):
            return  # of a guess
        alone = self._alone(row)
        if not distance(batched, alone) <= self._close(alone):
            self._explain(row, batched, alone)

    def _compare_together(self, rows: list[Row]) -> None:
        """Rows in one call, behind the last of them, where another row's time shows; those that differ alone then."""
        rows = sorted(rows, key=lambda row: -row.node)
        if not rows:
            return
        nodes, samples = (np.array([getattr(row, of) for row in rows]) for of in ("node", "sample"))
        x = self._xp.reshape(self._xp.stack([row.x for row in rows]), (len(rows), *self._event))
        self._rows += len(rows)
        together = self._host(self._xp.reshape(self._evaluate(x, nodes, samples), (len(rows), -1)))
        for row, prediction in zip(rows, together, strict=True):
            if not distance(self._host(row.prediction), prediction) <= self._close(prediction):
                self._compare(row)

    def _explain(self, row: Row, batched: Float64, alone: Float64) -> None:
        """Two predictions of one row differ: by the arithmetic, by chance, or because of other rows?"""
        difference, repeat = distance(batched, alone), distance(self._alone(row), alone)
        precision = max(self._eps, _precision(alone))
        repeat = max(repeat, difference) if row.count == 1 else repeat
        if not repeat <= (_REPEAT if precision > _SINGLE else math.sqrt(_SINGLE)):
            raise self._nondeterministic(row, repeat)
        # kernels round a row as its place and the number of rows have it, whatever the other rows hold
        of_others = distance(self._call(row, row.count)[row.place], batched)
        mixed = not of_others <= max(difference / 2, 3 * repeat)
        limit = max(self._close(alone), self._tolerance / 10 if mixed else max(_BATCHING, 2 * math.sqrt(precision)))
        if difference <= limit or (not mixed and self._harmless(row, batched - alone)):
            return
        raise CoupledRowsError(self._coupled(row, difference, mixed))

    def _harmless(self, row: Row, difference: Float64) -> bool:
        """Whether so many steps with such an error would not show: an output near 0 has no size to compare with."""
        x, b = self._host(row.x), np.max(np.abs(self._recurrence.b[row.node]))
        return len(self._recurrence) * b * _rms(difference) <= math.sqrt(_SINGLE) * _rms(x)

    def _close(self, prediction: Float64) -> float:
        return min(math.sqrt(max(self._eps, _precision(prediction))), _CLOSE)

    def _alone(self, row: Row) -> Float64:
        """Its prediction in a call of one row."""
        try:
            return self._call(row, 1)[0]
        except Exception as error:
            if out_of_memory(error) or not self._fails_alone(row):
                raise
            raise CoupledRowsError(
                f"denoiser: it works for {row.count} rows and fails for one ({type(error).__name__}: {error}). A round "
                "evaluates any number of rows, each by itself: repeat conditions to x.shape[0] rows and not to a fixed "
                "batch, and call .eval() on the network (batch normalisation); check=False skips this test"
            ) from error

    def _fails_alone(self, row: Row) -> bool:
        """Whether an exception comes of the number of rows."""
        try:
            self._call(row, row.count)
        except Exception:
            return False
        try:
            self._call(row, 1)
        except Exception:
            return True
        return False

    def _call(self, row: Row, count: int) -> Float64:
        """The predictions of copies of a row, (count, size), on the host."""
        xp = self._xp
        rows = xp.reshape(xp.stack([row.x] * count), (count, *self._event))
        nodes, samples = np.full(count, row.node, dtype=np.int64), np.full(count, row.sample, dtype=np.int64)
        self._rows += self._evaluate.rows(nodes)
        return self._host(xp.reshape(self._evaluate(rows, nodes, samples), (count, -1)))

    def _host(self, values: Array) -> Float64:
        wide = self._xp.astype(values, working_dtype(self._xp, values.dtype))  # NumPy has no bfloat16
        return np.array(to_host(wide), dtype=np.float64)

    def _where(self, row: Row) -> str:
        return f"sample {row.sample}, timestep {self._recurrence.timesteps[row.node]}"

    def _nondeterministic(self, row: Row, difference: float) -> NondeterministicDenoiserError:
        return NondeterministicDenoiserError(
            f"denoiser: the same input ({self._where(row)}) gave predictions that differ by {difference:.2g} of their "
            "size from call to call. Call .eval() on the network, remove dropout, random numbers, whatever it keeps "
            "from earlier calls and normalisation over the batch; check=False skips this test"
        )

    def _coupled(self, row: Row, difference: float, mixed: bool) -> str:
        what = (
            "on the other rows of the call. It takes one row's timestep for all, such as t[0], or a mean, norm or "
            "attention over the batch"
            if mixed
            else "on its place in the call or on the number of rows. It tiles or repeats conditions in another order, "
            "or divides by the number of rows"
        )
        return (
            f"denoiser: a row ({self._where(row)}) alone and in a batch of {row.count} gave predictions that differ by "
            f"{difference:.2g} of their size: it depends {what}. Rows come sample by sample, of each sample as many as "
            "it has nodes in the round: use each row's own t, and take conditions by rows.samples in a denoiser with "
            "takes_rows = True. Call .eval() on the network. check_denoiser() says more; check=False skips this test"
        )


def distance(got: Float64, expected: Float64) -> float:
    """The largest distance of a row (..., size), RMS over the larger RMS; NaN is infinitely far."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        difference = _rms(got - expected)
        size = np.maximum(_rms(got), _rms(expected))
        share = np.divide(difference, size, where=difference != 0, out=np.zeros_like(difference))
    return float(np.max(np.where(np.isnan(share), np.inf, share)))


def _by_sample(
    inputs: Sequence[Array], nodes: Sequence[Indices], owners: Sequence[Indices]
) -> tuple[list[Array], list[Indices], list[int]]:
    """Rows in parts as rows of one sample each."""
    rows, steps, samples = [], [], []
    for x, own, who in zip(inputs, nodes, owners, strict=True):
        ends = [*(np.flatnonzero(np.diff(who)) + 1).tolist(), len(who)]
        for start, end in pairwise([0, *ends]):
            rows.append(x[start:end, :])
            steps.append(own[start:end])
            samples.append(int(who[start]))
    return rows, steps, samples


def _rms(values: Float64) -> Float64:
    return np.asarray(np.sqrt(np.mean(values**2, axis=-1)))


def _precision(values: Float64) -> float:
    """The coarsest rounding unit that a network's numbers betray: they fit half precision, or float32, all of them."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    if not np.array_equal(single, values):
        return float(np.finfo(np.float64).eps)
    if np.all(single.view(np.uint32) & 0xFFFF == 0):
        return 2.0**-7  # bfloat16
    with np.errstate(over="ignore"):
        half = np.array_equal(single.astype(np.float16), single)
    return float(np.finfo(np.float16).eps) if half else _SINGLE


_PASSED: dict[int, tuple[weakref.ref[Any], set[tuple[str, bool]]]] = {}  # by the id of the denoiser


def remembered(denoiser: Any, batch: int) -> bool:
    """Whether a denoiser has passed before, with one sample or with several."""
    owner, name = _identity(denoiser)
    known = _PASSED.get(id(owner))
    return known is not None and known[0]() is owner and (name, batch > 1) in known[1]


def remember(denoiser: Any, batch: int) -> None:
    """It has passed. What cannot be referred to weakly is not remembered."""
    owner, name = _identity(denoiser)
    key = id(owner)
    try:
        reference = weakref.ref(owner, lambda _: _PASSED.pop(key, None))
    except TypeError:
        return
    known = _PASSED.get(key)
    passed = known[1] if known is not None and known[0]() is owner else set()
    _PASSED[key] = (reference, passed | {(name, batch > 1)})


def _identity(denoiser: Any) -> tuple[Any, str]:
    """A bound method is made anew each time it is looked up: its object stands for it."""
    owner = getattr(denoiser, "__self__", None)
    return (denoiser, "") if owner is None else (owner, getattr(denoiser, "__name__", ""))
