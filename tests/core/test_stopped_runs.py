"""Exceptions, interrupts and limits leave what was reached."""

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from parasolver_core import (
    DDIM,
    DDPM,
    ConvergenceError,
    ParallelIntegralSolver,
    SequentialSolver,
    Status,
    solve,
    solve_sequential,
)
from tests.core.any_tables import any_table
from tests.core.problems import Mixture, normal, relative
from tests.core.test_learning import Given
from tests.core.wrong_runs import BOTH, GRID, NETWORK, RULE, TABLE


@BOTH
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_error_of_the_network_comes_out_as_it_is(options: dict[str, Any], call: int) -> None:
    class BoomError(Exception):
        pass

    calls = 0

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == call:
            raise BoomError("boom", 42)
        return NETWORK(x, t)

    solver_state: dict[str, Any] = {"seed": 3}
    with pytest.raises(BoomError, match="boom") as caught:
        solve(network, normal((2, 3)), GRID, DDPM(TABLE), check=False, **solver_state, **options)
    error = caught.value
    assert error.args == ("boom", 42)
    (note,) = error.__notes__
    assert f"call {call}" in note
    assert re.search(r"steps \d+\.\.\d+, timesteps \d+\.\.\d+", note)
    if options.get("window") != 6:
        assert f"steps {call - 1}..{call - 1}, timesteps {GRID[call - 1]}..{GRID[call - 1]}" in note
    assert error.solution.status is Status.FAILED
    assert error.solution.stats.rounds == call - 1
    assert error.solution.stats.calls in (call - 1, call)
    assert np.all(np.isfinite(error.solution.sample))
    assert min(error.solution.steps) >= call - 1


@BOTH
@pytest.mark.parametrize("raised", [StopIteration, GeneratorExit, SystemExit, RecursionError, torch.OutOfMemoryError])
def test_unusual_exceptions_of_the_network(options: dict[str, Any], raised: type[BaseException]) -> None:
    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        raise raised("from inside")

    with pytest.raises(raised, match="from inside") as caught:
        solve(network, normal((2, 3)), GRID, RULE, **options)
    assert caught.value.solution.status is Status.FAILED


@BOTH
@pytest.mark.parametrize("where", ["network", "callback"])
def test_keyboard_interrupt(options: dict[str, Any], where: str) -> None:
    interrupted = False

    def interrupt_at(round_: int) -> None:
        nonlocal interrupted
        if round_ == 3 and not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    calls = 0

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if where == "network":
            interrupt_at(calls)
        return NETWORK(x, t)

    def callback(state: Any) -> None:
        if where == "callback":
            interrupt_at(state.stats.rounds)

    method = options.get("method")
    solver = SequentialSolver(RULE) if method else ParallelIntegralSolver(RULE, options["window"], check=False)
    with pytest.raises(KeyboardInterrupt) as caught:
        solver.solve(network, normal((2, 3)), GRID, callback=callback)
    partial = caught.value.solution
    assert partial.status is Status.INTERRUPTED
    assert partial.stats.rounds == (2 if where == "network" else 3)
    assert np.all(np.isfinite(partial.sample))
    assert "Interrupted" in partial.message

    again = solver.solve(network, normal((2, 3)), GRID, callback=callback)
    fresh = solver.solve(NETWORK, normal((2, 3)), GRID)
    np.testing.assert_array_equal(again.sample, fresh.sample)


@BOTH
def test_stop_iteration_from_the_callback_returns_what_there_is(options: dict[str, Any]) -> None:
    def callback(state: Any) -> None:
        if state.stats.rounds == 2:
            raise StopIteration

    got = solve(NETWORK, normal((2, 3)), GRID, RULE, tolerance=1e-8, callback=callback, **options)
    assert got.status is Status.STOPPED
    assert got.statuses == (Status.STOPPED,) * 2
    assert got.stats.rounds == 2
    assert not got.success
    assert np.all(np.isfinite(got.sample))
    assert "Stopped" in got.message


def test_stop_iteration_after_the_last_round_is_still_a_success() -> None:
    def callback(state: Any) -> None:
        if Status.RUNNING not in state.statuses:
            raise StopIteration

    assert solve(NETWORK, normal((2, 3)), GRID, RULE, callback=callback).success


def test_an_error_of_the_callback() -> None:
    with pytest.raises(KeyError, match="missing") as caught:
        solve(NETWORK, normal((2, 3)), GRID, RULE, callback=lambda state: {}["missing"])
    assert caught.value.solution.status is Status.FAILED
    assert caught.value.solution.stats.rounds == 1


