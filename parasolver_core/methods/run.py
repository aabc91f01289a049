"""A run takes some samples of the batch from x_T to their samples; the solver gives it rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
        kept: all final states, if they were to be kept; else none.
        failed_node: where numbers ran out of range; -1: nowhere.
        expected: gives the output of the network at node i, (size,), as far as it is known by interpolation; None where
            each node was evaluated.
    """

    status: Status
    steps: int
    error: float
    state: Array
    kept: Sequence[Array]
    failed_node: int = -1
    expected: Callable[[int], Array] | None = None


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

    @property
    def lends(self) -> bool:
        """Whether :attr:`inputs` are memory that the run needs; else they are made when they are asked for."""
        return True

    @abstractmethod
    def compare(self, D: Array) -> Array:
        """The sums that the host needs, a vector, from the outputs D, (rows, size)."""

    @abstractmethod
    def correct(self, D: Array, sums: NDArray[np.float64]) -> Sequence[SampleRecord]:
        """Move the samples on, given the outputs and the sums on the host; a record of each sample."""

    @property
    def upcoming(self) -> list[tuple[int, int]]:
        """(step, sample) of noise that :meth:`correct` is likely to read, which may be drawn before; no promise."""
        return []

    @property
    @abstractmethod
    def steps(self) -> NDArray[np.int64]:
        """(len(samples),), how many steps of each are final."""

    @property
    @abstractmethod
    def errors(self) -> NDArray[np.float64]:
        """(len(samples),), the estimated relative error that is accepted so far."""

    @abstractmethod
    def states(self) -> Array:
        """(len(samples), size), the last final state of each; rounds to come leave them as they are."""

    @abstractmethod
    def estimate(self, sample: int) -> Array:
        """The best estimate of the sample so far, (size,)."""

    @abstractmethod
    def kept(self, sample: int) -> Sequence[Array]:
        """The final states of a sample that runs, if they are to be kept; the list grows as the run goes on."""

    def successors(self) -> list[Run]:
        """The runs that go on after a round: this one, unless its samples have ended or left it."""
        return [self] if len(self.samples) else []
