"""The final states of many samples, where they are to be kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parasolver_core.arrays import Array
from parasolver_core.samplers.held_form import Indices


class Kept:
    """Lists of states, each (size,), that grow as windows slide.

    Args:
        samples: their places in the batch.
        start: (B, size), their ``x_T``.
    """

    def __init__(self, samples: Indices, start: Array) -> None:
        self._states = {sample: [start[row, :]] for row, sample in enumerate(samples.tolist())}

    def of(self, sample: int) -> Sequence[Array]:
        """All of one sample's so far."""
        return self._states[sample]

    def add(self, samples: Indices, accepted: Indices, passed: Array, first: Array) -> None:
        """Of these samples: what their windows have passed by, (B, most, size), and then their first states.

        Args:
            accepted: (B,), how many nodes have become final, and so states behind them.
        """
        for row in np.flatnonzero(accepted).tolist():
            states = [passed[row, j, :] for j in range(int(accepted[row]) - 1)]
            self._states[int(samples[row])] += [*states, first[row, :]]
