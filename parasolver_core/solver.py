"""The solver: rounds of one batched network call and one correction each, until every sample is final."""

from __future__ import annotations

import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Literal

import array_api_compat
import numpy as np
from numpy.typing import ArrayLike, NDArray

from parasolver_core.arrays import Array, copied, detach, finite_rows, is_array, no_grad, outside_graphs, to_host
from parasolver_core.correction import fetch
from parasolver_core.costs import CostTable, describe
from parasolver_core.deadline import Deadline, check_seconds
from parasolver_core.denoiser import DenoiserFn, SharedDenoiser, Telling
from parasolver_core.errors import (
    ConvergenceError,
    NonFiniteError,
    SolverError,
    attach,
    has_solution,
)
from parasolver_core.methods import Method, get_method, sliding
from parasolver_core.noise import NoiseFn, Seed
from parasolver_core.planning import Choice, Costs, Prediction, choose, explain, measured_costs, remembered
from parasolver_core.progress import Meter
from parasolver_core.run import Run
from parasolver_core.solution import RoundRecord, SampleRecord, Solution, Stats, Status
from parasolver_core.state import ParallelState, Save, SequentialState, SolverState
from parasolver_core.step_rules import StepRule
from parasolver_core.validation import check_count, check_counts, check_start, check_timesteps, check_tolerance

_OWN_ROUNDS, _OWN_RUNS, _OWN_BUDGET, _LEAST_OWN = 8, 4, 0.1, 1e-9  # to time the solver's own part; the last two in s
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
    buckets: Sequence[int] = field(default=(), kw_only=True)
    state_device: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_count("max_rounds", self.max_rounds, optional=True)
        check_count("max_rows", self.max_rows, optional=True)
        check_counts("buckets", self.buckets)

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
            state.evaluator.begin(lambda: self._choices() | state.plan())
        with no_grad(state.xp):
            evaluations, records = self._round(state)
        state.commit(
            RoundRecord(
                round=state.stats.rounds + 1,
                evaluations=evaluations,
                samples=tuple(records),
                seconds_denoiser=state.evaluator.seconds - before,
                seconds=time.perf_counter() - started,
            )
        )

    def _choices(self) -> dict[str, str]:
        """The solver's choices by name; the step rule's are in its table."""
        chosen = {one.name: repr(getattr(self, one.name)) for one in fields(self) if one.name != "step_rule"}
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
    def _evaluation(self) -> dict[str, Any]:
        """How the network is called."""
        return {"max_rows": self.max_rows, "buckets": self.buckets, "state_device": self.state_device}

    def own_seconds(self, x_T: Array, timesteps: ArrayLike) -> float:
        """The solver's own time of a round, as measured in a few rounds with a function in the place of a network.

        Without drawing noise: each step's is drawn once, whatever the window.
        """
        least, started = math.inf, time.perf_counter()
        for _ in range(_OWN_RUNS):  # the first finds caches cold
            state = self.init(lambda x, t: x / (1 + x * x), x_T, timesteps)
            noise = _seconds_of_noise(state) if state.recurrence.stochastic else 0.0
            while not self.done(state):
                self.step(state)
            rounds = state.stats.history[1:] or state.stats.history  # the window opens in the first
            drawn = [noise * sum(sample.accepted for sample in record.samples) for record in rounds]
            own = [one.seconds - one.seconds_denoiser - z for one, z in zip(rounds, drawn, strict=True)]
            least = min(least, float(np.median(own)))
            if time.perf_counter() - started > _OWN_BUDGET:
                break
        return max(least, _LEAST_OWN)

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

    def _left(
        self, state: SolverState | None, error: BaseException, x_T: Array, timesteps: ArrayLike, save: Save
    ) -> Solution:
        """The solution of a run that an exception has ended, maybe before it had begun."""
        if state is None:
            return _untouched(x_T, timesteps, save, error)
        state.halt(_status_after(error))
        return self._partial(state)

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
                with Meter(progress, len(state.recurrence) * state.batch) as show:
                    while not self.done(state) and not deadline.halts(state):
                        self.step(state)
                        show(sum(state.steps), state.stats.rounds)
                        if callback is not None and not _call_back(callback, state):
                            state.halt(Status.STOPPED)
                state.evaluator.end()
            solution = deadline.told(self.result(state))
            if throw:
                _raise_for(solution)
            return solution
        except BaseException as error:
            if solution is None or not has_solution(error):
                ended, begun, reason = solution, state, error
                attach(error, lambda: ended or self._left(begun, reason, x_T, timesteps, save))
            raise


