"""A parallel run in progress: its samples are divided among runs, which move them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import array_api_compat
import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from parasolver_core.arrays import Array, detach, finite_rows, given_back, is_array, own_arithmetic, to_host, uploaded
from parasolver_core.denoiser.checking import RowCheck, remembered
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.guesses.memory import Memory
from parasolver_core.methods.method import Method
from parasolver_core.methods.run import Outcome, Run
from parasolver_core.rounds.acceptance import Acceptance
from parasolver_core.rounds.shared import Shared
from parasolver_core.samplers.held_form import HeldForm
from parasolver_core.samplers.recurrence import Recurrence
from parasolver_core.solution import Stats, Status
from parasolver_core.solver.state import Reached, SolverState, hash_of, stacked, unchanged
from parasolver_core.validation import check_plain


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
        memory: Memory | None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._shared = Shared(
            xp=self.xp,
            dtype=self.dtype,
            recurrence=self.recurrence,
            form=HeldForm(self.recurrence),
            noise=self.noise,
            linearization=method.linearization,
            acceptance=method.acceptance,
            fill=method.fill,
            bound=_bounds(method.acceptance, self.recurrence),
            width=min(width, len(self.recurrence)),
            warmup_steps=warmup_steps,
            tolerance=tolerance,
            keep=self.save == "trajectory",
            memory=memory,
        )
        if memory is not None:
            memory.check(self.recurrence, math.prod(self.start.shape[1:]))
        self._start = None if start is None else self._check_guess(start)
        flat = self.xp.reshape(self.xp.astype(self.start, self.dtype, copy=True), (self.batch, -1))
        with own_arithmetic():  # of a wild warm start: its nodes are filled in anew
            self.runs: list[Run] = method.begin(self._shared, flat, self._start)
        self._outcomes: dict[int, Outcome] = {}
        self.check: RowCheck | None = None
        self._reached = self._survey(Stats())

    def check_rows(self, denoiser: DenoiserFn) -> None:
        """Look at rows of this run alone, if the denoiser is not remembered for having passed."""
        options = (denoiser, self.evaluator, self.start, self.dtype, self.recurrence, self._shared.tolerance)
        self.check = RowCheck(*options) if not remembered(denoiser, self.batch) else None

    def go_on(self) -> None:
        """After a round: samples that have ended leave, and so do those that another run takes on."""
        for run in self.runs:
            self._outcomes |= run.ended
        self.runs = [successor for run in self.runs for successor in run.successors()]
        if self.noise.held:
            self.noise.forget_before(self._final)

    @property
    def _final(self) -> NDArray[np.int64]:
        """(batch,), how many steps of each sample are final."""
        steps = np.zeros(self.batch, dtype=np.int64)
        for sample, outcome in self._outcomes.items():
            steps[sample] = outcome.steps
        for run in self.runs:
            steps[run.samples] = run.steps
        return steps

    def expected(self, sample: int, i: int) -> Array | None:
        """The output expected at node i of a final sample, ``(*event)``, if it was interpolated; else None."""
        outcome = self._outcomes.get(sample)
        if outcome is None or outcome.expected is None:
            return None
        return self.xp.reshape(given_back(self.xp, outcome.expected(i)), self.x_T.shape[1:])

    @property
    def converged(self) -> bool:
        """Whether all samples are final, before the round is committed."""
        return not self.runs and all(outcome.status is Status.CONVERGED for outcome in self._outcomes.values())

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
        statuses, errors = [Status.RUNNING] * self.batch, np.zeros(self.batch)
        for sample, outcome in self._outcomes.items():
            statuses[sample], errors[sample] = outcome.status, outcome.error
        for run in self.runs:
            errors[run.samples] = run.errors
        ended = {sample: outcome.state for sample, outcome in self._outcomes.items()}
        running = [(run.samples, run.states()) for run in self.runs]
        failed = {sample: outcome.failed_node for sample, outcome in self._outcomes.items() if outcome.failed_node >= 0}
        return Reached(
            steps=tuple(self._final.tolist()),
            statuses=tuple(statuses),
            states=partial(_in_order, self.xp, ended, running, self.start.shape),
            kept=self._kept() if self.save == "trajectory" else (),
            errors=errors,
            failures=self._failures(failed, stats),
            stats=stats,
        )

    def _kept(self) -> list[Callable[[], Sequence[Array]]]:
        """For each sample, what gives its final states."""
        kept: dict[int, Callable[[], Sequence[Array]]] = {
            sample: partial(unchanged, outcome.kept) for sample, outcome in self._outcomes.items()
        }
        kept |= {sample: partial(run.kept, sample) for run in self.runs for sample in run.samples.tolist()}
        return [kept[sample] for sample in range(self.batch)]

    def fingerprint(self) -> dict[str, str]:
        start = "none" if self._start is None else hash_of(to_host(self._start))
        return super().fingerprint() | {"warm start": start, "whether rows are checked": str(self.check is not None)}

    def estimate(self) -> Array:
        if self.torn:
            return self.states
        rows = {sample: outcome.state for sample, outcome in self._outcomes.items()}
        with own_arithmetic():  # what is guessed of the steps to come may overflow
            rows |= {sample: run.estimate(sample) for run in self.runs for sample in run.samples.tolist()}
        states = stacked(self.xp, [rows[sample] for sample in range(self.batch)], self.start.shape)
        estimate, fine = self._given_back(self._state_of(states)), finite_rows(self.xp, states)
        if fine.all():
            return estimate
        good = uploaded(self.xp, fine.reshape(-1, *(1,) * (estimate.ndim - 1)), device(estimate))
        return self.xp.where(good, estimate, self.states)


def _in_order(
    xp: Any, ended: Mapping[int, Array], running: Sequence[tuple[NDArray[np.int64], Array]], shape: tuple[int, ...]
) -> Array:
    """States of samples, each (size,), and of runs' samples, each (B, size), as ``(batch, *event)``."""
    rows = dict(ended)
    for samples, states in running:
        rows |= {sample: states[row, :] for row, sample in enumerate(samples.tolist())}
    return stacked(xp, [rows[sample] for sample in range(shape[0])], shape)


def _bounds(acceptance: Acceptance, recurrence: Recurrence) -> NDArray[np.float64]:
    """What an acceptance says of each node."""
    bounds, n = np.asarray(acceptance.bounds(recurrence)), len(recurrence)
    if bounds.shape != (n,) or bounds.dtype.kind not in "fi":
        told = f"got shape {bounds.shape}, dtype {bounds.dtype}"
        raise ValueError(f"acceptance: its bounds(recurrence) must return a number for each of {n} nodes, {told}")
    return bounds
