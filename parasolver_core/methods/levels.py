"""Nodes spread over the whole trajectory: which ones, and the sampler as seen from them; tables on the host."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from parasolver_core.samplers.recurrence import UNDECIDED, Recurrence
from parasolver_core.samplers.tables import in_held

Float64 = NDArray[np.float64]
Indices = NDArray[np.int64]

_MOST_KNOWN = 4  # samplers whose levels a process remembers


@dataclass(frozen=True)
class Level:
    """The recurrence seen from n nodes, with the predictions between them interpolated; tables on the host.

    Args:
        nodes: (n,), increasing, the first of them 0.
        free: (n,), what each node's state is made of ``x_T``.
        response: (n, n), what each node's state is made of the predictions at the nodes. A state depends on the
            prediction at the next node too, which the interpolation before it reads.
        end_free, end: the same for the sample: a number, and (n,).
    """

    nodes: NDArray[np.int64]
    free: Float64
    response: Float64
    end_free: float
    end: Float64

    @classmethod
    def of(cls, recurrence: Recurrence, nodes: NDArray[np.int64]) -> Level:
        """Carry ``x_T`` and the interpolated predictions through the recurrence, in float64."""
        n = len(recurrence)
        a, b = in_held(recurrence.a, recurrence.b, recurrence.held)
        source = interpolation(np.arange(n), nodes, recurrence.stages)
        states = np.zeros((n + 1, len(nodes) + 1))  # last column: x_T
        states[0, -1] = 1.0
        for k in range(b.shape[1]):
            states[k + 1 :, :-1] += b[k:, k, None] * source[: n - k]
        rows = list(states)
        for i, weights in enumerate(a.tolist()):
            for k, weight in enumerate(weights):  # 0 where k > i
                if weight != 0:
                    rows[i + 1] += weight * rows[i - k]
        return cls(nodes, states[nodes, -1], states[nodes, :-1], float(states[n, -1]), states[n, :-1])


def interpolation(at: Indices, nodes: Indices, stages: int = 1) -> Float64:
    """Weights (len(at), len(nodes)) of linear interpolation between nodes of one stage, constant beyond their ends.

    Where there are none of the same stage, all nodes are used.
    """
    weights = np.zeros((len(at), len(nodes)))
    for stage in range(stages):
        rows, between = np.flatnonzero(at % stages == stage), np.flatnonzero(nodes % stages == stage)
        between = between if len(between) else np.arange(len(nodes))
        place = np.interp(at[rows], nodes[between], np.arange(len(between)))
        weights[np.ix_(rows, between)] = np.maximum(1 - np.abs(place[:, None] - np.arange(len(between))), 0.0)
    return weights


class Levels:
    """The levels of one sampler: samples and runs refine alike, so each is made once and shared."""

    _known: ClassVar[dict[Hashable, Levels]] = {}  # of the samplers used last: making them takes as long as rounds do

    @classmethod
    def of(cls, recurrence: Recurrence) -> Levels:
        """Those of an equal sampler, if this process has met it before."""
        tables = (recurrence.a, recurrence.b, recurrence.held, recurrence.signal)
        key = (recurrence.stages, *(None if table is None else (table.shape, table.tobytes()) for table in tables))
        levels = cls._known.pop(key, None) or cls(recurrence)
        cls._known[key] = levels
        for oldest in list(cls._known)[:-_MOST_KNOWN]:
            cls._known.pop(oldest, None)
        return levels

    def __init__(self, recurrence: Recurrence) -> None:
        self._recurrence = recurrence
        self._place = placement(recurrence)
        self._made: dict[bytes, Level] = {}

    def __call__(self, nodes: Indices) -> Level:
        key = nodes.tobytes()
        if key not in self._made:
            self._made[key] = Level.of(self._recurrence, nodes)
        return self._made[key]

    def first(self, count: int) -> Level:
        """About ``count`` nodes of whole steps, fewer where two would fall together."""
        stages = self._recurrence.stages
        nodes = self._nearest(np.linspace(0.0, 1.0, max(2, count // stages)))
        last_whole = (len(self._place) // stages - 1) * stages  # with the last node of every stage
        return self(self._whole_steps(np.append(nodes, last_whole)))

    def opening(self, count: int) -> Level:
        """Those of the first nodes whose states hardly depend on the sample."""
        nodes = self.first(count).nodes
        return self(nodes[nodes < self._recurrence.blind])

    def finer(self, level: Level) -> Level:
        """The level with the midpoints added."""
        stages = self._recurrence.stages
        first = level.nodes[level.nodes % stages == 0]  # of each step
        left, right = first[:-1], first[1:]
        middle = self._nearest((self._place[left] + self._place[right]) / 2)
        middle = np.clip(middle, left + stages, np.maximum(right - stages, left))
        return self(np.union1d(level.nodes, self._whole_steps(middle)))

    def _whole_steps(self, nodes: Indices) -> Indices:
        """All nodes of the steps to which these belong, increasing; the last step may have fewer of them."""
        stages = self._recurrence.stages
        every = (nodes // stages * stages)[:, None] + np.arange(stages)
        return np.unique(every[every < len(self._recurrence)])

    def _nearest(self, at: Float64) -> Indices:
        return np.round(np.interp(at, self._place, np.arange(len(self._place)))).astype(np.int64)


def placement(recurrence: Recurrence) -> Float64:
    """Where each step lies in [0, 1] if nodes are to be equally far apart, (N,), increasing.

    Half of it counts steps. The other half counts the logarithm of the signal-to-noise ratio, in which the predicted
    sample is smooth (Lu et al., "DPM-Solver", NeurIPS 2022): schedules pass through much of it in their first and last
    few steps. Either half alone was measured to need two to four times as many nodes.
    """
    steps = np.linspace(0.0, 1.0, len(recurrence))
    if recurrence.signal is None:
        return steps
    share = np.clip(recurrence.signal, UNDECIDED, np.sqrt(1 - 1e-8))
    log_snr = np.maximum.accumulate(np.log(share) - np.log1p(-(share**2)) / 2)
    span = log_snr[-1] - log_snr[0]
    return (steps + (log_snr - log_snr[0]) / span) / 2 if span > 0 else steps
