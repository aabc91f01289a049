"""What a batch costs, on this machine and on simulated ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OVERHEAD = 0.05  # of a call: what a round costs besides the network


@dataclass(frozen=True)
class Device:
    """A simulated machine; its unit of time is the network's call with one row.

    Args:
        free: k, how many rows a GPU takes in the time of one; more take time in proportion.
        gpus: how many share the rows of a round equally.
        overhead: what a round costs besides, for the solver and between the GPUs.
    """

    free: float
    gpus: int = 1
    overhead: float = OVERHEAD

    def call(self, rows: int) -> float:
        """The time of one call with so many rows."""
        return max(1.0, math.ceil(rows / self.gpus) / self.free)

    def speedup(self, steps: int, rounds: Sequence[int]) -> float:
        """How many times as long the sequential sampler takes as rounds of these rows."""
        return steps / sum(self.call(rows) + self.overhead for rows in rounds)


def break_even(steps: int, histories: list[list[int]], gpus: int, overhead: float) -> int | None:
    """The smallest k at which the rounds take no longer than the sequential sampler; None if there is none."""
    most = max(max(rounds) for rounds in histories)
    for free in range(1, most + 1):
        if mean_speedup(steps, histories, Device(free, gpus, overhead)) >= 1:
            return free
    return None


def mean_speedup(steps: int, histories: list[list[int]], device: Device) -> float:
    """Of the mean time of all samples."""
    return 1 / float(np.mean([1 / device.speedup(steps, rounds) for rounds in histories]))


@dataclass(frozen=True)
class BatchCost:
    """What a call of a network takes on this machine, measured.

    Args:
        rows: increasing.
        seconds: medians.
    """

    problem: str
    rows: list[int]
    seconds: list[float]

    def __call__(self, rows: int) -> float:
        """Interpolated; beyond the last measurement in proportion."""
        beyond = max(rows / self.rows[-1], 1.0)
        return beyond * float(np.interp(rows, self.rows, self.seconds))

    @property
    def free(self) -> float:
        """Rows of the largest batch in the time of one: the k that this machine shows."""
        return self.rows[-1] * self.seconds[0] / self.seconds[-1]
