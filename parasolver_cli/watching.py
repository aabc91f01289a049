"""A look at the first samples of a run after each round, without counting in its seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_core import SampleRecord, Stats

MOST_FRAMES = 40  # rounds that are kept, evenly spread; the last is always there


@dataclass
class Watch:
    """A callback that keeps what the first samples look like after each round.

    Args:
        samples: how many of the batch.
        then: another callback to call, such as a progress bar.
        rounds, frames: which rounds were kept, and the samples there.
        seconds: spent in here, to be taken off the run's.
    """

    samples: int
    then: Callable[[Any], None] = lambda state: None
    rounds: list[int] = field(default_factory=list)
    frames: list[Any] = field(default_factory=list)
    seconds: float = 0.0
    _every: int = 1

    def __call__(self, state: Any) -> None:
        started = time.perf_counter()
        if (state.stats.rounds - 1) % self._every == 0:
            self._keep(state.stats.rounds, state.estimate())
            if len(self.rounds) > MOST_FRAMES:
                self._every *= 2
                self.rounds, self.frames = self.rounds[::2], self.frames[::2]
        self.seconds += time.perf_counter() - started
        self.then(state)

    def finish(self, rounds: int, sample: Any) -> None:
        """The end of the run belongs to the frames."""
        if not self.rounds or self.rounds[-1] != rounds:
            self._keep(rounds, sample)

    def _keep(self, round_: int, estimate: Any) -> None:
        self.rounds.append(round_)
        self.frames.append(estimate[: self.samples].clone())


def first_sample(stats: Stats) -> list[SampleRecord]:
    """The first sample's records, one for each round in which it took part."""
    return [one for record in stats.history for one in record.samples if one.sample == 0]


def relative_errors(got: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """RMS distance of each sample to the expected one, over the RMS of the latter."""
    axes = tuple(range(1, expected.ndim))
    difference = np.mean((got - expected).astype(np.float64) ** 2, axis=axes)
    return np.sqrt(difference / np.mean(expected.astype(np.float64) ** 2, axis=axes))


def moves(records: Sequence[SampleRecord], steps: int) -> NDArray[np.float64]:
    """How far each round moved the state of each step, ``(rounds, steps)``; NaN where it was not evaluated."""
    table = np.full((len(records), steps), np.nan)
    for row, record in zip(table, records, strict=True):
        row[record.nodes] = record.residuals
    return table
