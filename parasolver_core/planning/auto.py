"""``window="auto"``: the window of the least predicted time, from measured costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

from numpy.typing import ArrayLike

from parasolver_core.arrays import Array, is_array, no_grad
from parasolver_core.denoiser.contract import DenoiserFn, SharedDenoiser, Telling
from parasolver_core.errors import attach
from parasolver_core.planning.costs import CostTable
from parasolver_core.planning.measurement import cost_key, run_costs
from parasolver_core.planning.prediction import Choice, Costs, Prediction, choose, explain, seconds
from parasolver_core.samplers.step_rules import StepRule
from parasolver_core.solver.parallel import ParallelIntegralSolver
from parasolver_core.solver.report import left_by
from parasolver_core.solver.sequential import SequentialSolver
from parasolver_core.validation import check_start, check_timesteps

_MOST_MADE = 256  # choices that a process remembers
_NOTICED = 0.1  # of the predicted time: choosing that takes longer is told
_MADE: dict[Hashable, Choice] = {}
Problem = tuple[DenoiserFn, Array, ArrayLike, StepRule]


def choose_window(
    problem: Problem, parallel: ParallelIntegralSolver, given: CostTable | None, run: dict[str, Any]
) -> tuple[Prediction, str]:
    """The window with the least predicted time, and what to say of it.

    Args:
        problem: what is to be solved.
        parallel: the solver, but for its window.
        given: seconds of the network by its rows; None: they are measured.
        run: the options of the run.
    """
    denoiser, x_T, timesteps, step_rule = problem
    tolerance, method = parallel.tolerance, parallel.method_of(run["start"])
    steps = len(check_timesteps(timesteps))
    solver = SequentialSolver(step_rule, max_rounds=parallel.max_rounds, **parallel.evaluation)
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
            probe.evaluator.begin(lambda: chosen | solver.choices() | probe.fingerprint())
            with no_grad(probe.xp):
                costs = Costs(given) if given else run_costs(solver, probe, key, method, tolerance)
        except BaseException as error:
            reason = error
            attach(error, lambda: left_by(reason, probe, x_T, timesteps, "sample"))
            raise
        limit = solver.max_rows
        return choose(probe.recurrence, method, tolerance, costs, batch=probe.batch, max_rows=limit, **rounds)

    started = time.perf_counter()
    key = cost_key(denoiser, x_T, solver, method)
    if isinstance(denoiser, SharedDenoiser):  # its processes need not remember the same
        best, other = choose_now()
    else:
        best, other = remembered((key, steps, step_rule, tolerance, method, given, *rounds.values()), choose_now)
    took, told = time.perf_counter() - started, explain(best, other, parallel.max_rounds)
    alike = not isinstance(denoiser, SharedDenoiser)  # processes would tell different seconds
    if given is None and alike and took > _NOTICED * best.seconds:
        told += f" Timing the network took {seconds(took)}; later runs remember it."
    return best, told


def remembered(key: Hashable, choose_now: Callable[[], Choice]) -> Choice:
    """A choice as this process made it before, or made now; a small network's run takes as long as a few choices."""
    try:
        made = _MADE.get(key)
    except TypeError:  # a step rule or method that cannot be hashed
        return choose_now()
    if made is None:
        made = choose_now()
        if len(_MADE) >= _MOST_MADE:
            _MADE.clear()
        _MADE[key] = made
    return made
