"""Runs in progress: what a solver advances, and what a callback sees."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_core.arrays import Array, copied, detach, is_array, narrow, to_host, working_dtype
from parasolver_core.checking import RowCheck, remembered
from parasolver_core.denoiser import DenoiserFn, Evaluator, check_agreement
from parasolver_core.held_form import HeldForm
from parasolver_core.levels import Levels
from parasolver_core.methods import Method
from parasolver_core.noise import NoiseFn, NoiseSource, Seed
from parasolver_core.recurrence import Recurrence
from parasolver_core.refinement import Aims, Refinement
from parasolver_core.run import Outcome, Run
from parasolver_core.sliding import Sliding
from parasolver_core.solution import RoundRecord, SampleRecord, Stats, Status
from parasolver_core.spread import SpreadNodes
from parasolver_core.step_rules import StepRule, table
from parasolver_core.validation import check_plain, check_scale, check_start
from parasolver_core.window import Plan

Float64 = NDArray[np.float64]
Save = Literal["sample", "trajectory"]


@dataclass(frozen=True)
class Reached:
    """How far a run is. Made anew after each round and put in place at once, so that all of it is of one round.

    Nothing of it refers to the state: a cycle would keep the buffers alive after the run.

    Args:
        steps, statuses: how many steps of each sample are final, and how it stands.
        states: gives the last final state of each sample, ``(batch, *event)``, in the working dtype.
        kept: for each sample, gives all its final states, at least ``steps + 1`` of them, each of the event's size.
        errors: (batch,), estimated relative errors.
        failures: of the samples that are not finite, ``(node, round)``.
        stats: what it cost.
    """

    steps: tuple[int, ...]
    statuses: tuple[Status, ...]
    states: Callable[[], Array]
    kept: Sequence[Callable[[], Sequence[Array]]]
    errors: NDArray[np.float64]
    failures: Mapping[int, tuple[int, int]]
    stats: Stats


class SolverState(ABC):
    """A run in progress, as :meth:`Solver.step` advances it and as callbacks see it.

    An interrupt may come anywhere. What a round is working on is then torn; what is told here is of the last whole one.
    """

    _reached: Reached

    def __init__(
        self,
        denoiser: DenoiserFn,
        x_T: Array,
        timesteps: ArrayLike,
        step_rule: StepRule,
        *,
        seed: Seed | None,
        noise: Array | NoiseFn | None,
        save: Save,
        max_rows: int | None,
        buckets: Sequence[int] = (),
        state_device: Any = None,
    ) -> None:
        if save not in ("sample", "trajectory"):
            raise ValueError(f'save: expected "sample" or "trajectory", got {save!r}')
        check_start(x_T)
        self.x_T, self.save, self._device = detach(x_T), save, array_api_compat.device(x_T)
        if state_device is not None:
            self.x_T = _moved(self.x_T, state_device)
        self.xp = array_api_compat.array_namespace(x_T)
        self.dtype = working_dtype(self.xp, x_T.dtype)
        self.recurrence: Recurrence = table(step_rule, timesteps)
        check_agreement(denoiser, step_rule)
        check_scale(self.x_T, step_rule.start_scale(self.recurrence.timesteps))
        self.noise = NoiseSource(self.x_T, self.dtype, len(self.recurrence), seed, noise)
        self.evaluator = Evaluator(denoiser, x_T, self.recurrence, self.noise, max_rows, buckets, state_device)
        self.halted: Status | None = None
        self.torn = False  # whether a round has begun to move states, and not ended

    @property
    def batch(self) -> int:
        """Number of samples."""
        return int(self.x_T.shape[0])

    @property
    def stats(self) -> Stats:
        """What the run has cost."""
        return self._reached.stats

    @property
    def steps(self) -> tuple[int, ...]:
        """How many steps of each sample are final."""
        return self._reached.steps

    @property
    def statuses(self) -> tuple[Status, ...]:
        """How each sample stands."""
        return self._reached.statuses

    @property
    def states(self) -> Array:
        """The last final state of each sample, ``(batch, *event)``."""
        return self._given_back(self._reached.states())

    @property
    def failures(self) -> Mapping[int, tuple[int, int]]:
        """``(node, round)`` of the samples whose status is not finite."""
        return self._reached.failures

    def errors(self) -> NDArray[np.float64]:
        """Estimated relative error of each sample, (batch,)."""
        return self._reached.errors

    @abstractmethod
    def estimate(self) -> Array:
        """The best estimate of the sample so far, ``(batch, *event)``: a preview while the run goes on."""

    @abstractmethod
    def _survey(self, stats: Stats) -> Reached:
        """How far the run is after a round, with its stats."""

    def commit(self, record: RoundRecord) -> None:
        """A round is over: what it has reached takes the place of what there was."""
        evaluator = self.evaluator
        self._reached = self._survey(self.stats.after(record, evaluator.calls, evaluator.max_rows))
        self.torn = False

    def trajectory(self) -> Array | None:
        """All final states if they were to be saved, ``(N + 1, batch, *event)``; NaN where one is not final."""
        if self.save != "trajectory":
            return None
        reached, xp, event = self._reached, self.xp, self.x_T.shape[1:]
        kept = [states()[: steps + 1] for steps, states in zip(reached.steps, reached.kept, strict=True)]
        missing = xp.full_like(xp.reshape(kept[0][0], event), float("nan"))
        rows = [
            xp.stack([xp.reshape(states[i], event) if i < len(states) else missing for states in kept])
            for i in range(len(self.recurrence) + 1)
        ]
        return narrow(xp, xp.stack(rows), self.x_T.dtype)

    def final(self, step: int) -> Array:
        """The state after so many steps, final and kept for a trajectory, of every sample, ``(batch, *event)``."""
        rows = [states()[step] for states in self._reached.kept]
        return self._given_back(_stacked(self.xp, rows, self.x_T.shape))

    def expected(self, sample: int, i: int) -> Array | None:
        """The output expected at node i of a final sample, ``(*event)``, if it was interpolated; else None."""
        return None

    def _failures(self, nodes: Mapping[int, int], stats: Stats) -> dict[int, tuple[int, int]]:
        """Of the samples that failed at these nodes: the round in which each did."""
        known = self._reached.failures if stats.rounds else {}
        return {sample: known.get(sample, (node, stats.rounds)) for sample, node in nodes.items()}

    def halt(self, status: Status) -> None:
        """End the run for all samples that are not final."""
        self.halted = status

    def plan(self) -> dict[str, str]:
        """What processes that share the rows must have been given alike: hashes of the arrays, by name."""
        own = self.recurrence
        noisy = np.flatnonzero(own.c)[[0, -1]].tolist() if own.stochastic else []
        tables = [own.timesteps, own.a, own.b, own.c, own.held, own.slope, own.identity_slope]
        return {
            "timesteps and step rule": _hash(*tables),
            "shape and dtype of x_T": f"{tuple(self.x_T.shape)}, {self.x_T.dtype}",
            "x_T": _hash(to_host(self.xp.astype(self.x_T, self.dtype))),
            "seed or noise": self.noise.fingerprint(noisy),
        }

    def _given_back(self, values: Array) -> Array:
        """A result in the dtype and on the device of ``x_T`` as it was given."""
        return array_api_compat.to_device(narrow(self.xp, values, self.x_T.dtype), self._device)


class ParallelState(SolverState):
    """A parallel run: its samples are divided among :class:`~parasolver_core.run.Run` objects, which move them."""

    def __init__(
        self,
        *args: Any,
        method: Method,
        width: int,
        warmup_steps: int,
        tolerance: float,
        start: Array | None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._plan = Plan(
            xp=self.xp,
            recurrence=self.recurrence,
            method=method,
            bound=method.acceptance.bounds(self.recurrence),
            width=min(width, len(self.recurrence)),
            warmup_steps=warmup_steps,
            tolerance=tolerance,
            keep=self.save == "trajectory",
        )
        self._start = None if start is None else self._check_guess(start)
        with np.errstate(over="ignore", invalid="ignore"):  # of a wild warm start: its nodes are filled in anew
            self.runs: list[Run] = self._begin()
        self._outcomes: dict[int, Outcome] = {}
        self.check: RowCheck | None = None
        self._reached = self._survey(Stats())

    def check_rows(self, denoiser: DenoiserFn) -> None:
        """Look at rows of this run alone, if the denoiser is not remembered for having passed."""
        options = (denoiser, self.evaluator, self.x_T, self.dtype, self.recurrence, self._plan.tolerance)
        self.check = RowCheck(*options) if not remembered(denoiser, self.batch) else None

    def _begin(self) -> list[Run]:
        """The runs that take the samples from ``x_T``."""
        plan, source, form, samples = self._plan, self.noise, HeldForm(self.recurrence), np.arange(self.batch)
        flat = self.xp.reshape(self.xp.astype(self.x_T, self.dtype, copy=True), (self.batch, -1))
        sliding = Sliding(plan, form, source, self._start)
        if not plan.method.spreads(self.recurrence, plan.width, plan.tolerance):
            return list(sliding(samples, flat))

        def noise(step: int, sample: int) -> Array:  # read once a level
            z = source.flat(step, sample)
            source.release(step, sample)
            return z

        within = plan.method.acceptance.spread_tolerance(self.recurrence, plan.tolerance)
        aims, levels = Aims(self.recurrence, plan.width, plan.tolerance, within), Levels.of(self.recurrence)
        level = levels.opening(aims.first)
        refinements = [Refinement(aims, level) for _ in range(self.batch)]
        return [SpreadNodes(plan, form, levels, level, samples, flat, noise, sliding, refinements)]

    def go_on(self, records: Sequence[SampleRecord]) -> None:
        """After a round: samples that have ended leave, and so do those that another run takes on."""
        for record in records:
            first = self.steps[record.sample]
            for step in range(first, first + record.accepted):
                self.noise.forget(step, record.sample)
        for run in self.runs:
            self._outcomes |= run.ended
        self.runs = [successor for run in self.runs for successor in run.successors()]

    def expected(self, sample: int, i: int) -> Array | None:
        """The output expected at node i of a final sample, ``(*event)``, if it was interpolated; else None."""
        outcome = self._outcomes.get(sample)
        if outcome is None or outcome.expected is None:
            return None
        return self.xp.reshape(outcome.expected(i), self.x_T.shape[1:])

    @property
    def converged(self) -> bool:
        """Whether all samples are final, before the round is committed."""
        return not self.runs and all(one.status is Status.CONVERGED for one in self._outcomes.values())

    def _check_guess(self, start: Array) -> Array:
        """The warm start as (N + 1, batch, size)."""
        check_plain("start", start)
        expected = (len(self.recurrence) + 1, *self.x_T.shape)
        if type(start) is not type(self.x_T) or tuple(start.shape) != expected:
            got = type(start).__name__ + (f" of shape {tuple(start.shape)}" if is_array(start) else "")
            raise ValueError(
                f"start: expected a trajectory like x_T of shape (N + 1, batch, *event) = {expected}, got {got}"
            )
        if not bool(self.xp.all(self.xp.isfinite(start))):
            raise ValueError("start: holds NaN or infinity; start from a trajectory that converged")
        start = array_api_compat.to_device(detach(start), array_api_compat.device(self.x_T))
        return self.xp.astype(self.xp.reshape(start, (expected[0], self.batch, -1)), self.dtype)

    def _survey(self, stats: Stats) -> Reached:
        steps, statuses, errors = [0] * self.batch, [Status.RUNNING] * self.batch, np.zeros(self.batch)
        kept: list[Callable[[], Sequence[Array]]] = [tuple] * self.batch
        finals: dict[int, Array] = {}
        for sample, outcome in self._outcomes.items():
            steps[sample], statuses[sample], errors[sample] = outcome.steps, outcome.status, outcome.error
            kept[sample], finals[sample] = partial(_same, outcome.kept), outcome.state
        for run in self.runs:
            states = run.states()
            for row, (sample, step, error) in enumerate(
                zip(run.samples.tolist(), run.steps.tolist(), run.errors.tolist(), strict=True)
            ):
                steps[sample], errors[sample] = step, error
                kept[sample], finals[sample] = partial(run.kept, sample), states[row, :]
        failed = {sample: one.failed_node for sample, one in self._outcomes.items() if one.failed_node >= 0}
        return Reached(
            steps=tuple(steps),
            statuses=tuple(statuses),
            states=partial(_stacked, self.xp, [finals[sample] for sample in range(self.batch)], self.x_T.shape),
            kept=kept,
            errors=errors,
            failures=self._failures(failed, stats),
            stats=stats,
        )

    def plan(self) -> dict[str, str]:
        start = "none" if self._start is None else _hash(to_host(self._start))
        return super().plan() | {"warm start": start, "whether rows are checked": str(self.check is not None)}

    def estimate(self) -> Array:
        if self.torn:
            return self.states
        rows = {sample: outcome.state for sample, outcome in self._outcomes.items()}
        rows |= {sample: run.estimate(sample) for run in self.runs for sample in run.samples.tolist()}
        return self._given_back(_stacked(self.xp, [rows[sample] for sample in range(self.batch)], self.x_T.shape))


class SequentialState(SolverState):
    """The plain loop: all samples at one step. A sample that fails leaves it with its last final state."""

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
        index = self.xp.asarray(rows, dtype=self.xp.int64, device=array_api_compat.device(state))
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


def _stacked(xp: Any, rows: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """Rows of the samples, (size,), as ``(batch, *event)``."""
    return xp.reshape(xp.stack(rows), shape)


def _same(states: Sequence[Array]) -> Sequence[Array]:
    return states


def _rows(states: Sequence[Array], sample: int) -> Sequence[Array]:
    """One sample of all states."""
    return [state[sample, ...] for state in states]


def _moved(x_T: Array, device: Any) -> Array:
    try:
        return array_api_compat.to_device(x_T, device)
    except Exception as error:
        raise ValueError(
            f"state_device: expected a device of x_T's array library that is there, such as 'cpu' for PyTorch, got "
            f"{device!r} ({type(error).__name__}: {error})"
        ) from error


def _hash(*arrays: NDArray[Any]) -> str:
    """Of the arrays' bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
