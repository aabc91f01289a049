"""The solver: rounds of one batched network call and one correction each, until every sample is final."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_core.arrays import Array, finite_rows, no_grad, to_host
from parasolver_core.correction import fetch
from parasolver_core.denoiser import DenoiserFn
from parasolver_core.errors import (
    ConvergenceError,
    NondeterministicDenoiserError,
    NonFiniteError,
    SolverError,
)
from parasolver_core.methods import Method, get_method
from parasolver_core.noise import NoiseFn, Seed
from parasolver_core.progress import meter
from parasolver_core.solution import RoundRecord, SampleRecord, Solution, Status
from parasolver_core.state import ParallelState, SampleRun, Save, SequentialState, SolverState
from parasolver_core.step_rules import StepRule
from parasolver_core.validation import check_count, check_tolerance

_NONFINITE = (Status.NONFINITE_MODEL, Status.NONFINITE_SOLVER)
Callback = Callable[["SolverState"], Any]


@dataclass(frozen=True)
class Solver(ABC):
    """The loop around any way of sampling: it alone knows of rounds, callbacks, interrupts and errors.

    A solver holds choices and no state; one solver may serve many runs, also at the same time.
    """

    step_rule: StepRule
    max_rounds: int | None = field(default=None, kw_only=True)
    max_rows: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_count("max_rounds", self.max_rounds, optional=True)
        check_count("max_rows", self.max_rows, optional=True)

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
    def _round(self, state: Any) -> tuple[int, list[SampleRecord]]:
        """Advance by one round; the number of rows evaluated and a record of each sample that took part."""

    def step(self, state: SolverState) -> None:
        """One round."""
        started, before = time.perf_counter(), state.evaluator.seconds
        with no_grad(state.xp):
            evaluations, records = self._round(state)
        state.stats.calls = state.evaluator.calls
        for sample, status in enumerate(state.statuses):
            if status in _NONFINITE:
                state.failed_rounds.setdefault(sample, state.stats.rounds + 1)
        state.stats.add(
            RoundRecord(
                round=state.stats.rounds + 1,
                evaluations=evaluations,
                samples=tuple(records),
                seconds_denoiser=state.evaluator.seconds - before,
                seconds=time.perf_counter() - started,
            )
        )

    def done(self, state: SolverState) -> bool:
        """Whether every sample has ended, the run was halted or ``max_rounds`` are used up."""
        if state.halted is not None or Status.RUNNING not in state.statuses:
            return True
        if self.max_rounds is not None and state.stats.rounds >= self.max_rounds:
            state.halt(Status.MAX_ROUNDS)
        return state.halted is not None

    def result(self, state: SolverState) -> Solution:
        """The solution so far; complete once :meth:`done` is true."""
        return self._result(state, state.estimate)

    def _result(self, state: SolverState, estimate: Callable[[], Array]) -> Solution:
        end = state.halted or Status.RUNNING
        with no_grad(state.xp), np.errstate(over="ignore"):
            sample = estimate()
            fits = _within_range(state.xp, sample)  # a float32 state need not fit a half-precision sample
            statuses = tuple(
                end if one is Status.RUNNING else Status.NONFINITE_SOLVER if one is Status.CONVERGED and not ok else one
                for one, ok in zip(state.statuses, fits, strict=True)
            )
            status = next((one for one in statuses if one is not Status.CONVERGED), Status.CONVERGED)
            return Solution(
                sample=sample,
                status=status,
                message=_message(status, state),
                statuses=statuses,
                steps=state.steps,
                error_estimate=state.errors(),
                stats=state.stats,
                trajectory=state.trajectory(),
                states=state.states,
            )

    def _partial(self, state: SolverState) -> Solution:
        """What an error left: with the best estimate, or the last final states where making that fails too."""
        try:
            return self.result(state)
        except Exception:
            return self._result(state, lambda: state.states)

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
    ) -> Solution:
        """Run to the end; arguments as in the function :func:`solve`."""
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: expected a function callback(state), got {type(callback).__name__}")
        state = self.init(denoiser, x_T, timesteps, seed=seed, noise=noise, save=save, start=start)
        try:
            with meter(progress, len(state.recurrence) * state.batch) as show:
                while not self.done(state):
                    self.step(state)
                    show(sum(state.steps), state.stats.rounds)
                    if callback is not None and not _call_back(callback, state):
                        state.halt(Status.STOPPED)
        except BaseException as error:
            state.halt(Status.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Status.FAILED)
            error.solution = self._partial(state)  # type: ignore[attr-defined]
            raise
        solution = self.result(state)
        if throw:
            _raise_for(solution)
        return solution


@dataclass(frozen=True)
class SequentialSolver(Solver):
    """The plain loop, one step after another: the truth that parallel sampling is measured against."""

    def init(self, denoiser: DenoiserFn, x_T: Array, timesteps: ArrayLike, **options: Any) -> SequentialState:
        options = {"seed": None, "noise": None, "save": "sample"} | options
        options.pop("start", None)  # the sequential sampler has no use for it
        return SequentialState(denoiser, x_T, timesteps, self.step_rule, max_rows=self.max_rows, **options)

    def _round(self, state: SequentialState) -> tuple[int, list[SampleRecord]]:
        xp, i, recurrence, alive = state.xp, state.step, state.recurrence, state.alive
        m = state.evaluator(xp.asarray(state.xs[0], copy=True), np.full(len(alive), i), np.asarray(alive))
        outputs_ok = finite_rows(xp, m)
        memory = recurrence.memory
        state.ms = [xp.astype(m, state.dtype, copy=True), *state.ms[: memory - 1]]
        z = xp.stack([state.noise(i, sample) for sample in alive]) if recurrence.c[i] != 0 else None
        with np.errstate(over="ignore", invalid="ignore"):  # reported as a status
            x = recurrence.advance(i, state.xs, state.ms, z)
        before, state.xs = state.xs[0], [x, *state.xs[: memory - 1]]
        failed = {
            sample: Status.NONFINITE_SOLVER if outputs_ok[row] else Status.NONFINITE_MODEL
            for row, sample in enumerate(alive)
            if not outputs_ok[row] or not finite_rows(xp, x)[row]
        }
        for sample in alive:
            state.noise.forget(i, sample)
        nothing = np.zeros(1)
        records = [SampleRecord(s, np.array([i]), int(s not in failed), nothing, nothing, 0.0) for s in alive]
        if failed:
            state.end(failed, before)
        state.step += 1
        state.keep(state.xs[0])
        return len(records), records


@dataclass(frozen=True)
class ParallelIntegralSolver(Solver):
    """Finds the sequential trajectory in parallel rounds.

    Args:
        step_rule: the sampler.
        window: nodes evaluated in one round, of each sample; 1 is the sequential sampler.
        tolerance: wanted relative RMS distance to the sequential sample; 0 means exact.
        method: a preset's name or a :class:`~parasolver_core.methods.Method`.
        warmup_steps: sequential network calls after the first before the window opens ("preconditioning steps").
        check: evaluate one row a second time and compare, to find a denoiser that is not deterministic.
        max_rounds: give up after so many; by default never: N suffice, N / window + 16 more where nodes are spread.
        max_rows: the most rows in one call of the network.

    Example, by hand::

        solver = ParallelIntegralSolver(DDIM(schedule), window=16)
        state = solver.init(denoiser, x_T, schedule.timesteps(50))
        while not solver.done(state):
            solver.step(state)
        solution = solver.result(state)
    """

    window: int = 5
    tolerance: float = field(default=1e-2, kw_only=True)
    method: str | Method = field(default="secant", kw_only=True)
    warmup_steps: int = field(default=0, kw_only=True)
    check: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window)
        check_count("warmup_steps", self.warmup_steps, minimum=0)
        check_tolerance(self.tolerance)
        get_method(self.method)

    def init(self, denoiser: DenoiserFn, x_T: Array, timesteps: ArrayLike, **options: Any) -> ParallelState:
        options = {"seed": None, "noise": None, "save": "sample", "start": None} | options
        return ParallelState(
            denoiser,
            x_T,
            timesteps,
            self.step_rule,
            method=get_method(self.method),
            width=self.window,
            warmup_steps=self.warmup_steps,
            tolerance=self.tolerance,
            max_rows=self.max_rows,
            **options,
        )

    def _round(self, state: ParallelState) -> tuple[int, list[SampleRecord]]:
        running = state.running
        outputs, evaluations = self._evaluate(state, running)
        records = []
        with np.errstate(over="ignore", invalid="ignore"):  # NumPy's; what is not finite is reported as a status
            packed = [window.take_defect(D) for window, D in zip(running, outputs, strict=True)]
            for window, D, products in zip(running, outputs, fetch(state.xp, packed), strict=True):
                first = window.lo
                records.append(window.correct(D, products))
                for step in range(first, window.lo):
                    state.noise.forget(step, window.index)
        state.slide_exhausted()
        return evaluations, records

    def _evaluate(self, state: ParallelState, running: list[SampleRun]) -> tuple[list[Array], int]:
        """The round's network call: the outputs of each running sample, (n, size), and the number of rows."""
        xp, event = state.xp, tuple(state.x_T.shape[1:])
        inputs, nodes = [window.inputs for window in running], [window.nodes for window in running]
        samples = [window.index for window in running]
        repeat = self.check and state.first_prediction is not None and len(nodes[0]) > 1
        if repeat:
            inputs.append(xp.reshape(xp.astype(state.x_T[:1, ...], state.dtype, copy=False), (1, -1)))
            nodes.append(np.zeros(1, dtype=np.int64))
            samples.append(0)
        x = inputs[0] if len(inputs) == 1 else xp.concat(inputs, axis=0)
        rows = xp.reshape(x, (x.shape[0], *event))
        if len(inputs) == 1:  # rows of our own buffer: the denoiser gets a copy, as it may work in place
            rows = xp.asarray(rows, copy=True)
        owners = np.repeat(samples, [len(own) for own in nodes])
        D = xp.reshape(state.evaluator(rows, np.concatenate(nodes), owners), x.shape)
        if repeat:
            self._compare(state, D[-1, :])
            state.first_prediction = None
        elif state.stats.rounds == 0 and self.window > 1:
            state.first_prediction = xp.asarray(D[0, :], copy=True)
        ends = np.cumsum([len(own) for own in nodes]).tolist()
        outputs = [D[start:end, :] for start, end in pairwise([0, *ends])]
        return outputs[: len(running)], ends[-1]

    def _compare(self, state: ParallelState, again: Array) -> None:
        """Refuse a denoiser that answers the same row differently by more than rounding explains."""
        xp, first = state.xp, state.first_prediction
        difference = float(xp.max(xp.abs(again - first)))
        size = max(float(xp.max(xp.abs(part))) for part in (again, first))
        limit = float(np.sqrt(float(xp.finfo(state.x_T.dtype).eps)))
        if difference > limit * size:
            raise NondeterministicDenoiserError(
                f"denoiser: the same input (sample 0, timestep {state.recurrence.timesteps[0]}) gave predictions that "
                f"differ by {difference / size:.2g} of their size. Call .eval() on the network, remove "
                "dropout, random numbers and normalisation over the batch; check=False skips this test"
            )


