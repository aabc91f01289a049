"""One row of a network's call against the same row alone, and what it means when they differ."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from parasolver_core.arrays import Array, to_host, working_dtype
from parasolver_core.denoiser.calls import out_of_memory
from parasolver_core.denoiser.evaluator import Evaluator
from parasolver_core.errors import CoupledRowsError, NondeterministicDenoiserError
from parasolver_core.samplers.recurrence import Recurrence

Float64 = NDArray[np.float64]

_SINGLE = float(np.finfo(np.float32).eps)
_CLOSE = 1e-2  # relative differences up to this, and the root of the network's rounding, are looked at no closer
_BATCHING = 0.1  # what kernels for other row counts may make of a row, guidance and half precision included
_REPEAT = 2e-2  # what a half-precision network may differ by between two equal calls (sums in no fixed order)


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


class RowAlone:
    """Evaluates rows of one run again, each in a call of its own.

    Args:
        evaluator: calls the network.
        x_T: ``(batch, *event)``.
        recurrence: the sampler.
        tolerance: of the run.
    """

    def __init__(self, evaluator: Evaluator, x_T: Array, recurrence: Recurrence, tolerance: float) -> None:
        self._evaluate, self._recurrence, self._tolerance = evaluator, recurrence, tolerance
        self._xp: Any = array_namespace(x_T)
        self._event, self._eps = tuple(x_T.shape[1:]), float(self._xp.finfo(x_T.dtype).eps)
        self.evaluated = 0  # rows, so far

    def compare(self, row: Row) -> None:
        """A row's prediction with that of the row alone."""
        batched = self.host(row.prediction)
        if not np.all(np.isfinite(batched)):
            return  # of a guess
        alone = self._alone(row)
        if not distance(batched, alone) <= self.close(alone):
            self._explain(row, batched, alone)

    def compare_together(self, rows: list[Row]) -> None:
        """Rows in one call, behind the last of them, where another row's time shows; those that differ alone then.

        One that is right as it was and differs here tells as much: what does no harm in this run may in another.
        """
        rows = sorted(rows, key=lambda row: -row.node)
        if not rows:
            return
        nodes, samples = (np.array([getattr(row, of) for row in rows]) for of in ("node", "sample"))
        x = self._xp.reshape(self._xp.stack([row.x for row in rows]), (len(rows), *self._event))
        self.evaluated += self._evaluate.rows(nodes)
        together = self._xp.reshape(self._evaluate(x, nodes, samples), (len(rows), -1))
        for place, row in enumerate(rows):
            prediction = self.host(together[place, :])
            if not distance(self.host(row.prediction), prediction) <= self.close(prediction):
                self.compare(row)
                self.compare(replace(row, prediction=together[place, :], place=place, count=len(rows)))

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
        limit = max(self.close(alone), self._tolerance / 10 if mixed else max(_BATCHING, 2 * math.sqrt(precision)))
        if difference <= limit or (not mixed and self._harmless(row, batched - alone)):
            return
        raise CoupledRowsError(self._coupled(row, difference, mixed))

    def _harmless(self, row: Row, difference: Float64) -> bool:
        """Whether so many steps with such an error would not show: an output near 0 has no size to compare with."""
        x, b = self.host(row.x), np.max(np.abs(self._recurrence.b[row.node]))
        return len(self._recurrence) * b * _rms(difference) <= math.sqrt(_SINGLE) * _rms(x)

    def close(self, prediction: Float64) -> float:
        """Predictions that differ by no more are looked at no closer."""
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
        self.evaluated += self._evaluate.rows(nodes)
        return self.host(xp.reshape(self._evaluate(rows, nodes, samples), (count, -1)))

    def host(self, values: Array) -> Float64:
        """The values in float64."""
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
    with np.errstate(all="ignore"):
        difference = _rms(got - expected)
        size = np.maximum(_rms(got), _rms(expected))
        share = np.divide(difference, size, where=difference != 0, out=np.zeros_like(difference))
    return float(np.max(np.where(np.isnan(share), np.inf, share)))


def _rms(values: Float64) -> Float64:
    return np.asarray(np.sqrt(np.mean(values**2, axis=-1)))


def _precision(values: Float64) -> float:
    """The coarsest rounding unit that a network's numbers betray: they fit half precision, or float32, all of them."""
    with np.errstate(over="ignore", under="ignore"):
        single = values.astype(np.float32)
    if not np.array_equal(single, values):
        return float(np.finfo(np.float64).eps)
    if np.all(single.view(np.uint32) & 0xFFFF == 0):
        return 2.0**-7  # bfloat16
    with np.errstate(over="ignore", under="ignore"):
        half = np.array_equal(single.astype(np.float16), single)
    return float(np.finfo(np.float16).eps) if half else _SINGLE
