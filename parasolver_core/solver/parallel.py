"""The parallel solver: a round asks the network at the nodes of all runs, and moves them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike

from parasolver_core.arrays import (
    Array,
    detach,
    fetch,
    is_array,
    to_host,
)
from parasolver_core.denoiser.checking import RowCheck, remembered
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.methods.method import Method
from parasolver_core.methods.presets import get_method
from parasolver_core.methods.run import Outcome, Run
from parasolver_core.rounds.shared import Shared
from parasolver_core.samplers.held_form import HeldForm
from parasolver_core.solution import SampleRecord, Stats, Status
from parasolver_core.solver.loop import Solver
from parasolver_core.solver.sequential import SequentialState, sequential_round
from parasolver_core.solver.state import Reached, SolverState, hash_of, stacked, unchanged
from parasolver_core.validation import (
    check_count,
    check_plain,
    check_tolerance,
)


class ParallelState(SolverState):
    """A parallel run: its samples are divided among runs, which move them; see :mod:`parasolver_core.methods.run`."""

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
        self._shared = Shared(
            xp=self.xp,
            recurrence=self.recurrence,
            form=HeldForm(self.recurrence),
            noise=self.noise,
            linearization=method.linearization,
            acceptance=method.acceptance,
            fill=method.fill,
            bound=method.acceptance.bounds(self.recurrence),
            width=min(width, len(self.recurrence)),
            warmup_steps=warmup_steps,
            tolerance=tolerance,
            keep=self.save == "trajectory",
        )
        self._start = None if start is None else self._check_guess(start)
        flat = self.xp.reshape(self.xp.astype(self.x_T, self.dtype, copy=True), (self.batch, -1))
        with np.errstate(over="ignore", invalid="ignore"):  # of a wild warm start: its nodes are filled in anew
            self.runs: list[Run] = method.begin(self._shared, flat, self._start)
        self._outcomes: dict[int, Outcome] = {}
        self.check: RowCheck | None = None
        self._reached = self._survey(Stats())

    def check_rows(self, denoiser: DenoiserFn) -> None:
        """Look at rows of this run alone, if the denoiser is not remembered for having passed."""
        options = (denoiser, self.evaluator, self.x_T, self.dtype, self.recurrence, self._shared.tolerance)
        self.check = RowCheck(*options) if not remembered(denoiser, self.batch) else None

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
            kept[sample], finals[sample] = partial(unchanged, outcome.kept), outcome.state
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
            states=partial(stacked, self.xp, [finals[sample] for sample in range(self.batch)], self.x_T.shape),
            kept=kept,
            errors=errors,
            failures=self._failures(failed, stats),
            stats=stats,
        )

    def fingerprint(self) -> dict[str, str]:
        start = "none" if self._start is None else hash_of(to_host(self._start))
        return super().fingerprint() | {"warm start": start, "whether rows are checked": str(self.check is not None)}

    def estimate(self) -> Array:
        if self.torn:
            return self.states
        rows = {sample: outcome.state for sample, outcome in self._outcomes.items()}
        rows |= {sample: run.estimate(sample) for run in self.runs for sample in run.samples.tolist()}
        return self._given_back(stacked(self.xp, [rows[sample] for sample in range(self.batch)], self.x_T.shape))


@dataclass(frozen=True)
class ParallelIntegralSolver(Solver):
    """Finds the sequential trajectory in parallel rounds.

    Args:
        step_rule: the sampler.
        window: nodes evaluated in one round, of each sample; 1 is the sequential sampler.
        tolerance: wanted relative RMS distance to the sequential sample; 0 means exact.
        method: a preset's name, a calibration's file or a :class:`~parasolver_core.methods.method.Method`.
        warmup_steps: sequential network calls after the first before the window opens ("preconditioning steps").
        check: in a denoiser's first run, look at a few rows again, each alone in a call of one row: rows that depend on
            other rows, or do not repeat themselves, are an error. A denoiser that passed is remembered, weakly.
        max_rounds: give up after so many; by default never: N suffice, or N and a sliding window's with spread nodes.
        max_rows, buckets, state_device: how the network is called, as in :func:`solve`.

    Example, by hand::

        solver = ParallelIntegralSolver(DDIM(schedule), window=16)
        state = solver.init(denoiser, x_T, schedule.timesteps(50))
        while not solver.done(state):
            solver.step(state)
        solution = solver.result(state)
    """

    window: int = 5
    tolerance: float = field(default=1e-2, kw_only=True)
    method: str | os.PathLike[str] | Method = field(default="secant", kw_only=True)
    warmup_steps: int = field(default=0, kw_only=True)
    check: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window)
        check_count("warmup_steps", self.warmup_steps, minimum=0)
        check_tolerance(self.tolerance)
        get_method(self.method)

    def method_of(self, start: Array | None) -> Method:
        """The method of a run: a warm start, and steps to warm up with, belong to a window that slides."""
        method = get_method(self.method)
        method.check_choices(start=start is not None, warmup_steps=self.warmup_steps)
        return method.sliding() if start is not None or self.warmup_steps else method

    def init(
        self, denoiser: DenoiserFn, x_T: Array, timesteps: ArrayLike, **options: Any
    ) -> ParallelState | SequentialState:
        options = {"seed": None, "noise": None, "save": "sample", "start": None} | options
        method = self.method_of(options["start"])
        if self.window == 1 or np.size(timesteps) == 1:  # the plain loop, to the last bit
            del options["start"]
            return SequentialState(denoiser, x_T, timesteps, self.step_rule, **self.evaluation, **options)
        state = ParallelState(
            denoiser,
            x_T,
            timesteps,
            self.step_rule,
            method=method,
            width=self.window,
            warmup_steps=self.warmup_steps,
            tolerance=self.tolerance,
            **self.evaluation,
            **options,
        )
        if self.check and self.window > 1:
            state.check_rows(denoiser)
        return state

    def _round(self, state: ParallelState | SequentialState) -> tuple[int, list[SampleRecord]]:
        if isinstance(state, SequentialState):
            return sequential_round(state)
        runs, check, records = state.runs, state.check, []
        outputs, evaluations = self._evaluate(state, runs)
        state.torn = True
        with np.errstate(over="ignore", invalid="ignore"):  # NumPy's; what is not finite is reported as a status
            packed = [run.compare(D) for run, D in zip(runs, outputs, strict=True)]
            for run, D, sums in zip(runs, outputs, fetch(state.xp, packed), strict=True):
                records += run.correct(D, sums)
            state.go_on(records)
        if check is not None:
            evaluations += check.look(records)
            if state.converged:
                evaluations += check.finish()
        return evaluations, records

    def _evaluate(self, state: ParallelState, runs: list[Run]) -> tuple[list[Array], int]:
        """The round's network call: the outputs for each run, (rows, size), and the number of rows."""
        xp, event, check = state.xp, tuple(state.x_T.shape[1:]), state.check
        inputs, nodes, owners = ([getattr(run, name) for run in runs] for name in ("inputs", "nodes", "owners"))
        ends = np.cumsum([len(own) for own in nodes]).tolist()
        if check is not None:
            inputs, nodes, owners = check.with_extra(inputs, nodes, owners)
        rows = [xp.reshape(x, (x.shape[0], *event)) for x in inputs]
        D = state.evaluator(rows, np.concatenate(nodes), np.concatenate(owners))
        D = xp.reshape(D, (D.shape[0], inputs[0].shape[1]))
        if check is not None:
            check.note(inputs, nodes, owners, D)
        return [D[start:end, :] for start, end in pairwise([0, *ends])], D.shape[0]
