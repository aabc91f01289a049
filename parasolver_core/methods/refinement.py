"""When one sample's spread nodes are evaluated again, refined, final, or give way to a sliding window; on the host."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from parasolver_core.methods.expected import sliding_rounds
from parasolver_core.methods.levels import Level
from parasolver_core.samplers.held_form import Float64, Indices
from parasolver_core.samplers.recurrence import Recurrence


@dataclass(frozen=True)
class Rules:
    """What spread nodes are judged by. Chosen on the networks of ``docs/theory.md``, "Few nodes first", which says why.

    Errors, and changes of the sample, are meant as the tolerance is, relative to the sample.

    Args:
        first: nodes of the first level, or what the window holds; noise makes a trajectory rough, and takes more.
        fewest: nodes at the end, in units of that level: fewer may step over what the network does between them;
        fewest_share: or this share of the steps, if that is less.
        skip: a node moved by less, in units of the tolerance, keeps its last evaluation.
        near: with more nodes due than the window holds, those moved by less of the most wait; by trial.
        early: midpoints that fit into a round join when a sweep changes the sample by fewer interpolation errors.
        unmeasured: the interpolation error of the first level, until it is measured; by trial.
        settled: the last sweep's change of the sample, in units of the tolerance.
        sweeps: over a level, that follow its last refinement.
        most_sweeps: over one level; where the network expands more are needed, and a short window is solved sooner.
        most_dropped: rounds in which outputs were not finite, before a sliding window goes on.
        astray: a sample that the third sweep over a level, or a later one, changes by so much of its size is lost;
        patience: from the (N / window / patience)^2-th on, as much is at stake where a window would slide for long.
        gain: by what twice as many nodes divide the interpolation error.
        missed: the interpolation error, in units of what the slopes say of it.
    """

    first: int = 13
    fewest: float = 1.5
    fewest_share: float = 0.5
    skip: float = 0.1
    near: float = 0.03
    early: float = 7.5
    unmeasured: float = 0.067
    settled: float = 0.2
    sweeps: int = 3
    most_sweeps: int = 7
    most_dropped: int = 3
    astray: float = 0.8
    patience: float = 20.0
    gain: float = 3.0
    missed: float = 2.0


WITHOUT_NOISE = Rules()
WITH_NOISE = Rules(first=50, gain=2.0, missed=1.0)


class Verdict(Enum):
    """How a sample goes on after a round."""

    GO_ON = "evaluate the nodes that are due"
    REFINE = "add the midpoints"
    CONVERGED = "final"
    GIVE_WAY = "a sliding window goes on"


@dataclass(frozen=True)
class Aims:
    """What one run asks of its samples' nodes.

    Args:
        recurrence: the sampler.
        width: the most nodes of a round.
        wanted: wanted relative error.
        tolerance: what changes and the interpolation error must be within.
        rounding: rounding unit of the states, the least error that is told.
    """

    recurrence: Recurrence
    width: int
    wanted: float
    tolerance: float
    rounding: float

    @property
    def patience(self) -> float:
        """Rounds after which a sliding window would be done."""
        return sliding_rounds(self.recurrence, self.width, self.wanted)

    @property
    def rules(self) -> Rules:
        """What they are judged by."""
        return WITH_NOISE if self.recurrence.stochastic else WITHOUT_NOISE

    @property
    def first(self) -> int:
        """Nodes of the first level."""
        return min(self.rules.first * self.recurrence.stages, self.width)

    @property
    def fewest(self) -> float:
        """Nodes at the end."""
        first = self.rules.first * self.recurrence.stages
        return min(self.rules.fewest * first, self.rules.fewest_share * len(self.recurrence))


class Refinement:
    """What is known of one sample's nodes, and what follows from it.

    The nodes that are due are evaluated in sweeps: a sweep ends when each node that was due at its beginning has been
    evaluated, which is one round unless more are due than the window holds. After a sweep it is decided how to go on.

    Args:
        aims: what is asked.
        level: the nodes to begin with, which need no prediction of the sample.
    """

    def __init__(self, aims: Aims, level: Level) -> None:
        count = len(level.nodes)
        self.aims, self._rules = aims, aims.rules
        self._influence, self.level = aims.recurrence.influence, level
        self.moved = np.full(count, np.inf)  # RMS of each node's moves since its last evaluation, relative; inf: never
        self.scale = np.ones(count)  # RMS of the inputs,
        self.smallness = np.ones(len(aims.recurrence))  # of which so much counts, at each step of the sampler
        self.picked: Indices = np.arange(count)  # rows evaluated in the next round
        self.error, self.rounds = float("inf"), 0
        self._opening, self._wild, self._dropped = True, False, 0
        self._waiting = np.ones(count, dtype=bool)  # rows that the sweep has still to evaluate
        self._change = 0.0  # of the sample, in this sweep
        self._midpoints = 0.0  # the part of it that is due to nodes evaluated for the first time
        self._left = self._rules.unmeasured  # the interpolation error of this level,
        self._measured, self._measuring = False, False  # known from a level's midpoints after their first sweep
        self._changes: list[float] = []  # of the sample, in the sweeps over this level

    def abandon(self) -> Verdict:
        """Numbers ran out of range: a sliding window will find out whose fault it was, if it comes across it."""
        self.rounds, self._wild = self.rounds + 1, True
        return Verdict.GIVE_WAY

    def drop(self, finite: NDArray[np.bool_]) -> bool:
        """Go on without outputs that are not finite, which come of guesses; they stay due. False: it makes no sense."""
        self._dropped += 1
        if not np.any(finite) or not np.all(finite[self.picked == 0]):  # node 0 has its true input
            return False
        self.picked = self.picked[finite]
        return True

    def after(self, move: Float64, change: float, midpoints: float) -> Verdict:
        """How to go on after a round.

        Args:
            move: (n,), relative moves of the states of all nodes.
            change: of the sample, relative.
            midpoints: the part of it that is due to new nodes.
        """
        self.rounds += 1
        self.moved[self.picked] = 0.0
        self.moved = self.moved + move
        self._waiting[self.picked] = False
        self._change = float(np.hypot(self._change, change))
        self._midpoints = float(np.hypot(self._midpoints, midpoints))
        return Verdict.GIVE_WAY if self._dropped > self._rules.most_dropped else self._continue()

    def refine(self, level: Level, weights: Float64, known: NDArray[np.bool_]) -> Verdict:
        """Go on with a finer level: what is known is interpolated, what is new is due."""
        moved = np.full(len(level.nodes), np.inf)
        moved[known] = self.moved
        self.moved, self.scale, self.level = moved, weights @ self.scale, level
        self._measuring, self._opening, self._midpoints, self._changes = not self._opening, False, 0.0, []
        self._waiting, self._change = self._due(), 0.0
        return self._continue()

    @property
    def exhausted(self) -> bool:
        """Whether a sliding window should go on: it does not settle, or the window would be done by now."""
        slow = len(self._changes) > self._rules.most_sweeps or self.rounds >= self.aims.patience
        return self._astray or slow

    @property
    def _astray(self) -> bool:
        """Whether the sample is as far from settling as networks are that expand everywhere."""
        sweeps, lengths = len(self._changes), len(self.aims.recurrence) / self.aims.width
        judged = not self._opening and sweeps >= max(3.0, (lengths / self._rules.patience) ** 2)
        return judged and self._changes[-1] > self._rules.astray

    @property
    def worthless(self) -> bool:
        """Whether what is known is worse than nothing: numbers ran out of range, or very few nodes went astray."""
        return self._wild or (self._astray and self.aims.width < WITHOUT_NOISE.first)

    @property
    def opening(self) -> bool:
        """Whether the nodes are still those that need no prediction of the sample."""
        return self._opening

    def _continue(self) -> Verdict:
        """Choose the next round's nodes: those of the sweep, then others that are due; between two sweeps, decide."""
        while True:
            if not self._waiting.any():
                verdict = self._settle()
                if verdict is not Verdict.GO_ON:
                    return verdict
                self._waiting, self._change = self._due(), 0.0
            due = self._due()
            rows = np.concatenate([np.flatnonzero(self._waiting), np.flatnonzero(due & ~self._waiting)])
            if len(rows):
                self.picked = np.sort(rows[: self.aims.width])
                return Verdict.GO_ON

    def _due(self) -> NDArray[np.bool_]:
        """The rows whose input has moved since they were evaluated, as seen from the sample."""
        moved, width = self.moved * self._influence[self.level.nodes], self.aims.width
        due = ~(moved <= self._rules.skip * self.aims.tolerance)  # NaN is due
        if due.sum() > width:
            due &= moved > self._rules.near * np.max(moved[np.isfinite(moved)], initial=0.0)
        return due

    def _settle(self) -> Verdict:
        """After a sweep: go on, refine, or end."""
        aims, count = self.aims, len(self.level.nodes)
        complete = count == len(aims.recurrence)
        if self._measuring:
            self._measured, self._measuring = True, False
            self._left = self._midpoints / (self._rules.gain - 1)  # of all further levels, a geometric series
        self._changes.append(self._change)
        left = 0.0 if complete else self._left * self._growth
        remains = left * self._rules.missed
        left_open = max(self._change / self._rules.settled, remains)
        self.error = max(left_open * aims.wanted / aims.tolerance, aims.rounding)
        settled = self._change <= self._rules.settled * aims.tolerance
        if complete or (self._measured and count >= aims.fewest and remains <= aims.tolerance):
            return Verdict.CONVERGED if settled else Verdict.GO_ON
        if self._opening or settled or self._change <= self._early * left:
            return Verdict.REFINE if not self._measured or self._worth_refining() else Verdict.GIVE_WAY
        return Verdict.GO_ON

    @property
    def _early(self) -> float:
        """How many interpolation errors a sweep may change the sample by when the midpoints join.

        Less where the finer level takes several rounds a sweep: rounds on this level are cheaper then.
        """
        return self._rules.early * min(1.0, self.aims.width / (2 * len(self.level.nodes) - 1))

    @property
    def _growth(self) -> float:
        """By what the midpoints' effect grew after their first sweep: slopes underestimate an expansive network."""
        first, later = self._changes[0], sum(self._changes[1:])
        growth = later / first if self._measured and 0 < first < np.inf else 1.0
        return growth if not growth <= 1.0 else 1.0

    def _worth_refining(self) -> bool:
        """Whether the nodes that the tolerance needs take fewer rounds than a window that slides over the steps."""
        n, aims = len(self.aims.recurrence), self.aims
        needed = len(self.level.nodes) * (self._left / aims.tolerance) ** (1 / np.log2(self._rules.gain))
        return bool(needed <= n / self._rules.sweeps + aims.width)
