"""NaN and infinity end a sample, with what was reached, and no other."""

from typing import Any

import numpy as np
import pytest
import torch

from parasolver_core import (
    DDIM,
    Euler,
    NoiseSchedule,
    NonFiniteError,
    Recurrence,
    Status,
    StepRule,
    solve,
    solve_sequential,
)
from tests.core.problems import normal, relative
from tests.core.wrong_runs import BOTH, GRID, INF, NAN, NETWORK, RULE, TABLE, failing, start_of_two_signs

LOUD = pytest.mark.filterwarnings("ignore:x_T. has an RMS of:UserWarning")  # which is meant


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # see the test after this one
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("step", [0, 1, 9, 19])
@BOTH
def test_nonfinite_prediction(value: float, step: int, options: dict[str, Any]) -> None:
    network = failing(value, GRID[step], -1.0)
    x_T, rule = start_of_two_signs(), DDIM(TABLE, prediction_type="sample")
    grid_after = {"save": "trajectory", **options}
    with pytest.raises(NonFiniteError, match=rf"sample 1 at step {step} \(timestep {GRID[step]}\)") as caught:
        solve(network, x_T, GRID, rule, tolerance=1e-3, **options)
    returned = solve(network, x_T, GRID, rule, tolerance=1e-3, throw=False, **grid_after)
    for got in (caught.value.solution, returned):
        assert got.status is Status.NONFINITE_MODEL
        assert not got.success
        assert got.statuses == (Status.CONVERGED, Status.NONFINITE_MODEL, Status.CONVERGED)
        assert got.steps[0] == got.steps[2] == 20
        assert got.steps[1] <= step
        assert np.all(np.isfinite(got.sample))
        assert np.all(np.isfinite(got.states))
    np.testing.assert_array_equal(returned.sample, caught.value.solution.sample)
    np.testing.assert_array_equal(returned.states[1], returned.trajectory[returned.steps[1], 1])

    healthy = solve(network, x_T[[0, 2]], GRID, rule, tolerance=1e-3, **options)
    np.testing.assert_array_equal(returned.sample[[0, 2]], healthy.sample)


@LOUD
@BOTH
def test_the_first_of_several_samples_that_fail_is_named(options: dict[str, Any]) -> None:
    """Also where a later one has failed rounds before."""

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        late, early = (x[:, :1] > 50) & (t[:, None] <= GRID[6]), (x[:, :1] < -50) & (t[:, None] <= GRID[2])
        return np.where(late | early, np.nan, 0 * x)

    x_T = np.array([[0.0, 1.0], [99.0, 1.0], [-99.0, 1.0]])
    got = solve(network, x_T, GRID, RULE, throw=False, **options)
    assert [status.name for status in got.statuses] == ["CONVERGED", "NONFINITE_MODEL", "NONFINITE_MODEL"]
    assert got.steps == (20, 6, 2)
    assert got.message.startswith(f"The denoiser gave NaN or infinity for sample 1 at step 6 (timestep {GRID[6]})")


def test_infinity_is_an_error_and_not_a_warning() -> None:
    with pytest.raises(NonFiniteError, match=rf"gave NaN or infinity for sample 1 at step 1 \(timestep {GRID[1]}\)"):
        solve(failing(INF, GRID[1], -1.0), start_of_two_signs(), GRID, DDIM(TABLE, prediction_type="sample"))


@BOTH
def test_after_a_failure_the_trajectory_is_nan(options: dict[str, Any]) -> None:
    rule = DDIM(TABLE, prediction_type="sample")
    got = solve(
        failing(NAN, GRID[9], -1.0), start_of_two_signs(), GRID, rule, save="trajectory", throw=False, **options
    )
    final = got.steps[1]
    assert np.all(np.isfinite(got.trajectory[: final + 1]))
    assert np.all(np.isnan(got.trajectory[final + 1 :, 1]))
    assert np.all(np.isfinite(got.trajectory[:, [0, 2]]))


@BOTH
def test_the_message_names_the_round_of_the_failure(options: dict[str, Any]) -> None:
    calls = 0

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        out = NETWORK(x, t)
        if calls == 2:
            out[x[:, 0] < 0] = NAN
        return out

    with pytest.raises(NonFiniteError, match=r"in round 2\b"):
        solve(network, start_of_two_signs(), GRID, DDIM(TABLE, prediction_type="sample"), check=False, **options)


def test_a_failed_sample_is_not_evaluated_again_sequentially() -> None:
    check_not_evaluated_again({"method": "sequential"})


@pytest.mark.parametrize("window", [1, 6])
def test_a_failed_sample_is_not_evaluated_again(window: int) -> None:
    check_not_evaluated_again({"window": window})


def check_not_evaluated_again(options: dict[str, Any]) -> None:
    failed = False

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal failed
        ours = x[:, 0] < 0
        assert not (failed and np.any(ours & (t != GRID[0])))  # the first node again: the test of determinism
        out = NETWORK(x, t)
        out[ours & (t == GRID[5])] = NAN
        failed |= np.any(ours) and t[np.argmax(ours)] == GRID[5]  # at its true input
        return out

    got = solve(network, start_of_two_signs(), GRID, DDIM(TABLE, prediction_type="sample"), throw=False, **options)
    assert got.statuses[1] is Status.NONFINITE_MODEL