def solve(
    denoiser: DenoiserFn,
    x_T: Array,
    timesteps: ArrayLike,
    step_rule: StepRule,
    window: int = 5,
    *,
    tolerance: float = 1e-2,
    method: str | Method = "secant",
    seed: Seed | None = None,
    noise: Array | NoiseFn | None = None,
    max_rounds: int | None = None,
    max_rows: int | None = None,
    warmup_steps: int = 0,
    check: bool = True,
    start: Array | None = None,
    save: Save = "sample",
    callback: Callback | None = None,
    progress: bool = False,
    throw: bool = True,
) -> Solution:
    """Sample in parallel: the sample that ``step_rule`` gives one step after another, in fewer rounds.

    Args:
        denoiser: ``denoiser(x, t) -> prediction``; x is ``(rows, *event)``, t is (rows,). See
            :class:`~parasolver_core.denoiser.DenoiserFn`.
        x_T: where to start, ``(batch, *event)``, a floating-point array of any array library: for most schedules
            standard normal noise. Never changed.
        timesteps: (N,), in the sampler's order (decreasing for diffusion), given to the network as they are.
        step_rule: the sampler, for example ``DDIM(schedule)``.
        window: nodes evaluated in one round, of each sample: the parallel degree. 1 is sequential sampling.

    Other arguments:
        tolerance: wanted distance to the sequential sample: RMS of the difference over RMS of the sample. An estimate,
            see the theory page. 0 evaluates every node at its final input.
        method: "secant", "identity" (Picard), "sequential", or a :class:`~parasolver_core.methods.Method`.
        seed: for the noise of stochastic step rules; an integer, or one for each sample. The noise depends on
            (seed, sample, step) alone; 0 if neither seed nor noise is given.
        noise: instead, an array ``(N, batch, *event)`` or a function ``noise(step, sample) -> (*event)``.
        max_rounds: the most rounds; by default unlimited, as N suffice (N / window + 16 more where nodes are spread).
        max_rows: the most rows in one network call; larger rounds are split, to bound memory.
        warmup_steps: further sequential network calls after the first, before the window opens.
        check: spend one evaluation on finding a denoiser that is not deterministic.
        start: warm start, the trajectory ``(N + 1, batch, *event)`` of a related run (``save="trajectory"``), such as
            one with the same noise and another condition. It changes the cost and not the result.
        save: "sample", or "trajectory" to keep all states.
        callback: ``callback(state)`` after each round; ``state.stats.history[-1]`` is the round's record and
            ``state.estimate()`` a preview. Raise ``StopIteration`` to end the run; the solution is then returned.
        progress: show a bar (needs tqdm).
        throw: raise if a sample does not converge; else return the solution with its status. Either way nothing is
            lost: every exception that leaves this function has the state reached as ``error.solution``.

    Returns:
        A :class:`~parasolver_core.solution.Solution`.

    Raises:
        ValueError, TypeError: an argument is not as described here; before the first network call where possible.
        ConvergenceError: not within ``max_rounds``.
        NonFiniteError: the network gave NaN or infinity.
        NondeterministicDenoiserError: the network does not repeat itself.

    Reference: Lu, Zhu, Hou, "ParaSolver: A Hierarchical Parallel Integral Solver for Diffusion Models", ICLR 2025.
    """
    sequential = isinstance(method, str) and method == "sequential"
    limits: dict[str, Any] = {"max_rounds": max_rounds, "max_rows": max_rows}
    solver: Solver = ParallelIntegralSolver(
        step_rule,
        window,
        tolerance=tolerance,
        method="secant" if sequential else method,
        warmup_steps=warmup_steps,
        check=check,
        **limits,
    )
    if sequential:
        solver = SequentialSolver(step_rule, **limits)
    return solver.solve(
        denoiser,
        x_T,
        timesteps,
        seed=seed,
        noise=noise,
        start=start,
        save=save,
        callback=callback,
        progress=progress,
        throw=throw,
    )


