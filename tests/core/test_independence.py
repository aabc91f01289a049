"""Samples and runs do not disturb one another."""

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parasolver_core import (
    DDIM,
    DDPM,
    DPMSolver,
    ParallelIntegralSolver,
    SequentialSolver,
    Status,
    solve,
    solve_sequential,
)
from tests.core.any_runs import MAX_STEPS, SAMPLERS, TABLE, Run, exactness, runs, same_bits, tolerances
from tests.core.problems import Mixture, Rational, TanhNetwork, normal, relative


@pytest.mark.filterwarnings("ignore:x_T. has an RMS")  # the samples are of all sizes
@given(run=runs(dtypes=("float64",)), tolerance=tolerances)
def test_a_sample_does_not_depend_on_its_neighbours(run: Run, tolerance: float) -> None:
    """Bit for bit at tolerance 0, and in what it costs: an easy sample is not evaluated longer next to a hard one."""
    x_T = normal((3, 6), seed=run.seed) * np.array([[0.01], [1.0], [3.0]])
    seeds = [run.seed, run.seed + 1, run.seed + 2]
    network = Rational(gain=2.0)
    options = {"window": run.window, "tolerance": tolerance}
    together = solve(network, x_T, run.grid, run.rule, seed=seeds, **options)
    for sample in range(3):
        alone = solve(network, x_T[sample : sample + 1], run.grid, run.rule, seed=seeds[sample : sample + 1], **options)
        mine = together.sample[sample : sample + 1]
        assert same_bits(mine, alone.sample) if tolerance == 0 else relative(mine, alone.sample) < 1e-13
        own = [one for record in together.stats.history for one in record.samples if one.sample == sample]
        by_itself = [one for record in alone.stats.history for one in record.samples]
        assert [(one.first, one.window, one.accepted) for one in own] == [
            (one.first, one.window, one.accepted) for one in by_itself
        ]


def test_an_easy_sample_ends_before_a_hard_one() -> None:
    x_T = np.concatenate([np.full((1, 6), 1e-3), normal((1, 6))])
    network = lambda x, t: np.sin(3 * x)  # noqa: E731  # linear for the first
    got = solve(network, x_T, TABLE.timesteps(40), DDIM(TABLE, prediction_type="sample"), 20, tolerance=1e-6)
    taking_part = [{one.sample for one in record.samples} for record in got.stats.history]
    assert {0} not in taking_part
    assert {1} in taking_part


def test_a_solver_serves_many_runs() -> None:
    solver = ParallelIntegralSolver(DPMSolver(TABLE), 6, tolerance=1e-4)
    grids = [TABLE.timesteps(n) for n in (5, 12, 30)]
    first = [solver.solve(TanhNetwork(), normal((2, 6), seed=k), grid).sample for k, grid in enumerate(grids)]
    again = [solver.solve(TanhNetwork(), normal((2, 6), seed=k), grid).sample for k, grid in enumerate(grids)]
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


def test_runs_stepped_in_turns_do_not_disturb_one_another() -> None:
    solver = ParallelIntegralSolver(DDPM(TABLE), 6, tolerance=1e-4)
    grid = TABLE.timesteps(15)
    expected = [solver.solve(Rational(), normal((2, 6), seed=k), grid, seed=k).sample for k in range(3)]
    states = [solver.init(Rational(), normal((2, 6), seed=k), grid, seed=k) for k in range(3)]
    while not all(solver.done(state) for state in states):
        for state in states:
            if not solver.done(state):
                solver.step(state)
    got = [solver.result(state).sample for state in states]
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "solver", [ParallelIntegralSolver(DDPM(TABLE), 6, tolerance=1e-4), SequentialSolver(DDPM(TABLE))]
)
def test_threads_share_a_solver(solver: Any) -> None:
    grid = TABLE.timesteps(20)
    expected = [solver.solve(Rational(), normal((2, 6), seed=k), grid, seed=k).sample for k in range(2)]
    got: list[list[Any]] = [[], []]
    both = threading.Barrier(2, timeout=30)

    def work(k: int) -> None:
        both.wait()
        for _ in range(10):
            got[k].append(solver.solve(Rational(), normal((2, 6), seed=k), grid, seed=k).sample)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for k in range(2):
        assert len(got[k]) == 10
        assert all(same_bits(sample, expected[k]) for sample in got[k])