def sequential_round(state: SequentialState) -> tuple[int, list[SampleRecord]]:
    """One step of all samples that are well: the number of rows evaluated, and a record of each."""
    xp, i, recurrence, alive = state.xp, state.step, state.recurrence, state.alive
    m = state.evaluator(state.xs[0], np.full(len(alive), i), np.asarray(alive))
    state.torn = True
    memory = recurrence.memory
    state.ms = [xp.astype(m, state.dtype, copy=True), *state.ms[: memory - 1]]
    z = xp.stack([state.noise(i, sample) for sample in alive]) if recurrence.c[i] != 0 else None
    with np.errstate(over="ignore", invalid="ignore"):  # reported as a status
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
    return len(records), records


@dataclass(frozen=True)
class SequentialSolver(Solver):
    """The plain loop, one step after another: the truth that parallel sampling is measured against."""

    def init(self, denoiser: DenoiserFn, x_T: Array, timesteps: ArrayLike, **options: Any) -> SequentialState:
        options = {"seed": None, "noise": None, "save": "sample"} | options
        if options.pop("start", None) is not None:
            raise ValueError("start: the plain loop has no use for a warm start; leave it out")
        return SequentialState(denoiser, x_T, timesteps, self.step_rule, **self._evaluation, **options)

    def _round(self, state: SequentialState) -> tuple[int, list[SampleRecord]]:
        return sequential_round(state)


