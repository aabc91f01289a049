"""Starting from a trajectory: from the answer nothing changes, and from a related run it takes fewer rounds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parasolver_core import DDIM, DDPM, DPMSolver, Euler, NoiseSchedule, StepRule, solve, solve_sequential

TABLE, FLOW = NoiseSchedule.linear(), NoiseSchedule.flow_matching()
RULES: dict[str, tuple[StepRule, NoiseSchedule]] = {
    "ddim": (DDIM(TABLE), TABLE),
    "ddpm": (DDPM(TABLE, prediction_type="v_prediction"), TABLE),
    "2m": (DPMSolver(TABLE, prediction_type="sample"), TABLE),
    "3m": (DPMSolver(TABLE, order=3), TABLE),
    "flow": (Euler(FLOW), FLOW),
}


def network(x: np.ndarray, t: np.ndarray, shift: float = 0.0) -> np.ndarray:
    return np.tanh(x @ np.cos(np.arange(36.0)).reshape(6, 6) / 2 + shift) + 0.1 * x


def noise(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 6))


@pytest.mark.parametrize("name", RULES)
@given(st.integers(1, 20), st.integers(2, 12), st.integers(1, 3), st.integers(0, 99))
def test_starting_from_the_answer_leaves_no_residual_and_changes_nothing(
    name: str, n: int, window: int, batch: int, seed: int
) -> None:
    rule, schedule = RULES[name]
    x_T, grid = noise(batch, seed), schedule.timesteps(n)
    truth = solve_sequential(network, x_T, grid, rule, seed=seed, save="trajectory")
    got = solve(network, x_T, grid, rule, window, tolerance=1e-6, seed=seed, start=truth.trajectory, save="trajectory")
    size = np.abs(truth.trajectory).max()
    assert max(record.residual for record in got.stats.history) <= 1e-11  # of float64, through 1/b of small steps
    np.testing.assert_allclose(got.trajectory, truth.trajectory, rtol=0, atol=1e-11 * size)
    assert got.stats.rounds <= 1 + -(-(n - 1) // window)  # each round accepts its whole window


def test_a_start_where_nodes_would_be_spread_is_used_all_the_same() -> None:
    """From the answer a window of 20 slides over 500 steps in 25 rounds, with nothing to correct."""
    rule, x_T, grid = DDIM(TABLE), noise(1), TABLE.timesteps(500)
    truth = solve_sequential(network, x_T, grid, rule, save="trajectory").trajectory
    assert solve(network, x_T, grid, rule, 20).stats.history[0].samples[0].accepted == 0  # spread without one
    got = solve(network, x_T, grid, rule, 20, start=truth)
    assert got.stats.rounds <= 26
    assert got.stats.evaluations <= 500 + 1
    assert max(record.residual for record in got.stats.history) <= 1e-11
    np.testing.assert_allclose(got.sample, truth[-1], rtol=0, atol=1e-11 * np.abs(truth[-1]).max())


@pytest.mark.parametrize(("dtype", "size"), [("float16", 6e4), ("float32", 1e30), ("float64", 1e200)])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "flow"])
def test_a_wild_start_costs_rounds_only(name: str, dtype: str, size: float) -> None:
    """Its squares, and in half precision itself, are beyond the range: no warning, and the sample all the same."""

    def bounded(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.tanh(x)

    rule, schedule = RULES[name]
    x_T, grid = noise(2).astype(dtype), schedule.timesteps(12)
    wild = np.clip(noise(2) * size, -size, size).astype(dtype)
    start = np.broadcast_to(wild, (13, *x_T.shape)).copy()
    want = solve_sequential(bounded, x_T, grid, rule, seed=2).sample
    got = solve(bounded, x_T, grid, rule, 12, tolerance=0, seed=2, start=start)
    assert got.stats.rounds <= 12
    np.testing.assert_allclose(got.sample, want, rtol=0, atol=300 * np.finfo(dtype).eps * np.abs(want).max())


@pytest.mark.parametrize("size", [1e30, 3e38])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_start_that_is_wild_between_its_ends_costs_rounds_only(size: float, batch: int) -> None:
    """What it says of the outputs there may be beyond the range."""

    def bounded(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.tanh(x)

    grid, x_T = TABLE.timesteps(12), noise(batch).astype(np.float32)
    start = np.tile(np.tanh(x_T), (13, 1, 1))
    start[4:7] *= np.float32(size)
    want = solve_sequential(bounded, x_T, grid, RULES["ddim"][0]).sample
    got = solve(bounded, x_T, grid, RULES["ddim"][0], 12, tolerance=1e-4, start=start)
    assert np.linalg.norm(got.sample - want) < 1e-4 * np.linalg.norm(want)
    assert got.stats.rounds <= 12


@pytest.mark.parametrize("name", RULES)
def test_a_related_trajectory_saves_rounds_and_gives_the_same_sample(name: str) -> None:
    rule, schedule = RULES[name]
    x_T, grid = noise(4), schedule.timesteps(40)
    related = solve_sequential(network, x_T, grid, rule, seed=1, save="trajectory").trajectory

    def changed(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return network(x, t, shift=1e-7)

    truth = solve_sequential(changed, x_T, grid, rule, seed=1).sample
    cold = solve(changed, x_T, grid, rule, 20, tolerance=1e-3, seed=1)
    warm = solve(changed, x_T, grid, rule, 20, tolerance=1e-3, seed=1, start=related)
    assert np.linalg.norm(warm.sample - truth) <= 1e-3 * np.linalg.norm(truth)
    assert warm.stats.rounds < cold.stats.rounds


@pytest.mark.parametrize(
    "start", [np.zeros((10, 2, 6)), np.zeros((11, 3, 6)), np.full((11, 2, 6), np.nan), [0.0], "sample"], ids=str
)
def test_a_start_that_does_not_fit_is_refused(start: object) -> None:
    with pytest.raises(ValueError, match=r"^start: "):
        solve(network, noise(2), TABLE.timesteps(10), DDIM(TABLE), start=start)
