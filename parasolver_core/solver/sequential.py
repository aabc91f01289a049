"""The plain loop, one step after another: the truth that parallel sampling is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike

from parasolver_core.arrays import Array, copied, finite_rows, given_back, integers, own_arithmetic
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.solution import SampleRecord, Stats, Status
from parasolver_core.solver.loop import Solver
from parasolver_core.solver.state import Reached, SolverState


class SequentialState(SolverState):
    """The plain loop: all samples at one step. A sample that fails leaves it with its last final state."""

    foresees = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.step = 0
        self.alive = list(range(self.batch))
        self.xs, self.ms = [self.xp.astype(self.x_T, self.dtype, copy=True)], []  # rows of the samples alive
        self.ended: dict[int, tuple[Status, int, Array]] = {}  # sample: status, node, state
        self.kept: list[Array] = [self.xs[0]]  # if they are to be saved; NaN where a sample has failed
        self._reached = self._survey(Stats())

    def end(self, statuses: dict[int, Status], state: Array) -> None:
        """Let samples fail at this step, with their rows of ``state``."""
        for sample, status in statuses.items():
            self.ended[sample] = (status, self.step, state[self.alive.index(sample), ...])
        rows = [row for row, sample in enumerate(self.alive) if sample not in statuses]
        index = self.xp.asarray(rows, dtype=integers(self.xp), device=array_api_compat.device(state))
        self.xs, self.ms = ([self.xp.take(rows, index, axis=0) for rows in part] for part in (self.xs, self.ms))
        self.alive = [sample for sample in self.alive if sample not in statuses]

    def estimate(self) -> Array:
        return self.states

    def keep(self, x: Array) -> None:
        """Add a state to the trajectory; NaN for samples that have failed."""
        if self.save == "trajectory":
            self.kept.append(self._all(x, dict.fromkeys(self.ended, self.xp.full_like(self.x_T[0, ...], float("nan")))))

    def _survey(self, stats: Stats) -> Reached:
        step, x, kept, ended, samples = self.step, self.xs[0], self.kept, self.ended, range(self.batch)
        done = Status.CONVERGED if step == len(self.recurrence) else Status.RUNNING
        states = self._all(x, {sample: state for sample, (_, _, state) in ended.items()})
        return Reached(
            steps=tuple(ended[sample][1] if sample in ended else step for sample in samples),
            statuses=tuple(ended[sample][0] if sample in ended else done for sample in samples),
            states=partial(copied, self.xp, states),
            kept=[partial(_rows, kept, sample) for sample in samples] if self.save == "trajectory" else (),
            errors=np.zeros(self.batch),
            failures=self._failures({sample: node for sample, (_, node, _) in ended.items()}, stats),
            stats=stats,
        )

    def _all(self, alive: Array, others: dict[int, Array]) -> Array:
        """Rows of the samples alive, and the others' in their places, ``(batch, *event)``."""
        if not others:
            return alive
        rows = [others[s] if s in others else alive[self.alive.index(s), ...] for s in range(self.batch)]
        return self.xp.stack(rows)


def _rows(states: Sequence[Array], sample: int) -> Sequence[Array]:
    """One sample of all states."""
    return [state[sample, ...] for state in states]


def sequential_round(state: SequentialState) -> tuple[int, int, list[SampleRecord]]:
    """One step of all samples that are well: the network calls, the number of rows evaluated, and a record of each."""
    xp, i, recurrence, alive = state.xp, state.step, state.recurrence, state.alive
    m = state.evaluator(state.xs[0], np.full(len(alive), i), np.asarray(alive))
    state.torn = True
    memory = recurrence.memory
    state.ms = [xp.astype(m, state.dtype, copy=True), *state.ms[: memory - 1]]
    z = None
    if recurrence.c[i] != 0:
        z = xp.reshape(given_back(xp, state.noise.block([(i, sample) for sample in alive])), state.xs[0].shape)
    with own_arithmetic():
        x = recurrence.advance(i, state.xs, state.ms, z)
    before, state.xs = state.xs[0], [x, *state.xs[: memory - 1]]
    outputs_ok, states_ok = np.split(finite_rows(xp, xp.concat([state.ms[0], x])), 2)
    failed = {
        sample: Status.NONFINITE_SOLVER if outputs_ok[row] else Status.NONFINITE_MODEL
        for row, sample in enumerate(alive)
        if not (outputs_ok[row] and states_ok[row])
    }
    for sample in alive:
        state.noise.forget(i, sample)
    nothing = np.zeros(1)
    records = [SampleRecord(s, np.array([i]), int(s not in failed), nothing, nothing, 0.0) for s in alive]
    if failed:
        state.end(failed, before)
    state.step += 1
    state.keep(state.xs[0])
    return 1, len(records), records


@dataclass(frozen=True)
class SequentialSolver(Solver):
    """The plain loop, one step after another: the truth that parallel sampling is measured against."""

    def init(self, denoiser: DenoiserFn, x_T: Array, timesteps: ArrayLike, **options: Any) -> SequentialState:
        options = {"seed": None, "noise": None, "save": "sample"} | options
        if options.pop("start", None) is not None:
            raise ValueError("start: the plain loop has no use for a warm start; leave it out")
        return SequentialState(denoiser, x_T, timesteps, self.step_rule, **self.evaluation, **options)

    def _round(self, state: SequentialState) -> tuple[int, int, list[SampleRecord]]:
        return sequential_round(state)
