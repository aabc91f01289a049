"""Looking once at a network's rows as the plain loop would see them: alone.

A parallel round asks more of a network than the plain loop does: rows of many steps and samples in one call, each of
which may depend on that row alone. So a few rows of a run are evaluated again, in calls of one row, and compared.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from parasolver_core.arrays import Array, copied
from parasolver_core.denoiser.alone import Row, RowAlone, distance
from parasolver_core.denoiser.evaluator import Evaluator
from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.solution import SampleRecord

Float64 = NDArray[np.float64]
Indices = NDArray[np.int64]

_AT_END = 5  # rows of the finished trajectory that are looked at alone
_TOGETHER = 6  # further rows of it that are looked at in one call,
_MANY = 32  # so many where states are small, but not more than a round has
_SMALL = 2**22  # elements of a trajectory: one more copy of it is no matter
_GOLDEN = (math.sqrt(5) - 1) / 2


class RowCheck:
    """The rows of one run that are looked at.

    In the first round that holds several nodes of a sample: one of the last sample's, in a place that conditions tiled
    over the rows would not fit. With the next such round the first row of all once more. At the end, nodes of the
    finished trajectory: alone those farthest from all that were ever first in a call, as a network may take the first
    row's time for all; together others, above all those after which its next output came as a surprise.

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
        self._denoiser, self._recurrence, self._batch = denoiser, recurrence, int(x_T.shape[0])
        self._alone = RowAlone(evaluator, x_T, recurrence, tolerance)
        self._xp: Any = array_namespace(x_T)
        self._start = self._xp.reshape(self._xp.astype(x_T[:1, ...], dtype), (1, -1))
        self._first: Row | None = None  # the first row of all,
        self._again: Row | None = None  # and the same once more
        self._looked = False
        self._rounds, self._accepted, self._together = 0, 2, _TOGETHER
        self._small = len(recurrence) * math.prod(x_T.shape[1:]) <= _SMALL
        self._led: set[int] = set()  # nodes that were first in a call
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
        self._led.add(int(nodes[0][0]))
        if inputs[-1] is self._start:
            (self._again,) = self._copies(inputs[-1], D, count - 1, [0], 0)
            inputs, nodes, owners = inputs[:-1], nodes[:-1], owners[:-1]
        inputs, nodes, samples = _by_sample(inputs, nodes, owners)
        if self._rounds == 0:
            (self._first,) = self._copies(inputs[0][:1, :], D, 0, nodes[0][:1], samples[0])
        several = [k for k, rows in enumerate(nodes) if len(rows) > 1]
        if several:
            last = several[-1]
            first, at = sum(len(earlier) for earlier in nodes[:last]), nodes[last]
            inner = range(0 if first else 1, len(at))  # not the first row of the call
            if self._small:
                self._together = max(self._together, min(_MANY, sum(map(len, nodes))))
            else:
                inner = [min(max(self._wanted(self._accepted, len(at)), inner[0]), inner[-1])]
            part = slice(inner[0], inner[-1] + 1)
            self._now = self._copies(inputs[last][part, :], D, first + inner[0], at[part], samples[last])
        self._rounds += 1

    def look(self, records: Sequence[SampleRecord]) -> int:
        """After a round, before the next: compare; how many rows were evaluated for that.

        Raises:
            NondeterministicDenoiserError, CoupledRowsError: the network does not do what is asked of it.
        """
        before = self._alone.evaluated
        if self._again is not None:
            first, again = self._first, self._again
            assert first is not None
            predictions = self._alone.host(first.prediction), self._alone.host(again.prediction)
            if not distance(*predictions) <= self._alone.close(predictions[1]):
                self._alone.compare(first)
                self._alone.compare(again)
            self._first = self._again = None
        if self._now and not self._looked:
            self._looked = True
            untiled = [row for row in self._now if row.place % max(self._batch, 2)] or self._now
            spread = next(record.accepted == 0 for record in records if record.sample == self._now[0].sample)
            self._alone.compare(untiled[len(untiled) // 2 if spread else 0])
        self._keep({record.sample: record for record in records})
        return self._alone.evaluated - before

    def finish(self) -> int:
        """The trajectory is finished: the last comparisons, and the denoiser is remembered."""
        before = self._alone.evaluated
        rows = self._kept if self._before is None else [*self._kept, self._before]
        for _ in range(min(_AT_END, len(rows))):
            far = max(range(len(rows)), key=lambda k: min(abs(rows[k].node - node) for node in self._led))
            self._led.add(rows[far].node)
            self._alone.compare(rows.pop(far))
        self._alone.compare_together(rows[-self._together :])
        if self._looked:
            remember(self._denoiser, self._batch)
        return self._alone.evaluated - before

    def _wanted(self, accepted: int, count: int) -> int:
        """Which of a sample's nodes to look at: amid those accepted; spread nodes, which end together, in turns."""
        return accepted // 2 if 0 < accepted <= count else int((self._rounds * _GOLDEN) % 1 * count)

    def _copies(self, x: Array, D: Array, first: int, nodes: Sequence[int] | Indices, sample: int) -> list[Row]:
        """Rows x of the call, (k, size), from place ``first`` on, in memory of their own."""
        x, predictions = (copied(self._xp, rows) for rows in (x, D[first : first + len(nodes), :]))
        count = D.shape[0]
        return [Row(x[k, :], predictions[k, :], int(i), sample, first + k, count) for k, i in enumerate(nodes)]

    def _keep(self, records: dict[int, SampleRecord]) -> None:
        """Of the rows accepted behind a window's first keep all, or of large states one a round, the latest of a node.

        Last come those after which the next round surprised most: where a network takes the first row's time for all,
        its outputs change when another node becomes the first.
        """
        before, self._before = self._before, None
        if before is not None and before.sample in records:
            record = records[before.sample]
            size = abs(float(self._recurrence.held[record.first, 1]))  # in units of the predicted sample
            self._kept.append(replace(before, score=size * float(record.defects[0])))
        if self._now:
            record = records[self._now[0].sample]
            self._accepted = accepted = record.accepted
            final = record.nodes[:accepted] if accepted else record.nodes[[self._wanted(0, record.window)]]
            rows = [row for row in self._now if row.node in final]
            if rows and 0 < accepted <= record.window:
                self._before = rows.pop(len(rows) // 2)
            self._kept += rows
        kept = list({row.node: row for row in self._kept}.values())
        room = len(kept) if self._small else _AT_END + _TOGETHER
        self._kept = sorted(kept, key=lambda row: row.score)[-room:]


def _by_sample(
    inputs: Sequence[Array], nodes: Sequence[Indices], owners: Sequence[Indices]
) -> tuple[list[Array], list[Indices], list[int]]:
    """Rows in parts as rows of one sample each."""
    rows, steps, samples = [], [], []
    for x, at, who in zip(inputs, nodes, owners, strict=True):
        ends = [*(np.flatnonzero(np.diff(who)) + 1).tolist(), len(who)]
        for start, end in pairwise([0, *ends]):
            rows.append(x[start:end, :])
            steps.append(at[start:end])
            samples.append(int(who[start]))
    return rows, steps, samples


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
