"""The promises of the solver, over schedules, samplers, windows, tolerances, batches, dtypes and array libraries."""

import itertools
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parasolver_core import (
    DDIM,
    DPMSolver,
    ParallelIntegralSolver,
    solve,
    solve_sequential,
)
from tests.arrays import to_numpy
from tests.core.any_runs import FEW, SAMPLERS, STOCHASTIC, TABLE, Run, exactness, runs, same_bits, tolerances
from tests.core.problems import Counted, Gaussian, Mixture, Rational, TanhNetwork, normal, relative


def test_stochastic_names_are_right() -> None:
    for name, (rule, schedule) in SAMPLERS.items():
        assert rule.recurrence(schedule.timesteps(5)).stochastic == (name in STOCHASTIC)


# window = 1


@given(run=runs(steps=FEW), tolerance=tolerances)
def test_window_one_is_the_sequential_sampler_to_the_last_bit(xp: ModuleType, run: Run, tolerance: float) -> None:
    options = {"seed": run.seed, "save": "trajectory"}
    x_T = run.start(xp)
    one = solve(run.network, x_T, run.grid, run.rule, 1, tolerance=tolerance, **options)
    sequential = solve_sequential(run.network, x_T, run.grid, run.rule, **options)
    assert same_bits(one.sample, sequential.sample)
    assert same_bits(one.trajectory, sequential.trajectory)
    assert one.stats.rounds == one.stats.evaluations // run.batch == run.steps
    assert same_bits(one.trajectory[0, ...], x_T)
    assert same_bits(one.trajectory[-1, ...], one.sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_window_one_in_half_precision(sampler: str, dtype: torch.dtype) -> None:
    rule, schedule = SAMPLERS[sampler]
    x_T = torch.asarray(normal((2, 6))).to(dtype)
    results = [
        solve(TanhNetwork(), x_T, schedule.timesteps(7), rule, **options).sample
        for options in ({"window": 1}, {"method": "sequential"})
    ]
    assert results[0].dtype == dtype
    assert torch.equal(*results)


# Finite termination


@given(run=runs(dtypes=("float64",), steps=FEW), method=st.sampled_from(["secant", "identity"]))
def test_after_k_rounds_the_first_k_states_are_exact(xp: ModuleType, run: Run, method: str) -> None:
    x_T = run.start(xp)
    exact = solve_sequential(run.network, x_T, run.grid, run.rule, seed=run.seed, save="trajectory").trajectory
    solver = ParallelIntegralSolver(run.rule, run.window, tolerance=0, method=method)
    state = solver.init(run.network, x_T, run.grid, seed=run.seed, save="trajectory")
    assert state.steps == (0,) * run.batch
    for k in range(1, run.steps + 1):
        if solver.done(state):
            break
        solver.step(state)
        states = state.trajectory()
        for sample, final in enumerate(state.steps):
            assert final >= k
            done = (slice(0, final + 1), sample, ...)
            assert relative(states[done], exact[done]) < exactness("float64")
            assert np.all(np.isnan(to_numpy(states)[final + 1 :, sample]))
    assert solver.done(state)
    assert solver.result(state).success


@given(run=runs(), tolerance=tolerances, method=st.sampled_from(["secant", "identity"]))
def test_never_more_rounds_than_steps_and_counts_are_true(run: Run, tolerance: float, method: str) -> None:
    network = Counted(run.network)
    got = solve(
        network, normal((run.batch, 2, 3), None, run.dtype), run.grid, run.rule, run.window,
        tolerance=tolerance, method=method, seed=run.seed, check=False,
    )  # fmt: skip
    stats = got.stats
    assert got.success
    assert got.steps == (run.steps,) * run.batch
    assert stats.rounds <= run.steps
    assert stats.calls == len(network.rows) == stats.rounds == len(stats.history)
    assert stats.evaluations == sum(network.rows)
    assert [record.evaluations for record in stats.history] == network.rows
    assert sum(record.accepted for record in stats.history) == run.steps * run.batch
    assert all(record.window <= run.window for record in stats.history)
    assert all(one.accepted >= 1 for record in stats.history for one in record.samples)


@given(run=runs(dtypes=("float64",)), max_rows=st.integers(1, 30))
def test_max_rows_bounds_every_call_and_changes_nothing(run: Run, max_rows: int) -> None:
    network = Counted(Rational(time_scale=1e-3))
    arguments = (normal((run.batch, 4), seed=run.seed), run.grid, run.rule)
    options = {"window": run.window, "tolerance": 1e-3, "seed": run.seed}
    got = solve(network, *arguments, max_rows=max_rows, **options)
    assert max(network.rows) <= max_rows
    assert got.stats.calls == len(network.rows)
    assert got.stats.evaluations == sum(network.rows)
    whole = solve(Rational(time_scale=1e-3), *arguments, **options)
    assert same_bits(got.sample, whole.sample)
    assert (got.stats.rounds, got.stats.evaluations) == (whole.stats.rounds, whole.stats.evaluations)


@pytest.mark.parametrize("max_rows", [1, 3, 4])
def test_max_rows_of_the_sequential_sampler(max_rows: int) -> None:
    network = Counted(Rational())
    x_T = normal((5, 4))
    got = solve_sequential(network, x_T, TABLE.timesteps(6), DPMSolver(TABLE), max_rows=max_rows)
    assert max(network.rows) <= max_rows
    assert got.stats.calls == len(network.rows) == 6 * -(-5 // max_rows)
    assert got.stats.evaluations == sum(network.rows) == 30
    assert same_bits(got.sample, solve_sequential(Rational(), x_T, TABLE.timesteps(6), DPMSolver(TABLE)).sample)


# What the solver should find quickly


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_denoiser_that_is_its_surrogate_is_found_at_once(sampler: str) -> None:
    """Gaussian data of the standard deviation that the schedule was told: the first slopes are exact."""
    rule, schedule = SAMPLERS[sampler]
    kind = rule.prediction_type or schedule.default_prediction_type
    denoiser = Gaussian(schedule, kind, mean=0.3, std=schedule.sigma_data)
    grid = schedule.timesteps(40)
    x_T = schedule.levels(grid)[1][0] * normal((1, 8))
    got = solve(denoiser, x_T, grid, rule, 40, tolerance=1e-8)
    assert got.stats.rounds <= 4  # first call, window opened, corrected exactly, confirmed
    assert relative(got.sample, solve_sequential(denoiser, x_T, grid, rule).sample) < 1e-8


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_secant_learns_a_scalar_slope(sampler: str) -> None:
    """The same with a standard deviation that the schedule was not told."""
    rule, schedule = SAMPLERS[sampler]
    kind = rule.prediction_type or schedule.default_prediction_type
    denoiser = Gaussian(schedule, kind, mean=0.3, std=2.5 * schedule.sigma_data)
    grid = schedule.timesteps(40)
    x_T = schedule.levels(grid)[1][0] * normal((1, 8))
    got = solve(denoiser, x_T, grid, rule, 40, tolerance=1e-6)
    assert got.stats.rounds <= 7
    assert relative(got.sample, solve_sequential(denoiser, x_T, grid, rule).sample) < 1e-6


def test_fewer_rounds_than_steps() -> None:
    """The point of it all, on a denoiser that is not linear."""
    x_T, grid = normal((4, 32)), TABLE.timesteps(50)
    got = solve(Mixture(TABLE, "epsilon"), x_T, grid, DDIM(TABLE), 50, tolerance=1e-2)
    assert got.stats.rounds <= 20


# tolerance


@given(run=runs(steps=FEW))
def test_tolerance_zero_is_the_sequential_sample(xp: ModuleType, run: Run) -> None:
    x_T = run.start(xp)
    got = solve(run.network, x_T, run.grid, run.rule, run.window, tolerance=0, seed=run.seed)
    expected = solve_sequential(run.network, x_T, run.grid, run.rule, seed=run.seed)
    assert relative(got.sample, expected.sample) < exactness(run.dtype)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_tolerance_holds_for_95_of_100_samples(sampler: str, tolerance: float) -> None:
    rule, schedule = SAMPLERS[sampler]
    kind = rule.prediction_type or schedule.default_prediction_type
    grid = schedule.timesteps(30)
    x_T = schedule.levels(grid)[1][0] * normal((40, 16), seed=4)
    for denoiser in (Mixture(schedule, kind), Gaussian(schedule, kind, 0.3, 0.2)):
        got = solve(denoiser, x_T, grid, rule, 12, tolerance=tolerance).sample
        expected = solve_sequential(denoiser, x_T, grid, rule).sample
        errors = [relative(a, b) for a, b in zip(got, expected, strict=True)]
        assert np.mean(np.array(errors) <= tolerance) >= 0.95, (type(denoiser).__name__, sorted(errors)[-4:])


def test_the_error_falls_with_the_tolerance() -> None:
    x_T, grid = normal((8, 32)), TABLE.timesteps(50)
    denoiser = Mixture(TABLE, "epsilon")
    expected = solve_sequential(denoiser, x_T, grid, DDIM(TABLE)).sample
    runs = [solve(denoiser, x_T, grid, DDIM(TABLE), 25, tolerance=10.0**-k) for k in range(1, 9, 2)]
    errors = [relative(run.sample, expected) for run in runs]
    assert all(after < before / 3 for before, after in itertools.pairwise(errors)), errors
    assert all(a.stats.rounds <= b.stats.rounds for a, b in itertools.pairwise(runs))
