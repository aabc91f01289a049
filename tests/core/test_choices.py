"""Every choice is honoured, or refused by name: pairs of choices that once met in silence."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parasolver_core import (
    DDIM,
    Method,
    NoiseSchedule,
    ParallelIntegralSolver,
    SequentialSolver,
    solve,
    solve_sequential,
)
from parasolver_core.methods.presets import METHODS
from parasolver_core.planning.costs import CostTable
from parasolver_core.planning.prediction import Costs, choose
from parasolver_core.rounds.acceptance import RelativeMove, RoundView
from parasolver_core.rounds.linearization import Secant
from parasolver_core.rounds.margins import Margins
from tests.core.problems import normal, relative

SCHEDULE = NoiseSchedule.linear()


def network(x: Any, t: Any) -> Any:
    return np.tanh(x)


RULE = DDIM(SCHEDULE)
LONG = SCHEDULE.timesteps(200)  # nodes are spread over so many, with a window of 16
X = normal((1, 8))
SPREAD: dict[str, Any] = {"window": 16, "tolerance": 0.05}


class Counted(RelativeMove):
    """An acceptance of one's own: the default, counted."""

    asked = 0

    def accept(self, view: RoundView, tolerance: float) -> tuple[int, float]:
        type(self).asked += 1
        return super().accept(view, tolerance)


def rows_of(solution: Any) -> list[int]:
    return [record.evaluations for record in solution.stats.history]


def test_nodes_are_spread_where_nothing_else_is_asked_for() -> None:
    got = solve(network, X, LONG, RULE, **SPREAD)
    assert got.stats.history[1].samples[0].nodes[-1] > 16 * 2  # no window of 16 has come so far


def test_an_acceptance_of_ones_own_is_asked_in_every_round() -> None:
    Counted.asked = 0
    got = solve(network, X, LONG, RULE, method=Method(acceptance=Counted()), **SPREAD)
    assert Counted.asked == got.stats.rounds
    assert rows_of(got) == rows_of(solve(network, X, LONG, RULE, method=Method(spread=False), **SPREAD))


def test_a_margin_of_ones_own_asks_for_more_nodes_than_can_be_spread() -> None:
    recurrence = RULE.recurrence(LONG)
    assert Method(acceptance=RelativeMove(Margins())).spreads(recurrence, 16, 0.05)
    assert not Method(acceptance=RelativeMove(Margins(spread=1e-3))).spreads(recurrence, 16, 0.05)


def test_a_smaller_factor_is_closer() -> None:
    truth = solve_sequential(network, X, LONG, RULE).sample
    loose, strict = (
        solve(network, X, LONG, RULE, method=Method(acceptance=RelativeMove(Margins().times(gain))), **SPREAD)
        for gain in (1.0, 1e-5)
    )
    assert relative(strict.sample, truth) < 1e-2 * relative(loose.sample, truth)


@pytest.mark.parametrize("fill", ["copy", "evaluated"])
def test_a_fill_of_ones_own_is_a_windows(fill: Any) -> None:
    got = solve(network, X, LONG, RULE, method=Method(fill=fill), **SPREAD)
    assert rows_of(got) == rows_of(solve(network, X, LONG, RULE, method=Method(fill=fill, spread=False), **SPREAD))


class Asked(Secant):
    asked = 0

    def update(self, slope: Any, moved: Any, cross: Any) -> Any:
        type(self).asked += 1
        return super().update(slope, moved, cross)


@pytest.mark.parametrize("steps", [200, 20])
def test_a_linearization_of_ones_own_is_asked_in_every_round(steps: int) -> None:
    Asked.asked = 0
    got = solve(network, X, SCHEDULE.timesteps(steps), RULE, method=Method(linearization=Asked()), **SPREAD)
    assert Asked.asked == got.stats.rounds


@pytest.mark.parametrize("method", ["secant", "identity", "paradigms", "parasolver"])
@pytest.mark.parametrize("warmup_steps", [1, 5])
def test_steps_to_warm_up_with_are_made_one_at_a_time(method: str, warmup_steps: int) -> None:
    got = solve(network, X, LONG, RULE, method=method, warmup_steps=warmup_steps, **SPREAD)
    assert rows_of(got)[: warmup_steps + 1] == [1] * (warmup_steps + 1)
    assert rows_of(got)[warmup_steps + 1] > 1