@dataclass(frozen=True)
class ParallelIntegralSolver(Solver):
    """Finds the sequential trajectory in parallel rounds.

    Args:
        step_rule: the sampler.
        window: nodes evaluated in one round, of each sample; 1 is the sequential sampler.
        tolerance: wanted relative RMS distance to the sequential sample; 0 means exact.
        method: a preset's name, a calibration's file or a :class:`~parasolver_core.methods.Method`.
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
        return sliding(method) if start is not None or self.warmup_steps else method

    def init(
        self, denoiser: DenoiserFn, x_T: Array, timesteps: ArrayLike, **options: Any
    ) -> ParallelState | SequentialState:
        options = {"seed": None, "noise": None, "save": "sample", "start": None} | options
        method = self.method_of(options["start"])
        if self.window == 1 or np.size(timesteps) == 1:  # the plain loop, to the last bit
            del options["start"]
            return SequentialState(denoiser, x_T, timesteps, self.step_rule, **self._evaluation, **options)
        state = ParallelState(
            denoiser,
            x_T,
            timesteps,
            self.step_rule,
            method=method,
            width=self.window,
            warmup_steps=self.warmup_steps,
            tolerance=self.tolerance,
            **self._evaluation,
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


@outside_graphs
def solve(
    denoiser: DenoiserFn,
    x_T: Array,
    timesteps: ArrayLike,
    step_rule: StepRule,
    window: int | Literal["auto"] = 5,
    *,
    tolerance: float = 1e-2,
    method: str | os.PathLike[str] | Method = "secant",
    costs: CostTable | Mapping[int, float] | None = None,
    seed: Seed | None = None,
    noise: Array | NoiseFn | None = None,
    max_rounds: int | None = None,
    max_seconds: float | None = None,
    max_rows: int | None = None,
    buckets: Sequence[int] = (),
    state_device: Any = None,
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
        window: nodes evaluated in one round, of each sample: the parallel degree. 1 is sequential sampling. "auto": the
            one with the least predicted time, from a few timed calls of the network, which are remembered for later
            runs of the same network, shape and device; predicted for the default method without a warm start, and
            within ``max_rounds``. Sequential where that is fastest; ``solution.message`` says so.

    Other arguments:
        tolerance: wanted distance to the sequential sample: RMS of the difference over RMS of the sample. An estimate,
            see the theory page. 0 evaluates every node at its final input.
        method: "secant"; "identity" (Picard); "paradigms", "parasolver" and "parataa", the published methods with their
            own stop rules; "sequential", whatever the window; a file that a
            :class:`~parasolver_core.calibration.Calibration` was saved to; or a
            :class:`~parasolver_core.methods.Method`.
        costs: with ``window="auto"``, seconds of one network call by its rows, such as ``{1: 0.05, 8: 0.06, 64: 0.3}``,
            instead of timing it.
        seed: for the noise of stochastic step rules; an integer, or one for each sample. The noise depends on
            (seed, sample, step) alone; 0 if neither seed nor noise is given.
        noise: instead, an array ``(N, batch, *event)`` or a function ``noise(step, sample) -> (*event)``, called in any
            order; it gives the same numbers each time.
        max_rounds: the most rounds; by default unlimited, as N suffice (with spread nodes, and a window after them).
        max_seconds: a deadline: no round is begun that would end later, if it took as long as the one before. The
            solution then has the best estimate, a guess of its error in ``error_estimate``, by what the last rounds
            have changed, and the status MAX_SECONDS; nothing is raised. One round is always made, and what
            ``window="auto"`` takes to time the network comes on top. The plain loop has no estimate: its error is then
            infinite.
        max_rows: the most rows in one network call; larger rounds are split, to bound memory. Where memory runs out all
            the same, the calls are halved and the run goes on; ``solution.stats.max_rows`` says so.
        buckets: the only row counts to call the network with, for example (1, 4, 16), so that compiled code is compiled
            no more often: smaller calls are filled up with copies of a row, whose predictions are dropped. Where all
            are above ``max_rows``, that is the only one.
        state_device: where the solver keeps its states, if not on the device of ``x_T``, for example "cpu": only the
            rows of a call are then on the network's device. For states so large that a window of them does not fit.
        warmup_steps: further sequential network calls after the first, before the window opens; no nodes are
            spread then.
        check: in a denoiser's first run, look at a few rows again, each alone in a call of one row: rows that depend on
            other rows, or do not repeat themselves, are an error. A denoiser that passed is remembered, weakly.
        start: warm start, the trajectory ``(N + 1, batch, *event)`` of a related run (``save="trajectory"``), such as
            one with the same noise and another condition. It changes the cost and not the result. Nodes begin there,
            and are not spread.
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
        CoupledRowsError: a row's prediction depends on other rows, its place or their number.

    Reference: Lu, Zhu, Hou, "ParaSolver: A Hierarchical Parallel Integral Solver for Diffusion Models", ICLR 2025.
    """
    solution: Solution | None = None
    try:
        limits = {"max_rounds": max_rounds, "max_rows": max_rows, "buckets": buckets, "state_device": state_device}
        choices = {"tolerance": tolerance, "method": method, "warmup_steps": warmup_steps, "check": check}
        run: dict[str, Any] = {"seed": seed, "noise": noise, "save": save, "start": start}
        problem = (denoiser, x_T, timesteps, step_rule)
        solver, run["start"], told = _solver(problem, window, costs, limits, choices, run)
        solution = solver.solve(
            *problem[:3], **run, callback=callback, progress=progress, throw=throw, max_seconds=max_seconds
        )
        return replace(solution, message=f"{solution.message} {told}") if told else solution
    except BaseException as error:
        if not has_solution(error):
            reached, reason = solution, error
            attach(error, lambda: reached or _untouched(x_T, timesteps, save, reason))
        raise


def solve_sequential(
    denoiser: DenoiserFn, x_T: Array, timesteps: ArrayLike, step_rule: StepRule, **options: Any
) -> Solution:
    """The same sample by the plain loop, one network call a step; arguments and result as in :func:`solve`.

    There is no window, and nothing to choose, begin or warm up: ``window``, ``costs``, ``start`` and ``warmup_steps``
    are refused. ``tolerance`` and ``check`` are kept by whatever a plain loop does.
    """
    for name in {"window", "costs", "method"} & options.keys():
        raise TypeError(f"{name}: solve_sequential takes one step after another and has no use for it; leave it out")
    return solve(denoiser, x_T, timesteps, step_rule, method="sequential", **options)


Problem = tuple[DenoiserFn, Array, ArrayLike, StepRule]


