"""Nodes spread over the whole trajectory: what to do when there are many more steps than the window holds.

The network is evaluated at a few nodes only. Between them the predicted sample (the held quantity ``h = p x + q m`` of
the recurrence) is interpolated linearly, which closes the system: every state is a linear function of ``x_T`` and of
the predictions at the nodes. The nodes are solved for together, with the same slopes and the same correction as in a
sliding window. Then the midpoints join, and their defects are the interpolation's error, measured; when these no
longer change the sample, it is done. Only an ODE sampler has a trajectory smooth enough for this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from parasolver_core.arrays import Array, finite_rows
from parasolver_core.correction import Moments, inner_products
from parasolver_core.recurrence import Recurrence
from parasolver_core.solution import SampleRecord, Status
from parasolver_core.window import Plan

Float64 = NDArray[np.float64]

_CAUTION = 0.4  # what is asked of every change of the sample, in units of the tolerance
_SKIP = 0.3  # a node moved by less, in units of the tolerance, keeps its last evaluation
_STALE = 0.6  # a level may end while a node has moved by up to this since it was evaluated


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
        a, b = recurrence.held_form()
        source = interpolation(np.arange(n), nodes)
        states = np.zeros((n + 1, len(nodes) + 1))  # last column: x_T
        states[0, -1] = 1.0
        for i in range(n):
            for k in range(min(a.shape[1], i + 1)):
                states[i + 1] += a[i, k] * states[i - k]
                states[i + 1, :-1] += b[i, k] * source[i - k]
        return cls(nodes, states[nodes, -1], states[nodes, :-1], float(states[n, -1]), states[n, :-1])


def interpolation(at: NDArray[np.int64], nodes: NDArray[np.int64]) -> Float64:
    """Weights (len(at), len(nodes)) of linear interpolation between nodes, constant beyond their ends."""
    return np.stack([np.interp(at, nodes, unit) for unit in np.eye(len(nodes))], axis=1)


class Levels:
    """The levels of one run: samples refine alike, so each is made once and shared."""

    def __init__(self, recurrence: Recurrence) -> None:
        self._recurrence = recurrence
        self._made: dict[bytes, Level] = {}

    def __call__(self, nodes: NDArray[np.int64]) -> Level:
        key = nodes.tobytes()
        if key not in self._made:
            self._made[key] = Level.of(self._recurrence, nodes)
        return self._made[key]


class SpreadNodes:
    """One sample's nodes spread over the trajectory; serves the solver as a sliding window does.

    Args:
        plan: what all samples share; the recurrence is without noise.
        levels: the tables that all samples share.
        index: the sample's place in the batch.
        start: ``x_T`` of the sample, (size,), in the working dtype.
    """

    def __init__(self, plan: Plan, levels: Levels, index: int, start: Array) -> None:
        self._plan, self._levels, self.index, self._start = plan, levels, index, start
        self._xp = xp = plan.xp
        self._recurrence = recurrence = plan.recurrence
        self.status, self.failed_node, self.error = Status.RUNNING, -1, 0.0
        self.lo, self.result, self.kept = 0, None, None
        self._rounds, self._checking = 0, False
        self._tolerance = _CAUTION * plan.tolerance
        p, q = recurrence.held[:, 0], recurrence.held[:, 1]
        self._slope = p + q * plan.method.linearization.initial(recurrence)  # of the held quantity
        self._level = levels(np.zeros(1, dtype=np.int64))
        self._X = xp.reshape(xp.asarray(start, copy=True), (1, -1))
        self._H = xp.zeros_like(self._X)
        self._since = xp.zeros_like(self._X)  # how far each input has moved since its last evaluation
        self._moved = np.full(1, np.inf)  # at least the RMS of that over the input's; inf: never evaluated
        self._scale = np.ones(1)

    @property
    def running(self) -> bool:
        """Whether the sample takes part in the next round."""
        return self.status is Status.RUNNING

    @property
    def exhausted(self) -> bool:
        """Whether a sliding window would have been done by now."""
        return self._rounds > len(self._recurrence) // self._plan.width + 16

    @property
    def nodes(self) -> NDArray[np.int64]:
        """The nodes of the next round: those that moved, the first ``width`` of them."""
        return self._level.nodes[self._due]

    @property
    def _due(self) -> NDArray[np.int64]:
        return np.flatnonzero(self._moved > _SKIP * self._tolerance)[: self._plan.width]

    @property
    def inputs(self) -> Array:
        """The states of :attr:`nodes`, (n, size)."""
        return self._take(self._X, self._due)

    @property
    def state(self) -> Array:
        """The last final state, (size,)."""
        return self._start if self.result is None else self.result

    def take_defect(self, D: Array) -> Array:
        """First half of a round: compare the outputs D, (n, size), with belief; inner products for the host."""
        due, xp = self._due, self._xp
        X = self._take(self._X, due)
        held = self._recurrence.held[self.nodes]
        self._R = self._column(held[:, 0]) * X + self._column(held[:, 1]) * D - self._take(self._H, due)
        return inner_products(xp, X, self._take(self._since, due), self._R)

    def correct(self, D: Array, moments: Moments) -> SampleRecord:
        """Second half: update the slopes, move all states, and refine where the level has settled."""
        due, nodes = self._due, self.nodes
        self._rounds += 1
        if not np.all(np.isfinite(np.concatenate([moments.size, np.diag(moments.gram)]))):
            return self._fail(D, moments, nodes)
        size = self._X.shape[1]
        known = np.isfinite(self._moved[due])
        moved = np.where(known, moments.moved, 0.0)
        self._slope[nodes] = self._plan.method.linearization.update(self._slope[nodes], moved, moments.cross)
        self._scale[due] = np.sqrt(moments.size / size)

        g, C = self._slope[self._level.nodes], self._level.response
        T = np.linalg.solve(np.eye(len(g)) - C * g, C[:, due]).astype(np.float64, copy=False)
        move = moments.norms(T) / np.sqrt(size) / self._scale
        at_end = self._level.end[due] + (self._level.end * g) @ T
        change = moments.norms(at_end[None, :])[0] / np.sqrt(size) / self._scale[-1]
        self._apply(due, T, g)
        self._moved[due] = 0.0
        self._moved = self._moved + move
        self.error = float(change)
        self._settle(self.error)
        defects = np.sqrt(np.diag(moments.gram) / size)
        accepted = len(self._recurrence) if self.status is Status.CONVERGED else 0
        return SampleRecord(self.index, nodes, accepted, move[due], defects, self.error)

    def estimate(self) -> Array:
        """The sample, or the best estimate of it so far, (size,)."""
        if self.result is not None or self._rounds == 0 or self.status is not Status.RUNNING:
            return self.state
        return self._sample()

    def _apply(self, due: NDArray[np.int64], T: Float64, g: Float64) -> None:
        """Move all states by ``T r``; evaluated nodes believe what the network said, the others what it would say."""
        xp = self._xp
        step = xp.matmul(self._asarray(T), self._R)
        evaluated = np.zeros((len(g), len(due)))
        evaluated[due, np.arange(len(due))] = 1.0
        self._H = self._H + xp.matmul(self._asarray(evaluated), self._R) + self._column(g) * step
        kept = np.ones(len(g))
        kept[due] = 0.0
        self._X, self._since = self._X + step, self._column(kept) * self._since + step

    def _settle(self, change: float) -> None:
        """After a round: go on, refine, or end."""
        tolerance, complete = self._tolerance, len(self._level.nodes) == len(self._recurrence)
        small = change <= tolerance
        self._checking = self._checking and small
        if len(self._due) and not (small and np.max(self._moved) <= _STALE * tolerance):
            return
        if self._checking or complete:
            self.result, self.status, self.lo = self._sample(), Status.CONVERGED, len(self._recurrence)
            self.kept = self._all_states() if self._plan.keep else None
        else:
            self._refine()

    def _refine(self) -> None:
        """Add the midpoints (at first: spread the nodes), with interpolated predictions and slopes."""
        n, old = len(self._recurrence), self._level.nodes
        self._checking = len(old) > 1
        if len(old) == 1:
            nodes = np.unique(np.round(np.linspace(0, n - 1, self._plan.width)).astype(np.int64))
        else:
            nodes = np.union1d(old, (old[:-1] + old[1:]) // 2)
            self._slope[nodes] = np.interp(nodes, old, self._slope[old])
        self._level = self._levels(nodes)
        weights = interpolation(nodes, old)
        known = np.isin(nodes, old)
        self._H = self._xp.matmul(self._asarray(weights), self._H)
        self._since = self._xp.matmul(self._asarray(weights * known[:, None]), self._since)
        free = self._column(self._level.free) * self._start
        self._X = free + self._xp.matmul(self._asarray(self._level.response), self._H)
        moved = np.full(len(nodes), np.inf)
        moved[known] = self._moved
        self._moved, self._scale = moved, weights @ self._scale

    def _sample(self) -> Array:
        end = self._xp.matmul(self._asarray(self._level.end[None, :]), self._H)
        return self._start * self._level.end_free + self._xp.reshape(end, (-1,))

    def _all_states(self) -> list[Array]:
        """Every state, by the recurrence with interpolated predictions."""
        recurrence = self._recurrence
        weights = interpolation(np.arange(len(recurrence)), self._level.nodes)
        states, outputs = [self._start], []
        for i in range(len(recurrence)):
            h = self._xp.reshape(self._xp.matmul(self._asarray(weights[i : i + 1]), self._H), (-1,))
            p, q = recurrence.held[i]
            outputs.insert(0, (h - states[-1] * float(p)) * float(1 / q))
            del outputs[recurrence.memory :]
            states.append(recurrence.advance(i, states[: -recurrence.memory - 1 : -1], outputs))
        return states

    def _fail(self, D: Array, moments: Moments, nodes: NDArray[np.int64]) -> SampleRecord:
        model = ~finite_rows(self._xp, D) & np.isfinite(moments.size)
        self.status = Status.NONFINITE_MODEL if model.any() else Status.NONFINITE_SOLVER
        self.failed_node = int(nodes[int(np.argmax(model))])
        nothing = np.full(len(nodes), np.nan)
        return SampleRecord(self.index, nodes, 0, nothing, nothing, self.error)

    def _take(self, rows: Array, index: NDArray[np.int64]) -> Array:
        return self._xp.take(rows, self._xp.asarray(index, device=device(rows)), axis=0)

    def _asarray(self, table: Float64) -> Array:
        return self._xp.asarray(table, dtype=self._start.dtype, device=device(self._start))

    def _column(self, values: Float64) -> Array:
        return self._asarray(values[:, None])