@pytest.mark.parametrize("method", ["secant", "identity", "paradigms", "parasolver"])
def test_a_warm_start_is_used_by_every_method_that_takes_one(method: str) -> None:
    way = solve_sequential(network, X, LONG, RULE, save="trajectory").trajectory
    cold = solve(network, X, LONG, RULE, 16, tolerance=1e-6, method=method)
    warm = solve(network, X, LONG, RULE, 16, tolerance=1e-6, method=method, start=way)
    assert warm.stats.rounds == -(-len(LONG) // 16) < cold.stats.rounds


@pytest.mark.parametrize(("name", "value"), [("start", np.zeros((21, 1, 8))), ("warmup_steps", 2)])
@pytest.mark.parametrize("window", [5, "auto"])
def test_the_plain_loop_refuses_what_it_has_no_use_for(name: str, value: Any, window: Any) -> None:
    arguments = (network, X, SCHEDULE.timesteps(20), RULE)
    with pytest.raises(ValueError, match=rf"^{name}: the plain loop"):
        solve(*arguments, window, method="sequential", **{name: value})
    with pytest.raises(ValueError, match=rf"^{name}: the plain loop"):
        solve_sequential(*arguments, **{name: value})


def test_a_sequential_solver_refuses_a_warm_start() -> None:
    with pytest.raises(ValueError, match=r"^start: the plain loop"):
        SequentialSolver(RULE).solve(network, X, SCHEDULE.timesteps(20), start=np.zeros((21, 1, 8)))


@pytest.mark.parametrize("options", [{"window": 5}, {"method": "secant"}, {"costs": {1: 1.0}}], ids=str)
def test_solve_sequential_has_no_window(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"^{next(iter(options))}: solve_sequential"):
        solve_sequential(network, X, SCHEDULE.timesteps(20), RULE, **options)


def test_costs_are_looked_at_also_where_no_window_is_chosen() -> None:
    for options in ({"window": 5, "costs": {1: 1.0}}, {"window": "auto", "method": "sequential", "costs": {1: -1.0}}):
        with pytest.raises(ValueError, match=r"^costs: expected"):
            solve(network, X, SCHEDULE.timesteps(20), RULE, **options)


def test_sequential_is_no_method_of_a_parallel_solver() -> None:
    with pytest.raises(ValueError, match=r"^method: 'sequential' is no parallel method; use SequentialSolver"):
        ParallelIntegralSolver(RULE, method="sequential")


FLAT = {1: 1.0, 1000: 1.001}  # a call costs the same whatever its rows
STEEP = {1: 1.0, 2: 2.0, 1000: 1000.0}


def test_a_chosen_window_keeps_to_max_rounds() -> None:
    """Where rows cost what they are, sampling one after another is the fastest; it takes all the rounds."""
    grid = SCHEDULE.timesteps(50)
    free = solve(network, X, grid, RULE, "auto", costs=STEEP)
    assert free.stats.rounds == 50
    bound = solve(network, X, grid, RULE, "auto", costs=STEEP, max_rounds=25)
    assert bound.success
    assert bound.stats.rounds <= 25
    assert 'window="auto" chose within max_rounds=25' in bound.message


def test_where_none_keeps_to_max_rounds_the_one_of_fewest_rounds_is_chosen() -> None:
    recurrence, method = RULE.recurrence(SCHEDULE.timesteps(50)), METHODS["secant"]
    costs = Costs(CostTable.of(STEEP))
    best, _ = choose(recurrence, method, 1e-2, costs, max_rounds=2)
    every = [choose(recurrence, method, 1e-2, costs, max_rounds=limit)[0].rounds for limit in (3, 5, 8)]
    assert best.window > 1
    assert best.rounds <= min(every)


def test_a_chosen_window_counts_the_steps_to_warm_up_with() -> None:
    recurrence, method = RULE.recurrence(SCHEDULE.timesteps(50)), METHODS["secant"]
    costs = Costs(CostTable.of(FLAT))
    none, some = (choose(recurrence, method, 1e-2, costs, warmup_steps=n)[0] for n in (0, 10))
    assert some.rounds == none.rounds + 10
    assert choose(recurrence, method, 1e-2, costs, warmup_steps=49)[0].window == 1


def test_a_chosen_window_with_a_warm_start_slides() -> None:
    way = solve_sequential(network, X, LONG, RULE, save="trajectory").trajectory
    got = solve(network, X, LONG, RULE, "auto", costs=FLAT, tolerance=0.05, start=way)
    assert got.stats.evaluations >= len(LONG)  # a window visits every node


def test_the_same_method_without_spread_nodes() -> None:
    assert METHODS["secant"].sliding() == replace(METHODS["secant"], spread=False)
    assert METHODS["parataa"].sliding() is METHODS["parataa"]


@pytest.mark.parametrize("yes", [1, "yes", np.True_, object()])
def test_only_true_takes_rows(yes: Any) -> None:
    class Denoiser:
        takes_rows = yes

        def __call__(self, x: Any, t: Any) -> Any:
            return network(x, t)

    grid = SCHEDULE.timesteps(20)
    got, expected = (solve(one, X, grid, RULE) for one in (Denoiser(), network))
    np.testing.assert_array_equal(got.sample, expected.sample)