def _solver(
    problem: Problem,
    window: int | str,
    costs: CostTable | Mapping[int, float] | None,
    limits: dict[str, Any],
    choices: dict[str, Any],
    run: dict[str, Any],
) -> tuple[Solver, Array | None, str]:
    """The solver that :func:`solve` was asked for, the warm start if it has a use for it, and what to say of it."""
    told, step_rule, start, method = "", problem[3], run["start"], choices["method"]
    sequential = isinstance(method, str) and method == "sequential"
    if costs is not None and not isinstance(window, str):
        raise ValueError(f'costs: expected only with window="auto", got them with window={window!r}')
    given = None if costs is None else CostTable.of(costs)
    parallel = ParallelIntegralSolver(
        step_rule,
        2 if isinstance(window, str) else window,
        **choices | {"method": "secant" if sequential else method},
        **limits,
    )
    if isinstance(window, str) and window != "auto":
        raise ValueError(f'window: expected an integer of at least 1 or "auto", got {window!r}')
    if sequential and (start is not None or parallel.warmup_steps):
        name = "warmup_steps" if start is None else "start"
        raise ValueError(
            f'{name}: the plain loop of method="sequential" has no use for it; leave it out, or choose another method'
        )
    if isinstance(window, str) and not sequential:
        chosen, told = _chosen(problem, parallel, given, run)
        limits["max_rows"] = chosen.max_rows
        parallel = replace(parallel, window=chosen.window, max_rows=chosen.max_rows)
        sequential, start = chosen.window == 1, None if chosen.window == 1 else start
    return SequentialSolver(step_rule, **limits) if sequential else parallel, start, told


def _chosen(
    problem: Problem,
    parallel: ParallelIntegralSolver,
    given: CostTable | None,
    run: dict[str, Any],
) -> tuple[Prediction, str]:
    """The window with the least predicted time, and what to say of it."""
    denoiser, x_T, timesteps, step_rule = problem
    tolerance, method = parallel.tolerance, parallel.method_of(run["start"])
    steps = len(check_timesteps(timesteps))
    solver = SequentialSolver(step_rule, max_rounds=parallel.max_rounds, **parallel._evaluation)
    if not is_array(x_T):
        check_start(x_T)
    rounds = {"warmup_steps": parallel.warmup_steps, "max_rounds": parallel.max_rounds}

    def choose_now() -> Choice:
        with Telling(denoiser):
            return choose_timed()

    def choose_timed() -> Choice:
        probe = solver.init(denoiser, x_T, timesteps, seed=run["seed"], noise=run["noise"])
        chosen = {"window": "auto", "tolerance": repr(tolerance), "method": repr(method), "costs": repr(given)}
        try:
            probe.evaluator.begin(lambda: chosen | solver._choices() | probe.plan())
            with no_grad(probe.xp):
                costs = Costs(given) if given else _measured(solver, probe, key, method, tolerance)
        except BaseException as error:
            reason = error
            attach(error, lambda: solver._left(probe, reason, x_T, timesteps, "sample"))
            raise
        limit = solver.max_rows
        return choose(probe.recurrence, method, tolerance, costs, batch=probe.batch, max_rows=limit, **rounds)

    key = _cost_key(denoiser, x_T, solver, method)
    if isinstance(denoiser, SharedDenoiser):  # its processes need not remember the same
        best, other = choose_now()
    else:
        best, other = remembered((key, steps, step_rule, tolerance, method, given, *rounds.values()), choose_now)
    return best, explain(best, other, parallel.max_rounds)


def measure_run(denoiser: DenoiserFn, x_T: Array, timesteps: ArrayLike, step_rule: StepRule) -> Costs:
    """The costs by which ``window="auto"`` chooses, of the default method; arguments as in :func:`solve`."""
    solver, method = SequentialSolver(step_rule), get_method("secant")
    probe = solver.init(denoiser, x_T, timesteps)
    with no_grad(probe.xp):
        return _measured(solver, probe, _cost_key(denoiser, x_T, solver, method), method, 1e-2)


def _cost_key(denoiser: DenoiserFn, x_T: Array, solver: Solver, method: Method) -> str:
    """What the costs of a run depend on, but for the sampler and the devices."""
    return describe(denoiser, x_T, repr(method), solver._evaluation)


