"""Nodes spread over the whole trajectory: the trajectory is coarse before it is exact, so few nodes do at first.

The network is evaluated at a few nodes only. Between them the predicted sample (the held quantity ``h = p x + q m`` of
the recurrence) is interpolated linearly, which closes the system: every state is a linear function of ``x_T``, of the
noise and of the predictions at the nodes. The nodes are solved for together, with the same slopes and the same
correction as in a sliding window. As the rounds go on, the change of a round comes down to the error of the
interpolation; then the midpoints join, whose defects are that error, measured. When what is left of both is within the
tolerance, it is done. Where too many nodes would be needed for that, a sliding window goes on from what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray

from parasolver_core.acceptance import shares
from parasolver_core.arrays import Array, given_back, host_view, matmul
from parasolver_core.correction import Moments, inner_products
from parasolver_core.methods import sliding_rounds
from parasolver_core.recurrence import UNDECIDED, Recurrence
from parasolver_core.solution import SampleRecord, Status
from parasolver_core.window import Forecast, Plan

Float64 = NDArray[np.float64]
Indices = NDArray[np.int64]

_FIRST, _FIRST_NOISY = 13, 50  # nodes of the first level, or what the window holds; noise makes a trajectory rough
_FEWEST = 1.5  # nodes at the end, in units of that first level: fewer may step over what the network does between them;
_FEWEST_SHARE = 0.5  # of the steps, if that is less
_SKIP = 0.1  # a node moved by less, in units of the tolerance, keeps its last evaluation
_NEAR = 0.03  # with more nodes due than the window holds, those moved by less than this share of the most wait
_EARLY = 7.5  # midpoints that fit into one round join when a sweep changes the sample by less interpolation errors
_UNMEASURED = 0.067  # the interpolation error of the first level, until it is measured
_SETTLED = 0.2  # the last sweep's change of the sample, in units of the tolerance
_SWEEPS = 3  # sweeps over a level that follow its last refinement
_MOST_SWEEPS = 7  # over one level; where the network expands more are needed, and a short window is solved sooner
_MOST_DROPPED = 3  # rounds in which outputs were not finite, before a sliding window goes on
_ASTRAY = 0.8  # a sample that the third sweep over a level, or a later one, changes by so much of its size is lost;
_PATIENCE = 20.0  # from the (N / window / 20)^2-th on, as much is at stake where a window would slide for long
_GAIN, _GAIN_NOISY = 3.0, 2.0  # by what twice as many nodes divide the interpolation error
_MISSED = 2.0  # without noise: the interpolation error, in units of what the slopes say of it
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
        a, b = recurrence.held_form()
        source = interpolation(np.arange(n), nodes, recurrence.stages)
        states = np.zeros((n + 1, len(nodes) + 1))  # last column: x_T
        states[0, -1] = 1.0
        for k in range(b.shape[1]):
            states[k + 1 :, :-1] += b[k:, k, None] * source[: n - k]
        rows = list(states)
        for i, weights in enumerate(a.tolist()):
            for k, weight in enumerate(weights[: i + 1]):
                if weight != 0:
                    rows[i + 1] += weight * rows[i - k]
        return cls(nodes, states[nodes, -1], states[nodes, :-1], float(states[n, -1]), states[n, :-1])


def interpolation(at: Indices, nodes: Indices, stages: int = 1) -> Float64:
    """Weights (len(at), len(nodes)) of linear interpolation between nodes of one stage, constant beyond their ends.

    Where there are none of the same stage, all nodes are used.
    """
    weights = np.zeros((len(at), len(nodes)))
    for stage in range(stages):
        rows, own = np.flatnonzero(at % stages == stage), np.flatnonzero(nodes % stages == stage)
        own = own if len(own) else np.arange(len(nodes))
        place = np.interp(at[rows], nodes[own], np.arange(len(own)))
        weights[np.ix_(rows, own)] = np.maximum(1 - np.abs(place[:, None] - np.arange(len(own))), 0.0)
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
    n = len(recurrence)
    steps = np.linspace(0.0, 1.0, n) if n > 1 else np.zeros(1)
    if recurrence.signal is None or n == 1:
        return steps
    share = np.clip(recurrence.signal, UNDECIDED, np.sqrt(1 - 1e-8))
    log_snr = np.maximum.accumulate(np.log(share) - np.log1p(-(share**2)) / 2)
    span = log_snr[-1] - log_snr[0]
    return (steps + (log_snr - log_snr[0]) / span) / 2 if span > 0 else steps


@dataclass(frozen=True)
class Interpolated(Forecast):
    """Outputs expected by a sliding window that goes on from spread nodes.

    Args:
        weights: (N, n), of the nodes in each prediction (:func:`interpolation`).
        predictions: (n, size), of the held quantity at the nodes.
        held: (N, 2), as in :class:`~parasolver_core.recurrence.Recurrence`.
    """

    weights: Float64
    predictions: Array
    held: Float64

    def __call__(self, i: int, x: Array, slope: float) -> Array:
        p, q = self.held[i]
        weights = self.weights[i]
        used = np.flatnonzero(weights)
        h = self.predictions[int(used[0]), :] * float(weights[used[0]])
        for row in used[1:]:
            h = h + self.predictions[int(row), :] * float(weights[row])
        return (h - x * float(p)) * float(1 / q)


class SpreadNodes:
    """One sample's nodes spread over the trajectory; serves the solver as a sliding window does.

    On a CPU all arithmetic is NumPy's, as in a sliding window. The nodes that are due are evaluated in sweeps: a sweep
    ends when each node that was due at its beginning has been evaluated, which is one round unless more are due than
    the window holds. After a sweep it is decided how to go on.

    Args:
        plan: what all samples share.
        levels: the tables that all samples share.
        index: the sample's place in the batch.
        start: ``x_T`` of the sample, (size,), in the working dtype.
        noise: ``noise(step)``, (size,), as :func:`~parasolver_core.arrays.host_view` gives it.
    """

    def __init__(self, plan: Plan, levels: Levels, index: int, start: Array, noise: Callable[[int], Array]) -> None:
        self._plan, self._levels, self.index, self._noise = plan, levels, index, noise
        self._dtype, self._start = start.dtype, host_view(start)
        self._xp = xp = array_namespace(self._start)
        self._recurrence = recurrence = plan.recurrence
        self.status, self.failed_node, self.error = Status.RUNNING, -1, float("inf")
        self.lo = 0
        self._result: Array | None = None
        self._kept: list[Array] | None = None
        noisy = recurrence.stochastic
        self._tolerance = plan.method.acceptance.spread_tolerance(recurrence, plan.tolerance)
        self._gain = _GAIN_NOISY if noisy else _GAIN
        first = (_FIRST_NOISY if noisy else _FIRST) * recurrence.stages
        self._first, self._fewest = min(first, plan.width), min(_FEWEST * first, _FEWEST_SHARE * len(recurrence))
        self._influence = recurrence.influence
        p, q = recurrence.held[:, 0], recurrence.held[:, 1]
        self._slope = p + q * plan.method.linearization.initial(recurrence)  # of the held quantity
        self._rounds, self._dropped, self._lost, self._wild = 0, 0, False, False
        self._sliding_rounds = sliding_rounds(recurrence, plan.width, plan.tolerance)

        # rows of the level's nodes: states, predictions, moves of the states since their last evaluation
        self._opening = True  # nodes that need no prediction of the sample come first
        self._level = levels.opening(self._first)
        count = len(self._level.nodes)
        self._free: Array  # what the states are made of x_T and the noise; and the sample:
        self._end_free: Array
        self._set_free()
        self._X = self._free
        self._H, self._since = xp.zeros_like(self._X), xp.zeros_like(self._X)
        self._moved = np.full(count, np.inf)  # at least the RMS of `since` over the input's; inf: never evaluated
        self._scale = np.ones(count)  # RMS of the inputs

        self._picked = np.arange(count)  # rows evaluated in the next round
        self._waiting = np.ones(count, dtype=bool)  # rows that the sweep has still to evaluate
        self._change = 0.0  # of the sample, in this sweep
        self._midpoints = 0.0  # the part of it that is due to nodes evaluated for the first time
        self._left = _UNMEASURED  # the interpolation error of this level,
        self._measured, self._measuring = False, False  # known from a level's midpoints after their first sweep
        self._changes: list[float] = []  # of the sample, in the sweeps over this level

    @property
    def running(self) -> bool:
        """Whether the sample takes part in the next round."""
        return self.status is Status.RUNNING

    @property
    def exhausted(self) -> bool:
        """Whether a sliding window should go on: too many nodes are needed, or it would be done by now."""
        slow = len(self._changes) > _MOST_SWEEPS or self._rounds >= self._sliding_rounds
        return self._lost or self._astray or slow

    @property
    def _astray(self) -> bool:
        """Whether the sample is as far from settling as networks are that expand everywhere."""
        sweeps, lengths = len(self._changes), len(self._recurrence) / self._plan.width
        judged = not self._opening and sweeps >= max(3.0, (lengths / _PATIENCE) ** 2)
        return judged and self._changes[-1] > _ASTRAY

    def handover(self) -> tuple[Forecast, Float64] | None:
        """For a sliding window: the outputs expected, and all N slopes.

        None where they are worse than nothing: numbers ran out of range, or very few nodes went astray.
        """
        if self._wild or (self._astray and self._plan.width < _FIRST):
            return None
        nodes, held = self._level.nodes, self._recurrence.held
        weights = interpolation(np.arange(len(held)), nodes, self._recurrence.stages)
        return Interpolated(weights, self._H, held), (weights @ self._slope[nodes] - held[:, 0]) / held[:, 1]

    @property
    def nodes(self) -> Indices:
        """The nodes of the next round."""
        return self._level.nodes[self._picked]

    @property
    def inputs(self) -> Array:
        """The states of :attr:`nodes`, (n, size)."""
        return self._give(self._take(self._X, self._picked))

    @property
    def result(self) -> Array | None:
        """The sample, (size,), once it is final."""
        return None if self._result is None else self._give(self._result)

    @property
    def kept(self) -> list[Array] | None:
        """All final states, if they are to be kept and are known."""
        return None if self._kept is None else [self._give(state) for state in self._kept]

    def expected(self, i: int) -> Array:
        """What the network is expected to say at node i, evaluated or not, of the kept states, (size,)."""
        assert self._kept is not None
        weights = interpolation(np.array([i]), self._level.nodes, self._recurrence.stages)
        return self._give(self._output(i, self._kept[i], weights))

    @property
    def state(self) -> Array:
        """The last final state, (size,)."""
        return self._give(self._start if self._result is None else self._result)

    def take_defect(self, D: Array) -> Array:
        """First half of a round: compare the outputs D, (n, size), with belief; inner products for the host."""
        picked, xp = self._picked, self._xp
        X, D = self._take(self._X, picked), host_view(self._plan.xp.astype(D, self._dtype, copy=False))
        held = self._recurrence.held[self.nodes]
        self._R = self._column(held[:, 0]) * X + self._column(held[:, 1]) * D - self._take(self._H, picked)
        return inner_products(xp, X, self._take(self._since, picked), self._R)

    def correct(self, D: Array, products: Float64) -> SampleRecord:
        """Second half: update the slopes, move all states, and decide how to go on."""
        evaluated, nodes, size = self._picked, self.nodes, self._X.shape[1]
        moments = Moments.unpack(products, len(nodes))
        self._rounds += 1
        finite = moments.finite
        if not finite.all() and not self._drop(finite):
            return self._abandon(nodes)  # a sliding window will find out whose fault it was, if it comes across it
        moments, picked, nodes = moments.of(np.flatnonzero(finite)), self._picked, self.nodes
        new = ~np.isfinite(self._moved[picked])
        moved = np.where(new, 0.0, moments.moved)
        slope = self._plan.method.linearization.update(self._slope[nodes], moved, moments.cross)
        self._slope[nodes] = np.where(np.isfinite(slope), slope, self._slope[nodes])
        self._scale[picked] = np.sqrt(moments.size / size)

        level = self._level
        g, C = self._slope[level.nodes], level.response
        try:
            T = np.linalg.solve(np.eye(len(g)) - C * g, C[:, picked]).astype(np.float64, copy=False)
        except np.linalg.LinAlgError:
            return self._abandon(self._level.nodes[evaluated])
        moves = moments.norms(T)
        at_end = self._level.end[picked] + (self._level.end * g) @ T
        # the slope may see little of what the network will make of a move, so the move of its last input counts too
        effects = moments.norms(np.stack([at_end, at_end * new, T[-1] * new]))
        if not np.all(np.isfinite(np.append(moves, effects))):
            return self._abandon(self._level.nodes[evaluated])
        move = shares(moves, np.sqrt(size) * self._scale)
        change, *midpoints = shares(effects, np.full(3, np.sqrt(size) * self._scale[-1]))
        self._apply(T, g)
        self._moved[picked] = 0.0
        self._moved = self._moved + move
        self._waiting[picked] = False
        self._change = float(np.hypot(self._change, change))
        self._midpoints = float(np.hypot(self._midpoints, max(midpoints)))
        self._continue()
        accepted = len(self._recurrence) if self.status is Status.CONVERGED else 0
        moved, defects = np.full((2, len(finite)), np.nan)
        moved[finite], defects[finite] = move[picked], np.sqrt(np.diag(moments.gram) / size)
        return SampleRecord(self.index, level.nodes[evaluated], accepted, moved, defects, self.error)

    def _drop(self, finite: NDArray[np.bool_]) -> bool:
        """Go on without outputs that are not finite, which come of guesses; they stay due. False: it makes no sense."""
        self._dropped += 1
        if not np.any(finite) or not np.all(finite[self._picked == 0]):  # node 0 has its true input
            return False
        rows = np.flatnonzero(finite)
        self._R, self._picked = self._take(self._R, rows), self._picked[rows]
        self._lost = self._dropped > _MOST_DROPPED
        return True

    def estimate(self) -> Array:
        """The sample, or the best estimate of it so far, (size,)."""
        if self._result is not None or self._rounds == 0 or self._lost:
            return self.state
        return self._give(self._sample())

    def _apply(self, T: Float64, g: Float64) -> None:
        """Move all states by ``T r``; evaluated nodes believe what the network said, the others what it would say."""
        xp, picked = self._xp, self._picked
        step = matmul(xp, self._asarray(T), self._R)
        evaluated = np.zeros((len(g), len(picked)))
        evaluated[picked, np.arange(len(picked))] = 1.0
        self._H = self._H + matmul(xp, self._asarray(evaluated), self._R) + self._column(g) * step
        kept = np.ones(len(g))
        kept[picked] = 0.0
        self._X, self._since = self._X + step, self._column(kept) * self._since + step

    def _continue(self) -> None:
        """Choose the next round's nodes; between two sweeps, refine or end."""
        while self.running and not self._lost:
            if not self._waiting.any():
                self._settle()
                due = self._due()
                self._waiting, self._change = due.copy(), 0.0
            else:
                due = self._due()
            rows = np.concatenate([np.flatnonzero(self._waiting), np.flatnonzero(due & ~self._waiting)])
            if len(rows):
                self._picked = np.sort(rows[: self._plan.width])
                return

    def _due(self) -> NDArray[np.bool_]:
        """The rows whose input has moved since they were evaluated, as seen from the sample."""
        moved = self._moved * self._influence[self._level.nodes]
        due = ~(moved <= _SKIP * self._tolerance)
        if due.sum() > self._plan.width:
            due &= moved > _NEAR * np.max(moved[np.isfinite(moved)], initial=0.0)
        return due

    def _settle(self) -> None:
        """After a sweep: go on, refine, or end."""
        count = len(self._level.nodes)
        complete = count == len(self._recurrence)
        if self._measuring:
            self._measured, self._measuring = True, False
            self._left = self._midpoints / (self._gain - 1)  # what all further levels would add, a geometric series
        self._changes.append(self._change)
        left = 0.0 if complete else self._left * self._growth
        remains = left * (1.0 if self._recurrence.stochastic else _MISSED)
        self.error = max(self._change / _SETTLED, remains) * self._plan.tolerance / self._tolerance
        settled = self._change <= _SETTLED * self._tolerance
        if complete or (self._measured and count >= self._fewest and remains <= self._tolerance):
            if settled:
                self._result, self.status, self.lo = self._sample(), Status.CONVERGED, len(self._recurrence)
                self._kept = [*self._all_states()[:-1], self._result] if self._plan.keep else None
        elif self._opening or settled or self._change <= self._early * left:
            self._lost = self._measured and not self._worth_refining()
            if not self._lost:
                self._refine()

    @property
    def _early(self) -> float:
        """How many interpolation errors a sweep may change the sample by when the midpoints join.

        Less where the finer level takes several rounds a sweep: rounds on this level are cheaper then.
        """
        return _EARLY * min(1.0, self._plan.width / (2 * len(self._level.nodes) - 1))

    @property
    def _growth(self) -> float:
        """By what the midpoints' effect grew after their first sweep: slopes underestimate an expansive network."""
        first, later = self._changes[0], sum(self._changes[1:])
        growth = later / first if self._measured and 0 < first < np.inf else 1.0
        return growth if not growth <= 1.0 else 1.0

    def _worth_refining(self) -> bool:
        """Whether the nodes that the tolerance needs take fewer rounds than a window that slides over the steps."""
        n, width = len(self._recurrence), self._plan.width
        needed = len(self._level.nodes) * (self._left / self._tolerance) ** (1 / np.log2(self._gain))
        return needed <= n / _SWEEPS + width

    def _refine(self) -> None:
        """Add the midpoints (at first: spread the nodes), with interpolated predictions and slopes."""
        old = self._level.nodes
        self._level = self._levels.first(self._first) if self._opening else self._levels.finer(self._level)
        nodes = self._level.nodes
        weights, known = interpolation(nodes, old, self._recurrence.stages), np.isin(nodes, old)
        if not self._opening:
            self._slope[nodes] = weights @ self._slope[old]
        self._H = matmul(self._xp, self._asarray(weights), self._H)
        self._since = matmul(self._xp, self._asarray(weights * known[:, None]), self._since)
        self._set_free()
        self._X = self._free + matmul(self._xp, self._asarray(self._level.response), self._H)
        moved = np.full(len(nodes), np.inf)
        moved[known] = self._moved
        self._moved, self._scale = moved, weights @ self._scale
        self._measuring, self._opening, self._midpoints, self._changes = not self._opening, False, 0.0, []

    def _set_free(self) -> None:
        """What the level's states, and the sample, are made of ``x_T`` and the noise."""
        level = self._level
        self._free, self._end_free = self._column(level.free) * self._start, self._start * level.end_free
        if self._recurrence.stochastic:
            wanted = {*level.nodes.tolist(), len(self._recurrence)}
            rows = [row for i, row in enumerate(self._made_of_noise()) if i in wanted]
            self._free, self._end_free = self._free + self._xp.stack(rows[:-1]), self._end_free + rows[-1]

    def _made_of_noise(self) -> Iterator[Array]:
        """The N + 1 states if ``x_T`` and all predictions were 0. A state at a time: all of them may not fit."""
        recurrence, (a, _) = self._recurrence, self._recurrence.held_form()
        states = [self._xp.zeros_like(self._start)]
        yield states[0]
        for i in range(len(recurrence)):
            new = states[0] * float(a[i, 0])
            for k in range(1, len(states)):
                new = new + states[k] * float(a[i, k])
            if recurrence.c[i] != 0:
                new = new + self._noise(i) * float(recurrence.c[i])
            states = [new, *states[: recurrence.memory - 1]]
            yield new

    def _sample(self) -> Array:
        end = matmul(self._xp, self._asarray(self._level.end[None, :]), self._H)
        return self._end_free + self._xp.reshape(end, (-1,))

    def _all_states(self) -> list[Array]:
        """Every state, by the recurrence with interpolated predictions."""
        recurrence = self._recurrence
        weights = interpolation(np.arange(len(recurrence)), self._level.nodes, recurrence.stages)
        states, outputs = [self._start], []
        for i in range(len(recurrence)):
            outputs.insert(0, self._output(i, states[-1], weights[i : i + 1]))
            del outputs[recurrence.memory :]
            z = self._noise(i) if recurrence.c[i] != 0 else None
            states.append(recurrence.advance(i, states[: -recurrence.memory - 1 : -1], outputs, z))
        return states

    def _output(self, i: int, x: Array, weights: Float64) -> Array:
        """The output at node i for the state x, (size,), of the interpolated prediction; weights (1, n)."""
        h = self._xp.reshape(matmul(self._xp, self._asarray(weights), self._H), (-1,))
        p, q = self._recurrence.held[i]
        return (h - x * float(p)) * float(1 / q)

    def _abandon(self, nodes: Indices) -> SampleRecord:
        self._lost = self._wild = True
        nothing = np.full(len(nodes), np.nan)
        return SampleRecord(self.index, nodes, 0, nothing, nothing, self.error)

    def _give(self, array: Array) -> Array:
        """An array of the nodes' as one of the user's library, in the same memory."""
        return given_back(self._plan.xp, array)

    def _take(self, rows: Array, index: Indices) -> Array:
        return self._xp.take(rows, self._xp.asarray(index, device=device(rows)), axis=0)

    def _asarray(self, table: Float64) -> Array:
        return self._xp.asarray(table, dtype=self._start.dtype, device=device(self._start))

    def _column(self, values: Float64) -> Array:
        return self._asarray(values[:, None])
