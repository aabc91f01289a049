"""The costs of a run: as kept from an earlier one, or measured now and kept."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from parasolver_core.arrays import Array, no_grad, to_host
from parasolver_core.denoiser.contract import DenoiserFn
from parasolver_core.methods.method import Method
from parasolver_core.methods.presets import get_method
from parasolver_core.planning.costs import CostTable, describe, keep, measure, recall
from parasolver_core.planning.prediction import Costs
from parasolver_core.samplers.step_rules import StepRule
from parasolver_core.solver.loop import Solver
from parasolver_core.solver.parallel import ParallelIntegralSolver
from parasolver_core.solver.sequential import SequentialSolver, SequentialState
from parasolver_core.solver.state import SolverState

_WIDEST = 64  # rows of each sample that are measured at most; larger rounds are split
_BUDGET, _LEAST_SECONDS = 0.5, 0.2  # for measuring: a share of a sequential run, and seconds
_TABLES = ("network", "own")
_FITTED = 16  # the largest window whose own time is measured
_OWN_ROUNDS, _OWN_RUNS, _OWN_BUDGET, _LEAST_OWN = 8, 4, 0.1, 1e-9  # to time the solver's own part; the last two in s


def measure_run(denoiser: DenoiserFn, x_T: Array, timesteps: ArrayLike, step_rule: StepRule) -> Costs:
    """The costs by which ``window="auto"`` chooses, of the default method; arguments as in :func:`solve`."""
    solver, method = SequentialSolver(step_rule), get_method("secant")
    probe = solver.init(denoiser, x_T, timesteps)
    with no_grad(probe.xp):
        return run_costs(solver, probe, cost_key(denoiser, x_T, solver, method), method, 1e-2)


def cost_key(denoiser: DenoiserFn, x_T: Array, solver: Solver, method: Method) -> str:
    """What the costs of a run depend on, but for the sampler and the devices."""
    return describe(denoiser, x_T, repr(method), solver.evaluation)


def run_costs(solver: SequentialSolver, probe: SequentialState, key: str, method: Method, tolerance: float) -> Costs:
    """The costs of a network, and of the parallel solver around it with this method and tolerance; see below."""
    return measured_costs(probe, key, lambda width: _own_seconds(solver, probe, width, method, tolerance))


def measured_costs(probe: SequentialState, key: str, solver_seconds: Callable[[int], float]) -> Costs:
    """The costs of a run: as kept from an earlier one, or measured now and kept.

    Args:
        probe: of a run that has not begun.
        key: all that the costs depend on, but for the sampler and the devices.
        own: the solver's own seconds of a round, by window; 1 is the sequential loop.
    """
    steps, agree = len(probe.recurrence), probe.evaluator.agree
    most, devices = min(steps, _WIDEST), probe.evaluator.devices
    key = f"{key}-{most}-{probe.recurrence.memory}-{probe.recurrence.stochastic}-{devices}"
    kept = recall(key, _TABLES)
    number = -1.0 if kept is None else float(int(hashlib.sha256(repr(kept).encode()).hexdigest()[:12], 16))
    same = agree([number, -number]) == [number, -number]  # in all processes that share the rows
    if kept is None or not same:
        kept = {"network": _network_costs(probe, most), "own": _own_costs(probe, most, solver_seconds)}
        keep(key, kept)
    return Costs(kept["network"], kept["own"])


def _network_costs(probe: SequentialState, most: int) -> CostTable:
    """Seconds of one call of the network, for up to ``most`` rows of each sample."""
    xp, batch, steps, agree = probe.xp, probe.batch, len(probe.recurrence), probe.evaluator.agree
    x = probe.xs[0]

    def call(rows: int) -> None:
        copies = xp.concat([x] * -(-rows // batch))[:rows, ...]
        out = probe.evaluator(copies, np.linspace(0, steps - 1, rows).astype(np.int64), np.arange(rows) % batch)
        to_host(xp.isfinite(out[-1:, ...]))  # waits for the device

    network = measure(call, batch, batch * most, _BUDGET * steps, _LEAST_SECONDS, agree)
    room = probe.evaluator.max_rows
    (smallest_room,) = agree([-math.inf if room is None else -float(room * probe.evaluator.devices)])
    if math.isfinite(smallest_room):  # memory ran out in larger calls
        network = network.up_to(-int(smallest_room))
    return network


def _own_costs(probe: SequentialState, most: int, solver_seconds: Callable[[int], float]) -> CostTable:
    """Seconds of the solver's own part of a round, by its nodes, from those of a few windows."""
    steps = len(probe.recurrence)
    windows = sorted({1, min(2, steps), min(_FITTED, steps)})
    seconds = probe.evaluator.agree([solver_seconds(window) for window in windows])
    if most > _FITTED:  # as many calls of the array library for each further node
        slope = max(seconds[-1] - seconds[-2], 0.0) / (windows[-1] - windows[-2])
        windows, seconds = [*windows, most], [*seconds, seconds[-1] + slope * (most - windows[-1])]
    return CostTable(tuple(windows), tuple(seconds))


def _own_seconds(
    solver: SequentialSolver, probe: SequentialState, width: int, method: Method, tolerance: float
) -> float:
    """The own time of a round of a solver with that window, around a function in the place of the network.

    Without drawing noise: each step's is drawn once, whatever the window.
    """
    common = {"max_rows": solver.max_rows, "state_device": solver.state_device, "max_rounds": _OWN_ROUNDS}
    stub: Solver = SequentialSolver(solver.step_rule, **common)
    if width > 1:
        choices = {"method": method, "tolerance": tolerance, "check": False}
        stub = ParallelIntegralSolver(solver.step_rule, width, **choices, **common)
    least, started = math.inf, time.perf_counter()
    for _ in range(_OWN_RUNS):  # the first finds caches cold
        least = min(least, _own_seconds_once(stub, probe.x_T, probe.recurrence.timesteps))
        if time.perf_counter() - started > _OWN_BUDGET:
            break
    return max(least, _LEAST_OWN)


def _own_seconds_once(stub: Solver, x_T: Array, timesteps: ArrayLike) -> float:
    """The median over the rounds of one run."""
    state = stub.init(lambda x, t: x / (1 + x * x), x_T, timesteps)
    noise = _seconds_of_noise(state) if state.recurrence.stochastic else 0.0
    while not stub.done(state):
        stub.step(state)
    rounds = state.stats.history[1:] or state.stats.history  # the window opens in the first
    drawn = [noise * sum(sample.accepted for sample in record.samples) for record in rounds]
    times = [record.seconds - record.seconds_denoiser for record in rounds]
    return float(np.median(np.subtract(times, drawn)))


def _seconds_of_noise(state: SolverState) -> float:
    """The median time of one draw."""
    times = []
    for step in range(min(_OWN_ROUNDS, len(state.recurrence))):
        started = time.perf_counter()
        state.noise(step, 0)
        times.append(time.perf_counter() - started)
        state.noise.forget(step, 0)
    return float(np.median(times))
