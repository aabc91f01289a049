"""What a step rule may ask of the solver besides its table: scaled network inputs, and grids of its own."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from parasolver_core import DDIM, Euler, NoiseSchedule, Recurrence, solve, solve_sequential
from tests.core.any_tables import any_table
from tests.core.problems import normal
from tests.core.test_learning import Given

SCHEDULE = NoiseSchedule.karras()
GRID = SCHEDULE.timesteps(12)


def scale(t: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(1 + t**2)


def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.tanh(x) * np.cos(t)[:, None]


class ScaledEuler(Euler):
    def recurrence(self, timesteps: np.ndarray) -> Recurrence:
        return replace(super().recurrence(timesteps), input_scale=scale(timesteps))


def test_input_scale_equals_a_scaling_network() -> None:
    x_T = np.random.default_rng(0).normal(size=(2, 3)) * 80
    want = solve_sequential(lambda x, t: network(x * scale(t)[:, None], t), x_T, GRID, Euler(SCHEDULE)).sample
    sequential = solve_sequential(network, x_T, GRID, ScaledEuler(SCHEDULE)).sample
    parallel = solve(network, x_T, GRID, ScaledEuler(SCHEDULE), window=4, tolerance=0).sample
    np.testing.assert_allclose(sequential, want, rtol=1e-13)
    np.testing.assert_allclose(parallel, want, rtol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_state_that_overflows_where_it_is_scaled_says_nothing_by_itself(batch: int) -> None:
    """Two steps grow to 1e20, and 1e30 times that is beyond float32; NumPy warned of it."""
    n = 6
    table = any_table(n, 1, 1, noisy=False, input_scale=np.full(n, 1e30))
    rule, x_T = Given(replace(table, a=np.where(np.arange(n) < 2, 1e10, 0.5)[:, None])), normal((batch, 3))
    arguments = (lambda x, t: np.tanh(x), x_T.astype(np.float32), table.timesteps, rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = solve_sequential(*arguments).sample
        got = solve(*arguments, window=4, tolerance=1e-3).sample
    np.testing.assert_allclose(got, want, rtol=2e-3)


def test_input_scale_of_the_wrong_length_is_refused() -> None:
    table = Euler(SCHEDULE).recurrence(GRID)
    with pytest.raises(ValueError, match=r"input_scale: expected shape \(12,\)"):
        replace(table, input_scale=np.ones(11))


def test_a_rule_may_accept_repeated_timesteps() -> None:
    class Twice(DDIM):
        def check_grid(self, timesteps: np.ndarray) -> None:
            pass

        def recurrence(self, timesteps: np.ndarray) -> Recurrence:
            table = super().recurrence(timesteps[::2])
            rows = {name: np.repeat(getattr(table, name), 2, axis=0) for name in ("a", "b", "c", "held")}
            slopes = {name: np.repeat(getattr(table, name), 2) for name in ("slope", "identity_slope")}
            return Recurrence(timesteps=timesteps, **rows, **slopes)

    schedule = NoiseSchedule.linear()
    grid = np.repeat(schedule.timesteps(4), 2)
    x_T = np.ones((1, 2))
    assert np.all(np.isfinite(solve_sequential(network, x_T, grid, Twice(schedule)).sample))
    with pytest.raises(ValueError, match="timesteps: expected no duplicates"):
        solve(network, x_T, grid, DDIM(schedule))
