"""A run takes some samples of the batch from x_T to their samples; the solver gives it rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array
from parasolver_core.solution import SampleRecord, Status


@dataclass(frozen=True)
class Outcome:
    """How a sample ended.

    Args:
        status: not ``RUNNING``.
        steps: how many are final; of a sample that failed, the node at which it did.
        error: estimated relative error.
        state: the sample, or the last final state, (size,), in the user's library.
        kept: all final states, if they were to be kept.
    """

    status: Status
    steps: int
    error: float
    state: Array
    kept: list[Array] | None


class Run(ABC):
    """Some samples on their way; those that go on differently leave it for another.

    A round has two halves, so that the sums of all runs come to the host in one transfer: the network is asked at
    :attr:`inputs`, :meth:`compare` reads its outputs, :meth:`correct` moves the samples on. Rows are sample by sample.
    """

    samples: NDArray[np.int64]  # their places in the batch
    ended: dict[int, Outcome]  # those that have ended since the run began

    @property
    @abstractmethod
    def nodes(self) -> NDArray[np.int64]:
        """(rows,), of each row that the network is asked next."""

    @property
    @abstractmethod
    def owners(self) -> NDArray[np.int64]:
        """(rows,), the sample of each row."""

    @property
    @abstractmethod
    def inputs(self) -> Array:
        """(rows, size), the states that the network is asked next."""

    @abstractmethod
    def compare(self, D: Array) -> Array:
        """The sums that the host needs, a vector, from the outputs D, (rows, size)."""

    @abstractmethod
    def correct(self, D: Array, sums: NDArray[np.float64]) -> list[SampleRecord]:
        """Move the samples on, given the outputs and the sums on the host; a record of each sample."""

    @abstractmethod
    def steps(self, sample: int) -> int:
        """How many steps of a sample that runs are final."""

    @abstractmethod
    def error(self, sample: int) -> float:
        """The estimated relative error that is accepted so far."""

    @abstractmethod
    def state(self, sample: int) -> Array:
        """The last final state of a sample that runs, (size,)."""

    @abstractmethod
    def estimate(self, sample: int) -> Array:
        """The best estimate of the sample so far, (size,)."""

    @abstractmethod
    def kept(self, sample: int) -> list[Array] | None:
        """The final states of a sample that runs, if they are to be kept."""

    def successors(self) -> list[Run]:
        """The runs that go on after a round: this one, unless its samples have ended or left it."""
        return [self] if len(self.samples) else []
