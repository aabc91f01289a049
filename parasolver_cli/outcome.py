"""What the demonstration samples and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from parasolver_core import SampleRecord, StepRule


@dataclass(frozen=True)
class Case:
    """One sampler of the demonstration.

    Args:
        name: the sampler and its number of steps.
        step_rule: the sampler.
        timesteps: (N,).
        window: steps evaluated in one round.
        samples: how many of the pictures it samples.
    """

    name: str
    step_rule: StepRule
    timesteps: NDArray[np.int64]
    window: int
    samples: int


@dataclass(frozen=True)
class Row:
    """One line of the table: sequentially and in parallel.

    Args:
        name: what was done, and in how many steps.
        steps, rounds: calls one after another, sequentially and in parallel (of the slowest sample).
        evaluations: of one sample, sequentially and in parallel.
        error: the largest true distance to the sequential result, relative to it.
        seconds: all that the user waits for, for all samples.
        count: samples.
        tolerance: that was asked for.
    """

    name: str
    steps: int
    rounds: int
    evaluations: tuple[float, float]
    error: float
    seconds: tuple[float, float]
    count: int
    tolerance: float

    @property
    def verdict(self) -> str:
        """In plain words."""
        return verdict(*self.seconds)

    @property
    def line(self) -> str:
        """Told as soon as it is known."""
        return f"{self.name}: {told_seconds(*self.seconds)}, {self.verdict}"

    def cells(self) -> list[str]:
        """As the table shows them."""
        before, after = (f"{one:.0f}" for one in self.evaluations)
        return [
            self.name,
            f"{self.steps}→{self.rounds}",
            f"{before}→{after}",
            f"{percent(self.error)}{'' if self.kept else '!'}",
            told_seconds(*self.seconds),
            self.verdict,
        ]

    @property
    def kept(self) -> bool:
        """Whether the tolerance was kept, which is an estimate."""
        return self.error <= self.tolerance


COLUMNS = ("", "rounds", "evaluations\na sample", "error,\nworst", "time", "verdict")


def verdict(sequential: float, parallel: float) -> str:
    """How parallel sampling compares, from the seconds."""
    gain = sequential / parallel
    if 1 / 1.1 < gain < 1.1:
        return "as fast"
    times = gain if gain > 1 else 1 / gain
    digits = 0 if times >= 9.95 else 1
    return f"{times:.{digits}f}x {'faster' if gain > 1 else 'slower'}"


def percent(error: float) -> str:
    """An error for the reader."""
    return f"{100 * error:.2f} %" if error >= 5e-5 else "<0.01 %"


def told_seconds(*seconds: float) -> str:
    """Seconds for the reader, of several in one unit in which all can be read."""
    unit, scale = ("ms", 1e3) if min(seconds) < 0.0995 else ("s", 1.0)
    values = (value * scale for value in seconds)
    return "→".join(f"{value:.2g}" if value < 9.95 else f"{value:.0f}" for value in values) + f" {unit}"


@dataclass(frozen=True)
class Look:
    """The first picture's part of the run, watched after each round.

    Args:
        rounds: (frames,), the rounds that were kept.
        estimates: (frames, 4, 28, 28), the first pictures after these rounds.
        errors: (frames,), distance of the first picture to the sequential one, relative to that.
        records: what happened to the first picture in each round.
    """

    rounds: list[int]
    estimates: NDArray[np.float32]
    errors: NDArray[np.float64]
    records: list[SampleRecord]


@dataclass(frozen=True)
class Outcome:
    """What one sampler gave.

    Args:
        case: the sampler.
        sequential, parallel: the pictures, (samples, 28, 28).
        rounds, evaluations: of the parallel run; rounds of the slowest picture, evaluations for each.
        errors: (samples,), true distance to the sequential picture, relative to that.
        seconds_sequential, seconds_parallel: all that the user waits for.
        look: the first picture's run.
    """

    case: Case
    sequential: NDArray[np.float32]
    parallel: NDArray[np.float32]
    rounds: int
    evaluations: float
    errors: NDArray[np.float64]
    seconds_sequential: float
    seconds_parallel: float
    look: Look = field(repr=False)

    @property
    def steps(self) -> int:
        """Steps of the sampler, which are the rounds of sequential sampling."""
        return len(self.case.timesteps)

    @property
    def own_rounds(self) -> int:
        """Rounds until the first picture was final; others of the batch may take more."""
        return len(self.look.records)

    def row(self, tolerance: float) -> Row:
        """The line of the table."""
        count = self.case.samples
        return Row(
            f"{count} {'picture' if count == 1 else 'pictures'}, {self.case.name}",
            steps=self.steps,
            rounds=self.rounds,
            evaluations=(self.steps, self.evaluations),
            error=float(self.errors.max()),
            seconds=(self.seconds_sequential, self.seconds_parallel),
            count=count,
            tolerance=tolerance,
        )
