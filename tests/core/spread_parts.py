"""Parts of a run whose nodes are spread, made by hand, so that a test can give them what it likes."""

from typing import Any

import numpy as np

from parasolver_core import NoiseSchedule, ParallelIntegralSolver, Recurrence, StepRule
from parasolver_core.methods.level_states import LevelStates
from parasolver_core.methods.levels import Level, Levels, interpolation
from parasolver_core.methods.refinement import Aims, Refinement
from parasolver_core.methods.sliding import Sliding
from parasolver_core.methods.spread import SpreadNodes
from parasolver_core.rounds.shared import Shared
from tests.core.problems import TanhNetwork, normal

SCHEDULE = NoiseSchedule.linear()
STEPS, BATCH, SIZE = 12, 3, 4
SAMPLES = np.array([2, 0])  # of the batch


class NoiseToTheEnd(StepRule):
    """Each step but the first adds noise, the last one the most."""

    def recurrence(self, timesteps: Any) -> Recurrence:
        n = len(timesteps)
        c = np.linspace(0, 1, n)
        return Recurrence(np.asarray(timesteps), np.full((n, 1), 0.9), np.full((n, 1), 0.2), c)


def shared_of(rule: StepRule, steps: int = STEPS, **options: Any) -> Shared:
    chosen = {name: options.pop(name) for name in ("tolerance", "method") if name in options}
    solver = ParallelIntegralSolver(rule, 8, check=False, **{"tolerance": 0.05} | chosen)
    start = normal((BATCH, SIZE))
    return solver.init(TanhNetwork(SIZE), start, SCHEDULE.timesteps(steps), seed=1, **options)._shared  # type: ignore[union-attr]


def states_of(shared: Shared, nodes: list[int], held: Any = None, since: Any = None) -> LevelStates:
    start = normal((BATCH, SIZE))[SAMPLES]
    return LevelStates(shared, Level.of(shared.recurrence, np.array(nodes)), SAMPLES, start, held, since)


def noise_of(shared: Shared, sample: int, i: int) -> np.ndarray:
    c = shared.recurrence.c[i]
    return np.asarray(shared.noise(i, sample)).reshape(-1) if c else np.zeros(SIZE)


def by_the_plain_loop(shared: Shared, sample: int, nodes: list[int], held: np.ndarray) -> tuple[Any, Any]:
    """All states, and the outputs at them, where predictions between the nodes are interpolated."""
    recurrence = shared.recurrence
    between = interpolation(np.arange(len(recurrence)), np.array(nodes), recurrence.stages) @ held
    x, m = [normal((BATCH, SIZE))[sample]], []
    for i, (p, q) in enumerate(recurrence.held):
        m.insert(0, (between[i] - p * x[0]) / q)
        x.insert(0, recurrence.advance(i, x, m, noise_of(shared, sample, i)))
    return np.array(x[::-1]), np.array(m[::-1])


def run_of(shared: Shared, nodes: list[int], held: Any = None, since: Any = None, slope: Any = None) -> SpreadNodes:
    """Of two samples, all of whose nodes are due; what follows from a round is noted in ``told`` and not done."""
    recurrence, states = shared.recurrence, states_of(shared, nodes, held, since)
    aims = Aims(recurrence, shared.width, shared.tolerance, shared.tolerance, 1e-16)
    refinements = [Refinement(aims, states.level) for _ in SAMPLES]
    run = SpreadNodes(shared, Levels(recurrence), states, Sliding(shared, None), refinements, slope)
    run.told = []  # type: ignore[attr-defined]
    run._go_on = run.told.extend  # type: ignore[attr-defined, method-assign]
    return run


def round_of(run: SpreadNodes, D: np.ndarray) -> Any:
    """The records of a round with these outputs."""
    with np.errstate(over="ignore", invalid="ignore"):
        return run.correct(D, np.asarray(run.compare(D), dtype=np.float64))