@BOTH
def test_max_rounds(options: dict[str, Any]) -> None:
    arguments = (NETWORK, normal((2, 3)), GRID, RULE)
    with pytest.raises(ConvergenceError, match=r"max_rounds=1: 1 of 20 steps.*20 always suffice") as caught:
        solve(*arguments, max_rounds=1, tolerance=1e-6, **options)
    returned = solve(*arguments, max_rounds=1, tolerance=1e-6, throw=False, **options)
    for got in (caught.value.solution, returned):
        assert got.status is Status.MAX_ROUNDS
        assert got.stats.rounds == 1
        assert got.steps == (1, 1)
        assert np.all(np.isfinite(got.sample))
    assert solve(*arguments, max_rounds=20, tolerance=0, **options).success


@pytest.mark.parametrize("batch", [1, 3])
def test_an_estimate_that_overflows_says_nothing_by_itself(batch: int) -> None:
    """What is guessed of the steps to come: NumPy warned of infinity less infinity, and the sample was NaN."""
    n = 6
    table = any_table(
        n, 1, 1, noisy=False, a=np.full((n, 1), 2e12), b=np.full((n, 1), 1e12), held=np.tile([1.0, 1.0], (n, 1)),
        slope=np.zeros(n),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = solve(
            lambda x, t: np.tanh(x), normal((batch, 2)).astype(np.float32), table.timesteps, Given(table), 2,
            max_rounds=1, tolerance=0.1, throw=False,
        )  # fmt: skip
    assert got.status is Status.MAX_ROUNDS
    assert got.steps == (1,) * batch
    assert np.isfinite(got.states).all()
    np.testing.assert_array_equal(got.sample, got.states)


def test_the_estimate_after_max_rounds_is_better_than_the_last_state() -> None:
    """What is returned is a guess of the sample, not the noisy state where the rounds ended."""
    denoiser = Mixture(TABLE, "epsilon")
    arguments = (denoiser, normal((4, 16)), GRID, DDIM(TABLE))
    exact = solve_sequential(*arguments).sample
    got = solve(*arguments, 20, tolerance=1e-9, max_rounds=4, throw=False)
    assert got.status is Status.MAX_ROUNDS
    assert relative(got.sample, exact) < 0.5 * relative(got.states, exact)


@pytest.mark.parametrize("method", ["secant", "parasolver", "parataa", "sequential"])
def test_nobody_knows_how_far_an_unfinished_sample_is_off(method: str) -> None:
    """Its final states are exact, and it is off as a whole: an estimate of 0 would be taken for the sample."""
    problem = NETWORK, normal((2, 3)), TABLE.timesteps(40), RULE
    options: dict[str, Any] = {"window": 6, "method": method, "tolerance": 1e-6}

    def stop(state: Any) -> None:
        if state.stats.rounds == 3:
            raise StopIteration

    stopped = solve(*problem, callback=stop, **options)
    late = solve(*problem, max_rounds=3, throw=False, **options)
    assert (stopped.status, late.status) == (Status.STOPPED, Status.MAX_ROUNDS)
    want = solve_sequential(*problem).sample
    for got in (stopped, late):
        assert relative(got.sample, want) > 1e-3
        np.testing.assert_array_equal(got.error_estimate, [np.inf, np.inf])


def test_samples_that_are_converged_keep_their_estimates() -> None:
    """The first is 0 throughout and ends some rounds before the other, which then is cut off."""
    x_T = np.stack([np.zeros(3), normal((3,))])
    problem = (lambda x, t: np.tanh(2 * x)), x_T, TABLE.timesteps(40), RULE
    got = solve(*problem, 6, tolerance=1e-6, max_rounds=9, throw=False)
    assert got.statuses == (Status.CONVERGED, Status.MAX_ROUNDS)
    assert got.error_estimate[0] < 1e-6
    assert got.error_estimate[1] == np.inf


def test_solutions_and_records_are_equal_to_themselves_only() -> None:
    """Their arrays have no one truth: a comparison of fields would raise."""
    first, other = (solve(NETWORK, normal((2, 3)), GRID, RULE, 4, save="trajectory") for _ in range(2))
    record, twin = (one.stats.history[0] for one in (first, other))
    assert first in [other, first]
    assert first != other
    assert record != twin
    assert record.samples[0] != twin.samples[0]
    assert len({first, other, record, twin}) == 4
