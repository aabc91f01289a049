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
class Look:
    """The first picture's run, watched after each round.

    Args:
        estimates: (rounds, 28, 28), the estimate of the picture after each round.
        errors: (rounds,), its distance to the sequential picture, relative to that.
        records: what happened in each round.
    """

    estimates: NDArray[np.float32]
    errors: NDArray[np.float64]
    records: list[SampleRecord]


@dataclass(frozen=True)
class Outcome:
    """What one sampler gave.

    Args:
        case: the sampler.
        sequential, parallel: the pictures, (samples, 28, 28).
        rounds, evaluations: of the parallel run; evaluations for each sample.
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
