"""Runs of one sample each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from parasolver_core.arrays import Array, copied
from parasolver_core.methods.run import Outcome, Run
from parasolver_core.solution import SampleRecord, Status


class SampleRun(Run):
    """A run of one sample, by itself; :meth:`end` ends it.

    Args:
        sample: its place in the batch.
        first: its ``x_T``, (size,), if the final states are to be kept.
    """

    def __init__(self, sample: int, first: Array | None) -> None:
        self.samples, self.ended = np.array([sample]), {}
        self.sample, self.lo, self.error = sample, 0, 0.0  # all nodes before lo are final
        self.final: list[Array] | None = None if first is None else [first]

    @property
    @abstractmethod
    def state(self) -> Array:
        """The last final state, (size,)."""

    @property
    def owners(self) -> NDArray[np.int64]:
        return np.full(len(self.nodes), self.sample)

    @property
    def steps(self) -> NDArray[np.int64]:
        return np.full(len(self.samples), self.lo)

    @property
    def errors(self) -> NDArray[np.float64]:
        return np.full(len(self.samples), self.error)

    def states(self) -> Array:
        return copied(array_namespace(self.state), self.state)[None, :]

    def estimate(self, sample: int) -> Array:
        return self.state

    def kept(self, sample: int) -> Sequence[Array]:
        return self.final or ()

    def end(self, status: Status, steps: int, state: Array, failed_node: int = -1) -> None:
        """The sample has ended; see :class:`Outcome`."""
        self.ended[self.sample] = Outcome(status, steps, self.error, state, self.kept(self.sample), failed_node)
        self.samples = self.samples[:0]

    def record(
        self, nodes: NDArray[np.int64], accepted: int, move: NDArray[np.float64], defect: NDArray[np.float64]
    ) -> list[SampleRecord]:
        """The round's record, see :class:`~parasolver_core.solution.SampleRecord`, as :meth:`correct` returns it."""
        return [SampleRecord(self.sample, nodes, accepted, move, defect, self.error)]
