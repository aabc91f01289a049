"""The solver: rounds of one batched network call and one correction each, until every sample is final."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from numpy.typing import ArrayLike

from parasolver_core.arrays import Array, no_grad, outside_graphs
from parasolver_core.denoiser.contract import DenoiserFn, Telling
from parasolver_core.errors import attach, has_solution
from parasolver_core.samplers.noise import NoiseFn, Seed
from parasolver_core.samplers.step_rules import StepRule
from parasolver_core.solution import RoundRecord, SampleRecord, Solution, Status
from parasolver_core.solver.deadline import Deadline, check_seconds
from parasolver_core.solver.progress import Meter
from parasolver_core.solver.report import left_by, raise_for, solution_of
from parasolver_core.solver.state import Save, SolverState
from parasolver_core.validation import check_count, check_counts, own_numbers

Callback = Callable[["SolverState"], Any]


@dataclass(frozen=True)
class Solver(ABC):
    """The loop around any way of sampling: it alone knows of rounds, callbacks, interrupts and errors.

    A solver holds choices and no state; one solver may serve many runs, also at the same time.
    """

    step_rule: StepRule
    max_rounds: int | None = field(default=None, kw_only=True)
    max_rows: int | None = field(default=None, kw_only=True)
    buckets: Sequence[int] = field(default=(), kw_only=True)
    state_device: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_count("max_rounds", self.max_rounds, optional=True)
        check_count("max_rows", self.max_rows, optional=True)
        check_counts("buckets", self.buckets)
        own_numbers(self, "max_rounds", "max_rows")
        object.__setattr__(self, "buckets", tuple(map(int, self.buckets)))

    @abstractmethod
    def init(
        self,
        denoiser: DenoiserFn,
        x_T: Array,
        timesteps: ArrayLike,
        *,
        seed: Seed | None = None,
        noise: Array | NoiseFn | None = None,
        save: Save = "sample",
        start: Array | None = None,
    ) -> SolverState:
        """A run that has not begun; no network call is made. Arguments as in :func:`solve`."""

    @abstractmethod
    def _round(self, state: Any) -> tuple[int, int, Sequence[SampleRecord]]:
        """Advance by one round.

        Returns:
            The network calls made one after another, the number of rows evaluated, and a record of each sample that
            took part.
        """

    def step(self, state: SolverState) -> None:
        """One round.

        Raises:
            RuntimeError: the run has ended (:meth:`done`), or its last round was interrupted half-way.
        """
        if self.done(state):
            raise RuntimeError("state: the run has ended; step while not solver.done(state), then solver.result(state)")
        if state.torn:
            raise RuntimeError(
                "state: its last round was interrupted half-way; solver.result(state) has what was final before it"
            )
        started, before = time.perf_counter(), state.evaluator.seconds
        if state.stats.rounds == 0:
            state.evaluator.begin(lambda: self.choices() | state.fingerprint())
        with no_grad(state.xp):
            turns, evaluations, records = self._round(state)
        state.commit(
            RoundRecord(
                round=len(state.stats.history) + 1,
                evaluations=evaluations,
                samples=records,
                seconds_denoiser=state.evaluator.seconds - before,
                seconds=time.perf_counter() - started,
                turns=turns,
            )
        )

    def choices(self) -> dict[str, str]:
        """The solver's choices by name; the step rule's are in its table."""
        names = [field.name for field in fields(self) if field.name != "step_rule"]
        chosen = {name: repr(getattr(self, name)) for name in names}
        return {name: re.sub(r" at 0x[0-9a-f]+", "", value) for name, value in chosen.items()} | {
            "solver": type(self).__name__
        }

    def done(self, state: SolverState) -> bool:
        """Whether every sample has ended, the run was halted or ``max_rounds`` are used up."""
        if state.halted is not None or Status.RUNNING not in state.statuses:
            return True
        if self.max_rounds is not None and state.stats.rounds >= self.max_rounds:
            state.halt(Status.MAX_ROUNDS)
        return state.halted is not None

    @property
    def evaluation(self) -> dict[str, Any]:
        """How the network is called."""
        return {"max_rows": self.max_rows, "buckets": self.buckets, "state_device": self.state_device}

    def result(self, state: SolverState) -> Solution:
        """The solution so far; complete once :meth:`done` is true."""
        return solution_of(state)

    @outside_graphs
    def solve(
        self,
        denoiser: DenoiserFn,
        x_T: Array,
        timesteps: ArrayLike,
        *,
        seed: Seed | None = None,
        noise: Array | NoiseFn | None = None,
        save: Save = "sample",
        start: Array | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        throw: bool = True,
        max_seconds: float | None = None,
    ) -> Solution:
        """Run to the end; arguments as in the function :func:`solve`."""
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: expected a function callback(state), got {type(callback).__name__}")
        check_seconds(max_seconds)
        deadline = Deadline(max_seconds)
        state: SolverState | None = None
        solution: Solution | None = None
        try:
            with Telling(denoiser):
                state = self.init(denoiser, x_T, timesteps, seed=seed, noise=noise, save=save, start=start)
                with Meter(progress, state.length * state.batch) as show:
                    while not self.done(state) and not deadline.halts(state):
                        self.step(state)
                        show(sum(state.steps), state.stats.rounds)
                        if callback is not None and not _call_back(callback, state):
                            state.halt(Status.STOPPED)
                state.evaluator.end()
            solution = deadline.told(self.result(state))
            if throw:
                raise_for(solution)
            return solution
        except BaseException as error:
            if solution is None or not has_solution(error):
                ended, begun, reason = solution, state, error
                attach(error, lambda: ended or left_by(reason, begun, x_T, timesteps, save))
            raise


def _call_back(callback: Callback, state: SolverState) -> bool:
    try:
        callback(state)
    except StopIteration:
        return False
    return True
