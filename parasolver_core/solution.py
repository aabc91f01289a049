"""What a run returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parasolver_core.arrays import Array


class Status(Enum):
    """How a run, or one sample of it, ended."""

    RUNNING = "running"
    CONVERGED = "converged"
    MAX_ROUNDS = "max_rounds"
    MAX_SECONDS = "max_seconds"
    NONFINITE_MODEL = "nonfinite_model"
    NONFINITE_SOLVER = "nonfinite_solver"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@dataclass(frozen=True, eq=False, repr=False)
class SampleRecord:
    """One sample in one round.

    Args:
        sample: index in the batch.
        nodes: (n,), the nodes evaluated.
        accepted: how many nodes became final.
        residuals: (n,), relative RMS move of each node's input: the size of the correction.
        defects: (n,), RMS of the network's output less its prediction.
        error: estimated relative error of the final states so far.
    """

    sample: int
    nodes: NDArray[np.int64]
    accepted: int
    residuals: NDArray[np.float64]
    defects: NDArray[np.float64]
    error: float

    def __repr__(self) -> str:
        nodes = f"{len(self.nodes)} nodes in {self.nodes[0]}..{self.nodes[-1]}" if len(self.nodes) else "no nodes"
        return f"SampleRecord(sample={self.sample}, {nodes}, accepted={self.accepted}, error={self.error:.3g})"

    @property
    def first(self) -> int:
        """The first node evaluated."""
        return int(self.nodes[0])

    @property
    def window(self) -> int:
        """Number of nodes evaluated."""
        return len(self.nodes)


@dataclass(frozen=True, eq=False, repr=False)
class SampleRecords(Sequence[SampleRecord]):
    """The records of many samples in one round: tables, of which a record is a row, made when it is asked for.

    Args:
        samples, accepted, errors: (B,).
        counts: (B,), how many nodes each has.
        nodes, residuals, defects: (B, n), in their leading columns.
    """

    samples: NDArray[np.int64]
    counts: NDArray[np.int64]
    nodes: NDArray[np.int64]
    accepted: NDArray[np.int64]
    residuals: NDArray[np.float64]
    defects: NDArray[np.float64]
    errors: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[k] for k in range(len(self))[row]]
        at = row, slice(int(self.counts[row]))
        numbers = self.nodes[at], int(self.accepted[row]), self.residuals[at], self.defects[at]
        return SampleRecord(int(self.samples[row]), *numbers, float(self.errors[row]))


@dataclass(frozen=True, eq=False, repr=False)
class RoundRecord:
    """One round.

    Args:
        round: 1, 2, ...
        evaluations: rows given to the network, without the copies that fill calls up to ``buckets``.
        samples: one record for each sample that took part.
        seconds_denoiser: seconds in the denoiser (on a device that works in the background: until it returned).
        seconds: seconds of the whole round.
        turns: network calls made one after another: 1, or with subintervals as many as the longest has steps.
    """

    round: int
    evaluations: int
    samples: Sequence[SampleRecord]
    seconds_denoiser: float
    seconds: float
    turns: int = 1

    def __repr__(self) -> str:
        told = f"round={self.round}, evaluations={self.evaluations}, accepted={self.accepted}"
        return f"RoundRecord({told}, residual={self.residual:.3g}, seconds={self.seconds:.3g})"

    @property
    def accepted(self) -> int:
        """Nodes that became final in this round, over all samples."""
        return sum(record.accepted for record in self.samples)

    @property
    def window(self) -> int:
        """The largest window of any sample."""
        return max((record.window for record in self.samples), default=0)

    @property
    def residual(self) -> float:
        """The largest relative move of any node."""
        return max((float(np.max(record.residuals)) for record in self.samples), default=0.0)


@dataclass
class Stats:
    """What a run cost.

    Args:
        rounds: batched network calls made one after another; what the user waits for.
        evaluations: rows given to the network, over all samples, without the copies that fill calls up to ``buckets``.
        calls: calls of the denoiser; more than ``rounds`` where ``max_rows`` splits a round.
        max_rows: the most rows in one call since the denoiser ran out of memory in a larger one; None if it did not.
        seconds_denoiser, seconds: as in :class:`RoundRecord`, summed.
        history: one record a round.
    """

    rounds: int = 0
    evaluations: int = 0
    calls: int = 0
    max_rows: int | None = None
    seconds_denoiser: float = 0.0
    seconds: float = 0.0
    history: list[RoundRecord] = field(default_factory=list, repr=False)

    def after(self, record: RoundRecord, calls: int, max_rows: int | None) -> Stats:
        """With one more round; new ones, so that what an interrupt leaves is never half of both."""
        return Stats(
            rounds=self.rounds + record.turns,
            evaluations=self.evaluations + record.evaluations,
            calls=calls,
            max_rows=max_rows,
            seconds_denoiser=self.seconds_denoiser + record.seconds_denoiser,
            seconds=self.seconds + record.seconds,
            history=[*self.history, record],
        )


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """The result of a run.

    Args:
        sample: ``(batch, *event)``, like ``x_T`` in dtype, device and array library. For a sample that is not
            converged: the best estimate, or the last final state where the network gave NaN.
        status: CONVERGED if every sample is, else the first other status.
        message: one sentence that says what happened and, after a failure, what to do.
        statuses: one status a sample.
        steps: (batch,), how many steps of each sample are final.
        error_estimate: (batch,), estimated distance to the sequential sample, RMS over RMS. At least the rounding unit
            of states and outputs after a parallel run, without what a sampler or a network makes of it, which the
            sequential run has, too; 0 after a sequential run. Infinite, not known, for a sample that is not converged,
            but for what ``max_seconds`` guesses of it.
        stats: what it cost.
        trajectory: ``(N + 1, batch, *event)`` with ``save="trajectory"``: all states, ``x_T`` first, the sample
            last, to the bit; NaN where a state is not final; on the device of the states. Else None.
        states: the last final state of each sample, ``(batch, *event)``.
    """

    sample: Array
    status: Status
    message: str
    statuses: tuple[Status, ...]
    steps: tuple[int, ...]
    error_estimate: NDArray[np.float64]
    stats: Stats
    trajectory: Array | None = field(repr=False)
    states: Array = field(repr=False)

    def __repr__(self) -> str:
        cost = f"{self.stats.rounds} rounds, {self.stats.evaluations} evaluations"
        dtype = str(self.sample.dtype).rpartition(".")[2]
        return f"Solution({self.status.value}, {cost}, sample {dtype} {tuple(self.sample.shape)})"

    @property
    def success(self) -> bool:
        """Whether every sample converged."""
        return self.status is Status.CONVERGED