def solve_sequential(
    denoiser: DenoiserFn, x_T: Array, timesteps: ArrayLike, step_rule: StepRule, **options: Any
) -> Solution:
    """The same sample by the plain loop, one network call a step; arguments and result as in :func:`solve`."""
    return solve(denoiser, x_T, timesteps, step_rule, method="sequential", **options)


def _call_back(callback: Callback, state: SolverState) -> bool:
    try:
        callback(state)
    except StopIteration:
        return False
    return True


def _within_range(xp: Any, rows: Array) -> NDArray[np.bool_]:
    inside = xp.abs(rows) < float(xp.finfo(rows.dtype).max)
    return to_host(xp.all(xp.reshape(inside, (rows.shape[0], -1)), axis=1))


def _message(status: Status, state: SolverState) -> str:
    steps, rounds, total = min(state.steps), state.stats.rounds, len(state.recurrence)
    if status in _NONFINITE:
        if not state.failed_rounds:
            return f"The sample overflows in {state.x_T.dtype}. Start from an x_T of a wider dtype."
        sample, node = state.failure()
        rounds = state.failed_rounds[sample]
        where = f"sample {sample} at step {node} (timestep {state.recurrence.timesteps[node]}) in round {rounds}"
        if status is Status.NONFINITE_MODEL:
            return (
                f"The denoiser gave NaN or infinity for {where}; nothing of it was accepted and the other samples "
                "went on. Check the network there, for example in float32 instead of half precision."
            )
        return f"The solver's own arithmetic overflowed for {where}. Use a wider dtype or a smaller window."
    return {
        Status.CONVERGED: f"Converged in {rounds} rounds and {state.stats.evaluations} evaluations.",
        Status.MAX_ROUNDS: (
            f"Not converged within max_rounds={rounds}: {steps} of {total} steps are final. Raise max_rounds "
            f"({total} always suffice), the window or the tolerance."
        ),
        Status.STOPPED: f"Stopped by the callback after round {rounds}; {steps} of {total} steps are final.",
        Status.INTERRUPTED: f"Interrupted after round {rounds}; {steps} of {total} steps are final.",
        Status.FAILED: f"An error ended the run in round {rounds + 1}; {steps} of {total} steps are final.",
        Status.RUNNING: f"Still running: {steps} of {total} steps are final after round {rounds}.",
    }[status]


def _raise_for(solution: Solution) -> None:
    errors: dict[Status, type[SolverError]] = {
        Status.MAX_ROUNDS: ConvergenceError,
        Status.NONFINITE_MODEL: NonFiniteError,
        Status.NONFINITE_SOLVER: NonFiniteError,
    }
    if solution.status in errors:
        raise errors[solution.status](solution.message, solution)
