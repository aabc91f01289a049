"""What parallel sampling of a pipeline is asked for, and what it reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from parasolver_core import ParallelIntegralSolver, Status, StepRule
from parasolver_core.methods.method import Method
from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.solution import Solution, Stats
from parasolver_core.solver.deadline import check_seconds
from parasolver_core.validation import check_count

Preview = Callable[[int, torch.Tensor], Any]


@dataclass(frozen=True, eq=False)
class ByNode(StepRule):
    """The first steps of a scheduler's table, with the nodes' numbers for timesteps: recorded steps know their own."""

    table: Recurrence | None = field(repr=False)

    def recurrence(self, timesteps: NDArray[Any]) -> Recurrence:
        table, n = self.table, len(timesteps)
        assert table is not None
        tables = {
            name: getattr(table, name)[:n] for name in ("a", "b", "c", "held", "slope", "identity_slope", "signal")
        }
        return replace(table, timesteps=timesteps, input_scale=None, **tables)


@dataclass
class ParallelRun:
    """What happens inside a :func:`~parasolver_adapters.diffusers.parallel_sampling` block.

    Args:
        stats: what the last call of the pipeline cost; evaluations count each sample of the batch.
        status: how it ended: CONVERGED also for a call that was left to the pipeline, MAX_SECONDS if time was up,
            STOPPED if it was interrupted, FAILED by an exception; None before the first call.
        reason: why it was not sampled in parallel, if it was not.
        latents: the last state that the scheduler returned, ``(batch, *event)``, before decoding.
        steps: how many steps of the loop led there.
        error_estimate: estimated distance to the sequential latents, RMS over RMS; 0 for those.
    """

    stats: Stats = field(default_factory=Stats)
    status: Status | None = None
    reason: str | None = None
    latents: torch.Tensor | None = field(default=None, repr=False)
    steps: int = 0
    error_estimate: float = 0.0

    def stepped(self, latents: torch.Tensor) -> None:
        """One more step has its result."""
        self.latents, self.steps = latents, self.steps + 1

    def so_far(self, status: Status) -> Solution | None:
        """What a loop that ended early leaves, if it has made a step."""
        if self.latents is None:
            return None
        return Solution(
            sample=self.latents,
            status=status,
            message=f"The pipeline ended after {self.steps} steps ({status.value}); these are its last latents.",
            statuses=(status,) * len(self.latents),
            steps=(self.steps,) * len(self.latents),
            error_estimate=np.full(len(self.latents), np.nan),
            stats=self.stats,
            trajectory=None,
            states=self.latents,
        )


def batch_of(solution: Solution, stats: Stats) -> Solution:
    """The solver's one sample, which is all latents of a pipeline, as a batch of them."""
    n, trajectory = solution.sample.shape[1], solution.trajectory
    return replace(
        solution,
        sample=solution.sample[0],
        statuses=solution.statuses * n,
        steps=solution.steps * n,
        error_estimate=np.repeat(solution.error_estimate, n),
        stats=stats,
        trajectory=None if trajectory is None else trajectory[:, 0],
        states=solution.states[0],
    )


@dataclass(frozen=True)
class Choices:
    """The arguments of :func:`~parasolver_adapters.diffusers.parallel_sampling`, checked."""

    solver: ParallelIntegralSolver
    max_rows: int | None
    preview: Preview | None
    fallback: str
    sequential: bool
    group: dist.ProcessGroup | None
    timeout: float
    max_seconds: float | None = None

    @property
    def processes(self) -> int:
        """How many share the rows."""
        return 1 if self.group is None else self.group.size()

    @classmethod
    def checked(
        cls,
        window: int = 5,
        *,
        method: str | Method = "secant",
        max_rows: int | None = None,
        preview: Preview | None = None,
        fallback: str = "error",
        group: dist.ProcessGroup | DeviceMesh | None = None,
        timeout: float = 120.0,
        max_seconds: float | None = None,
        **options: Any,
    ) -> Choices:
        """Raise a ValueError or TypeError for what cannot be; ``options`` are the solver's."""
        if fallback not in ("error", "sequential"):
            raise ValueError(f'fallback: expected "error" or "sequential", got {fallback!r}')
        if preview is not None and not callable(preview):
            raise TypeError(f"preview: expected a function preview(round, latents), got {type(preview).__name__}")
        check_count("max_rows", max_rows, optional=True)
        check_seconds(max_seconds)
        sequential = isinstance(method, str) and method == "sequential"
        solver = ParallelIntegralSolver(
            ByNode(None),  # each call of the pipeline brings its own table
            window,
            method="secant" if sequential else method,
            check=False,  # batches are compared with the pipeline's own call instead
            **options,
        )
        shared = None
        if group is not None:
            from parasolver_adapters.distributed import check_group  # imports much that few need

            shared = check_group(group, timeout)
        return cls(solver, max_rows, preview, fallback, sequential or window == 1, shared, timeout, max_seconds)