@pytest.mark.parametrize("failing_round", [1, 2, 3, 4])
def test_nan_once_in_a_round(failing_round: int) -> None:
    """A network that fails once, everywhere: all samples end, and nothing of the round is accepted."""
    calls = 0

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return NETWORK(x, t) * (NAN if calls == failing_round else 1.0)

    got = solve(network, normal((2, 3)), GRID, RULE, 6, tolerance=1e-6, check=False, throw=False)
    assert got.status is Status.NONFINITE_MODEL
    assert got.stats.rounds == calls == failing_round
    assert all(one.accepted == 0 for one in got.stats.history[-1].samples)
    assert np.all(np.isfinite(got.sample))


def test_nan_for_every_sample_names_the_first() -> None:
    with pytest.raises(NonFiniteError, match=r"sample 0 at step 0 \(timestep 999\)") as caught:
        solve(lambda x, t: x * NAN, normal((3, 2)), GRID, RULE)
    assert caught.value.solution.steps == (0, 0, 0)
    np.testing.assert_array_equal(caught.value.solution.sample, normal((3, 2)))


@LOUD
@BOTH
def test_a_result_beyond_the_range_of_float16_is_not_a_success(options: dict[str, Any]) -> None:
    karras = NoiseSchedule.karras()
    x_T = torch.full((1, 3), 6e4, dtype=torch.float16)
    got = solve(
        lambda x, t: torch.full_like(x, -3e3), x_T, karras.timesteps(10), Euler(karras, prediction_type="epsilon"),
        throw=False, **options,
    )  # fmt: skip
    assert not got.success
    assert bool(torch.all(torch.isfinite(got.sample)))


@LOUD
@BOTH
def test_float16_states_near_the_end_of_their_range(options: dict[str, Any]) -> None:
    """Squares and sums of such states overflow in float16, and must not be taken there."""
    x_T = torch.full((2, 1000), 6e4, dtype=torch.float16)
    rule = Euler(NoiseSchedule.flow_matching())
    network = lambda x, t: torch.tanh(x / 6e4) * 3e4 * t.to(x.dtype)[:, None]  # noqa: E731
    grid = NoiseSchedule.flow_matching().timesteps(12)
    got = solve(network, x_T, grid, rule, tolerance=1e-3, **options)
    assert got.success
    expected = solve_sequential(lambda x, t: network(x, t), x_T.double(), grid, rule)
    assert relative(got.sample.double(), expected.sample) < 12 * 2**-11 * 2  # each prediction is rounded
    assert bool(torch.all(torch.isfinite(got.sample)))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("window", [1, 6])
def test_float32_whose_squares_overflow(window: int) -> None:
    """window=1 is promised to be the sequential sampler, which never squares a state."""
    x_T = normal((1, 3), dtype="float32")
    rule = DDIM(TABLE, prediction_type="sample")
    network = lambda x, t: np.full_like(x, 1e20)  # noqa: E731
    expected = solve_sequential(network, x_T, GRID, rule)
    assert np.all(np.isfinite(expected.sample))
    got = solve(network, x_T, GRID, rule, window)
    np.testing.assert_allclose(got.sample, expected.sample, rtol=1e-6)


@BOTH
def test_overflow_of_the_solver_is_told_from_that_of_the_network(
    options: dict[str, Any],
) -> None:
    with np.errstate(all="ignore"):
        got = solve(
            lambda x, t: np.full_like(x, 3e38), normal((1, 3), dtype="float32"), GRID, DDIM(TABLE), throw=False,
            **options,
        )  # fmt: skip
    assert got.status is Status.NONFINITE_SOLVER
    assert np.all(np.isfinite(got.sample))
    assert np.all(np.isfinite(got.states))


@pytest.mark.parametrize("step", [2, 5, 11])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_that_leaves_the_range_ends_with_finite_states(step: int, tolerance: float, batch: int) -> None:
    """A coefficient of 1e38 makes infinity of states that are small; nothing behind its step is accepted."""
    n = 12
    a, b, zero = np.full((n, 1), 0.9), np.full((n, 1), 0.3), np.zeros(n)
    a[step] = b[step] = 1e38
    table = Recurrence(np.arange(n)[::-1].copy(), a, b, zero, np.tile([0.0, 1.0], (n, 1)), zero, zero)

    class Rule(StepRule):
        def recurrence(self, timesteps: np.ndarray) -> Recurrence:
            return table

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.tanh(x) * 30

    x_T = (10 * normal((batch, 4))).astype(np.float32)
    got = solve(network, x_T, table.timesteps, Rule(), 6, tolerance=tolerance, save="trajectory", throw=False)
    assert set(got.statuses) == {Status.NONFINITE_SOLVER}
    assert set(got.steps) == {step}
    assert np.isfinite(got.states).all()
    for sample, steps in enumerate(got.steps):
        np.testing.assert_array_equal(got.trajectory[steps, sample], got.states[sample])
