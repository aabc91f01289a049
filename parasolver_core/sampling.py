"""The front door: ``solve``, and the plain loop ``solve_sequential``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from numpy.typing import ArrayLike

from parasolver_core.arrays import Array, outside_graphs
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.errors import attach, has_solution
from parasolver_core.guesses.memory import Memory
from parasolver_core.methods.method import Method
from parasolver_core.planning.auto import Problem, choose_window
from parasolver_core.planning.costs import CostTable
from parasolver_core.samplers.noise import NoiseFn, Seed
from parasolver_core.samplers.step_rules import StepRule
from parasolver_core.solution import Solution
from parasolver_core.solver.loop import Callback, Solver
from parasolver_core.solver.parallel import ParallelIntegralSolver
from parasolver_core.solver.report import left_by
from parasolver_core.solver.sequential import SequentialSolver
from parasolver_core.solver.state import Save


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
    subintervals: int | None = None,
    check: bool = True,
    start: Array | None = None,
    memory: Memory | None = None,
    save: Save = "sample",
    callback: Callback | None = None,
    progress: bool = False,
    throw: bool = True,
) -> Solution:
    """Sample in parallel: the sample that ``step_rule`` gives one step after another, in fewer rounds.

    Args:
        denoiser: ``denoiser(x, t) -> prediction``; x is ``(rows, *event)``, t is (rows,). See
            :class:`~parasolver_core.denoiser.contract.DenoiserFn`.
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
            :class:`~parasolver_core.methods.method.Method`.
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
        subintervals: M, how many groups of steps the trajectory is divided into, from 1 to N; None: every step is by
            itself. A node is then a subinterval, whose steps follow one another, so that a round takes as many network
            calls as the longest has steps; ``stats.rounds`` counts them all. The states that travel are fewer, and no
            nodes are spread. Published, for comparison (``num_time_subintervals``): mostly slower, see the theory page.
        check: in a denoiser's first run, look at a few rows again, each alone in a call of one row: rows that depend on
            other rows, or do not repeat themselves, are an error. A denoiser that passed is remembered, weakly.
        start: warm start, the trajectory ``(N + 1, batch, *event)`` of a related run (``save="trajectory"``), such as
            one with the same noise and another condition. It changes the cost and not the result. Nodes begin there,
            and are not spread.
        memory: a :class:`~parasolver_core.Memory` of finished samples of the same network, sampler and steps. It says
            where nodes of a sliding window begin; it changes the cost and not the result. Spread nodes do not ask it.
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
        choices |= {"subintervals": subintervals, "memory": memory}
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
            attach(error, lambda: reached or left_by(reason, None, x_T, timesteps, save))
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
    subintervals = choices["subintervals"]
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
    unused = {"start": start is not None, "warmup_steps": parallel.warmup_steps, "memory": parallel.memory is not None}
    if sequential and any(unused.values()):
        name = next(name for name, value in unused.items() if value)
        raise ValueError(
            f'{name}: the plain loop of method="sequential" has no use for it; leave it out, or choose another method'
        )
    if subintervals is not None and (sequential or isinstance(window, str)):
        told = 'window="auto" does not know of them' if not sequential else "the plain loop has no use for them"
        raise ValueError(f"subintervals: {told}; leave them out, or choose a window")
    if isinstance(window, str) and not sequential:
        chosen, told = choose_window(problem, parallel, given, run)
        limits["max_rows"] = chosen.max_rows
        parallel = replace(parallel, window=chosen.window, max_rows=chosen.max_rows)
        sequential, start = chosen.window == 1, None if chosen.window == 1 else start
    return SequentialSolver(step_rule, **limits) if sequential else parallel, start, told