@given(run=runs(dtypes=("float64",)), warmup=st.integers(0, MAX_STEPS + 2))
def test_warmup_steps_are_sequential_calls_after_the_first(run: Run, warmup: int) -> None:
    x_T = normal((1, 2, 3), seed=run.seed)
    got = solve(run.network, x_T, run.grid, run.rule, run.window, tolerance=0, seed=run.seed, warmup_steps=warmup)
    widths = [record.window for record in got.stats.history]
    # without warm-up, nodes whose states hardly depend on the sample are evaluated in the first call
    opening = 1 if warmup else min(run.window, run.rule.recurrence(run.grid).blind)
    assert widths[: warmup + 1] == [opening] * min(warmup + 1, run.steps)
    final = sum(record.samples[0].accepted for record in got.stats.history[: warmup + 1])
    if run.window > 1 and run.steps > final + 1:
        assert widths[warmup + 1] == min(run.window, run.steps - final)
    expected = solve_sequential(run.network, x_T, run.grid, run.rule, seed=run.seed)
    assert relative(got.sample, expected.sample) < exactness("float64")


def test_callback_sees_every_round_and_a_preview() -> None:
    rounds, previews = [], []

    def callback(state: Any) -> None:
        rounds.append(state.stats.history[-1].round)
        preview = state.estimate()
        previews.append(preview.copy())
        preview[...] = np.nan  # what the caller does with it is nobody's business

    x_T, grid = normal((2, 6)), TABLE.timesteps(20)
    arguments = (Mixture(TABLE, "epsilon"), x_T, grid, DDIM(TABLE), 8)
    got = solve(*arguments, tolerance=1e-4, callback=callback)
    assert rounds == list(range(1, got.stats.rounds + 1))
    assert same_bits(previews[-1], got.sample)
    errors = [relative(preview, got.sample) for preview in previews]
    assert errors[-2] < errors[0] / 10  # previews close in on the sample
    assert same_bits(got.sample, solve(*arguments, tolerance=1e-4).sample)


def test_changing_a_preview_does_not_change_a_sequential_run() -> None:
    def callback(state: Any) -> None:
        state.estimate()[...] = 0

    arguments = (TanhNetwork(), normal((2, 6)), TABLE.timesteps(6), DDIM(TABLE))
    assert same_bits(solve_sequential(*arguments, callback=callback).sample, solve_sequential(*arguments).sample)


def test_the_state_by_hand_is_the_solution() -> None:
    solver = ParallelIntegralSolver(DDIM(TABLE), 5, tolerance=1e-3, check=False)
    arguments = (TanhNetwork(), normal((2, 6)), TABLE.timesteps(12))
    state = solver.init(*arguments)
    assert state.stats.calls == 0
    unfinished = solver.result(state)
    assert unfinished.status is Status.RUNNING
    assert same_bits(unfinished.sample, arguments[1])  # nothing is known yet
    while not solver.done(state):
        solver.step(state)
    got, whole = solver.result(state), solver.solve(*arguments)
    assert same_bits(got.sample, whole.sample)
    assert (got.status, got.message) == (whole.status, whole.message)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step(sampler: str) -> None:
    rule, schedule = SAMPLERS[sampler]
    got = solve(TanhNetwork(), normal((2, 6)), schedule.timesteps(1), rule, 8)
    assert same_bits(got.sample, solve_sequential(TanhNetwork(), normal((2, 6)), schedule.timesteps(1), rule).sample)
    assert (got.stats.rounds, got.stats.evaluations) == (1, 2)


@pytest.mark.parametrize("value", [0.0, 1e-200])
def test_states_without_size(value: float) -> None:
    """Nothing is divided by the size of a state that is 0, or whose square is."""
    x_T = np.full((2, 4), value)
    got = solve(lambda x, t: x * 0, x_T, TABLE.timesteps(10), DDIM(TABLE), 4, tolerance=1e-3, throw=False)
    assert got.success
    expected = solve_sequential(lambda x, t: x * 0, x_T, TABLE.timesteps(10), DDIM(TABLE))
    np.testing.assert_allclose(got.sample, expected.sample, rtol=1e-12)
    assert np.all(np.isfinite(got.error_estimate))