def _measured(solver: SequentialSolver, probe: SequentialState, key: str, method: Method, tolerance: float) -> Costs:
    """Costs of a network, and of the solver around it; kept for later runs."""

    def own(width: int) -> float:
        common = {"max_rows": solver.max_rows, "state_device": solver.state_device, "max_rounds": _OWN_ROUNDS}
        stub: Solver = SequentialSolver(solver.step_rule, **common)
        if width > 1:
            stub = ParallelIntegralSolver(
                solver.step_rule, width, method=method, tolerance=tolerance, check=False, **common
            )
        return stub.own_seconds(probe.x_T, probe.recurrence.timesteps)

    return measured_costs(probe, key, own)


def _seconds_of_noise(state: SolverState) -> float:
    """The median time of one draw."""
    times = []
    for step in range(min(_OWN_ROUNDS, len(state.recurrence))):
        started = time.perf_counter()
        state.noise(step, 0)
        times.append(time.perf_counter() - started)
        state.noise.forget(step, 0)
    return float(np.median(times))


def _call_back(callback: Callback, state: SolverState) -> bool:
    try:
        callback(state)
    except StopIteration:
        return False
    return True


def _status_after(error: BaseException) -> Status:
    return Status.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Status.FAILED


def _untouched(x_T: Array, timesteps: ArrayLike, save: Save, error: BaseException) -> Solution:
    """What an exception left that came before a run had begun: ``x_T``."""
    xp, status = array_api_compat.array_namespace(x_T), _status_after(error)
    x, batch, trajectory = copied(xp, detach(x_T)), int(x_T.shape[0]), None
    if save == "trajectory":
        trajectory = xp.stack([x, *[xp.full_like(x, float("nan"))] * len(check_timesteps(timesteps))])
    ended = "Interrupted" if status is Status.INTERRUPTED else "An error ended the run"
    return Solution(
        sample=x,
        status=status,
        message=f"{ended} before the first round; no step is final.",
        statuses=(status,) * batch,
        steps=(0,) * batch,
        error_estimate=np.zeros(batch),
        stats=Stats(),
        trajectory=trajectory,
        states=x,
    )


def _within_range(xp: Any, rows: Array) -> NDArray[np.bool_]:
    inside = xp.abs(rows) < float(xp.finfo(rows.dtype).max)
    return to_host(xp.all(xp.reshape(inside, (rows.shape[0], -1)), axis=1))


def _message(status: Status, state: SolverState) -> str:
    steps, rounds, total = min(state.steps), state.stats.rounds, len(state.recurrence)
    if status in _NONFINITE:
        if not state.failures:
            return f"The sample overflows in {state.x_T.dtype}. Start from an x_T of a wider dtype."
        sample = min(state.failures)
        node, rounds = state.failures[sample]
        where = f"sample {sample} at step {node} (timestep {state.recurrence.timesteps[node]}) in round {rounds}"
        if status is Status.NONFINITE_MODEL:
            return (
                f"The denoiser gave NaN or infinity for {where}; nothing of it was accepted and the other samples "
                "went on. Check the network there, for example in float32 instead of half precision."
            )
        return f"The solver's own arithmetic overflowed for {where}. Use a wider dtype or a smaller window."
    memory = state.evaluator.max_rows
    ran_out = (
        "" if memory is None else f" Memory ran out; the network was called with at most {memory} rows from then on."
    )
    fewer = f" instead of {total}" if rounds < total else ""
    each = " a sample" if state.batch > 1 else ""
    return {
        Status.CONVERGED: (
            f"Converged in {rounds} rounds{fewer}, with {state.stats.evaluations / state.batch:g} evaluations{each}."
            f"{ran_out}"
        ),
        Status.MAX_ROUNDS: (
            f"Not converged within max_rounds={rounds}: {steps} of {total} steps are final. Raise max_rounds "
            f"({total} always suffice), the window or the tolerance."
        ),
        Status.MAX_SECONDS: (
            f"Time was up (max_seconds) after round {rounds}: {steps} of {total} steps are final, and the sample is an "
            "estimate; error_estimate says how far it may be off."
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
