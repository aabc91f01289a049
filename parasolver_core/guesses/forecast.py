"""Outputs expected of nodes that enter one sample's window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from parasolver_core.arrays import Array
from parasolver_core.samplers.implied import implied_outputs
from parasolver_core.samplers.recurrence import Recurrence, StepNoise

Float64 = NDArray[np.float64]


class Forecast(ABC):
    """The outputs expected of nodes that enter a window, from earlier solutions or a coarser one.

    Arrays are as :func:`~parasolver_core.arrays.host_view` gives them.
    """

    @abstractmethod
    def __call__(self, i: int, x: Array, slope: float) -> Array:
        """The network's output at node i for the state x, (size,), which may be near or not; its slope there."""

    def behind(self, last: int, count: int, x: Array, m: Array) -> Forecast:
        """The forecast for ``count`` nodes behind node ``last``; itself unless overridden.

        Args:
            last: the node before them.
            count: how many; one more is asked, whose answer is not used.
            x, m: (size,), the state and output at ``last``, as they are believed to be.
        """
        return self

    def usable(self, lo: int, defects: Float64) -> int:
        """How many leading nodes of a window were filled in well enough to be kept; unless overridden, all.

        Args:
            lo: the window's first node.
            defects: (n,), sums of squares of what the network said beside what was believed.
        """
        return len(defects)


class AlongTrajectory(Forecast):
    """Outputs along a trajectory that is expected to be near.

    Args:
        recurrence: the sampler.
        trajectory: (N + 1, size).
        noise: of the steps.
    """

    def __init__(self, recurrence: Recurrence, trajectory: Array, noise: StepNoise) -> None:
        self._states = [trajectory[i, :] for i in range(len(recurrence) + 1)]
        self._outputs = implied_outputs(recurrence, array_namespace(trajectory), self._states, noise)

    def __call__(self, i: int, x: Array, slope: float) -> Array:
        return self._outputs[i] + (x - self._states[i]) * slope


@dataclass(frozen=True)
class BetweenNodes(Forecast):
    """Outputs expected by a sliding window that goes on from spread nodes.

    Args:
        weights: (N, n), of the nodes in each prediction (:func:`~parasolver_core.methods.levels.interpolation`).
        predictions: (n, size), of the held quantity at the nodes.
        held: (N, 2), as in :class:`~parasolver_core.samplers.recurrence.Recurrence`.
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


class Blank(Forecast):
    """A held quantity of 0: a predicted sample that is the mean of all data, before anything is known."""

    def __init__(self, recurrence: Recurrence) -> None:
        self._held = recurrence.held

    def __call__(self, i: int, x: Array, slope: float) -> Array:
        p, q = self._held[i]
        return x * float(-p / q)
